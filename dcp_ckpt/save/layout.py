"""The layout of one rank's data file: where each owned chunk's container lies. Pure; made once per layout.

The staging arena has the same layout as the file, so the writer writes memory as it is (docs/format.md,
section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, Framing, tensor_framing
from dcp_ckpt.save.placement import OwnedBox, TensorSpec

__all__ = ["LARGE_BYTES", "SEGMENT_BYTES", "FileLayout", "PlacedChunk", "lay_again", "plan_file", "round_up"]

SEGMENT_BYTES = 4096
"""Segments start at multiples of this: a page, and what direct I/O asks of offsets and addresses."""

LARGE_BYTES = 256 << 10
"""A chunk of at least this many bytes gets a segment of its own and a page-aligned payload."""


@dataclass(frozen=True, kw_only=True)
class PlacedChunk:
    """One owned chunk and its place in the file, in bytes from the file's start."""

    owned: OwnedBox
    container_offset: int
    payload_offset: int
    framing: Framing


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """All chunks of one data file, in file order. `tensor_bytes` is a multiple of SEGMENT_BYTES."""

    chunks: tuple[PlacedChunk, ...]
    tensor_bytes: int


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan_file(specs: Sequence[TensorSpec], owned: Sequence[OwnedBox]) -> FileLayout:
    """Lay out the owned chunks: large ones first, each in its own segment, then one slab of small ones."""
    small: list[OwnedBox] = []
    large: list[OwnedBox] = []
    for box in owned:
        spec = specs[box.tensor]
        is_large = box.box.num_elements * spec.item_bytes >= LARGE_BYTES
        (large if is_large else small).append(box)
    framed = [
        (box, tensor_framing(specs[box.tensor].dtype, box.box.sizes, alignment))
        for boxes, alignment in ((large, SEGMENT_BYTES), (small, SLAB_ALIGNMENT_BYTES))
        for box in boxes
    ]
    return _lay(framed, 0)


def lay_again(chunks: Sequence[PlacedChunk], *, start: int = 0) -> FileLayout:
    """Lay out some chunks of a layout anew, in the same order.

    Args:
        start: where the first one goes; `tensor_bytes` counts from 0 all the same.
    """
    return _lay([(chunk.owned, chunk.framing) for chunk in chunks], start)


def _lay(framed: Sequence[tuple[OwnedBox, Framing]], position: int) -> FileLayout:
    chunks: list[PlacedChunk] = []
    for box, framing in framed:
        chunks.append(
            PlacedChunk(
                owned=box,
                container_offset=position,
                payload_offset=position + len(framing.prefix),
                framing=framing,
            )
        )
        # Behind a large chunk, and behind the last one of a slab, a new segment begins.
        is_large = framing.payload_bytes >= LARGE_BYTES
        alignment = SEGMENT_BYTES if is_large else SLAB_ALIGNMENT_BYTES
        position = round_up(position + framing.container_bytes, alignment)
    return FileLayout(chunks=tuple(chunks), tensor_bytes=round_up(position, SEGMENT_BYTES))
