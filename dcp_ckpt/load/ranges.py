"""Which bytes of which files go where: pure interval arithmetic.

A rank needs boxes of tensors; checkpoints hold chunks in row-major order. A *piece* is what one chunk gives
to one target: a byte range of a file, and the part of the target it fills. Pieces of one file are then
covered by *reads* of whole blocks, merged when they are near each other, so each block is read and checked
once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcp_ckpt.format.boxes import Box, intersect
from dcp_ckpt.format.digests import BLOCK_BYTES
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.source import StridedChunk

__all__ = ["MERGE_GAP_BYTES", "READ_BYTES", "Piece", "Read", "cover", "pieces_of"]

READ_BYTES = 4 * BLOCK_BYTES
"""One read: large enough for the device, small enough to stay in cache while it is checked and copied."""

MERGE_GAP_BYTES = 256 << 10
"""Blocks with a smaller gap between them are read in one go."""

_LANDING_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One contiguous byte range of a data file, and what it fills.

    Args:
        tensor: name of the target.
        rank, file: the data file.
        start, num_bytes: the range in the file.
        rows: shape of the range's elements: the chunk's trailing sizes under some of its rows.
        strides: of those elements, where they do not follow each other row by row.
        inner: the part of `rows` that is wanted, per dimension.
        outer: the part of the target that it fills, per dimension.
    """

    tensor: str
    rank: int
    file: int
    start: int
    num_bytes: int
    rows: tuple[int, ...]
    inner: tuple[slice, ...]
    outer: tuple[slice, ...]
    strides: tuple[int, ...] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every byte of the range is wanted, in the order in which it is stored."""
        return self.strides is None and all(
            part.start == 0 and part.stop == size for part, size in zip(self.inner, self.rows, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Read:
    """One read of whole blocks, and the pieces that take bytes from it."""

    rank: int
    file: int
    first_block: int
    start: int
    num_bytes: int
    pieces: tuple[int, ...]


def pieces_of(tensor: str, dtype: str, wanted: Box, chunks: Sequence[tuple[int, ChunkEntry]]) -> list[Piece]:
    """What the chunks give to a wanted box of one tensor."""
    item_bytes = dtype_info(dtype).item_bytes
    pieces: list[Piece] = []
    for rank, chunk in chunks:
        common = intersect(chunk.box, wanted)
        if common is None:
            continue
        if isinstance(chunk, StridedChunk):
            pieces.append(_cut_strided(tensor, item_bytes, wanted, rank, chunk, common))
        else:
            pieces += _cut(tensor, item_bytes, wanted, rank, chunk, common)
    return pieces


def _cut(tensor: str, item_bytes: int, wanted: Box, rank: int, chunk: ChunkEntry, common: Box) -> list[Piece]:
    """Cut one chunk's part into bounded groups of rows.

    One that cannot go straight into its target (a part of each row, a GPU, another dtype) is held whole.
    """
    sizes = chunk.sizes
    if not sizes:
        return [
            Piece(
                tensor=tensor, rank=rank, file=chunk.file, start=chunk.payload_offset, num_bytes=item_bytes,
                rows=(), inner=(), outer=(),
            )
        ]  # fmt: skip
    inside = [c - o for c, o in zip(common.offsets, chunk.offsets, strict=True)]
    target = [c - o for c, o in zip(common.offsets, wanted.offsets, strict=True)]
    row_bytes = item_bytes * math.prod(sizes[1:])
    group = max(1, _LANDING_BYTES // max(row_bytes, 1))
    pieces = []
    for first in range(0, common.sizes[0], group):
        count = min(group, common.sizes[0] - first)
        rest = list(zip(inside[1:], target[1:], common.sizes[1:], strict=True))
        pieces.append(
            Piece(
                tensor=tensor,
                rank=rank,
                file=chunk.file,
                start=chunk.payload_offset + (inside[0] + first) * row_bytes,
                num_bytes=count * row_bytes,
                rows=(count, *sizes[1:]),
                inner=(slice(0, count), *(slice(i, i + size) for i, _, size in rest)),
                outer=(
                    slice(target[0] + first, target[0] + first + count),
                    *(slice(t, t + size) for _, t, size in rest),
                ),
            )
        )
    return pieces


def _cut_strided(
    tensor: str, item_bytes: int, wanted: Box, rank: int, chunk: StridedChunk, common: Box
) -> Piece:
    """One chunk's part as the range from its first to its last element."""
    first = sum((c - o) * s for c, o, s in zip(common.offsets, chunk.offsets, chunk.strides, strict=True))
    span = 1 + sum((size - 1) * stride for size, stride in zip(common.sizes, chunk.strides, strict=True))
    return Piece(
        tensor=tensor,
        rank=rank,
        file=chunk.file,
        start=chunk.payload_offset + first * item_bytes,
        num_bytes=span * item_bytes,
        rows=common.sizes,
        inner=tuple(slice(0, size) for size in common.sizes),
        outer=tuple(
            slice(c - o, c - o + size)
            for c, o, size in zip(common.offsets, wanted.offsets, common.sizes, strict=True)
        ),
        strides=chunk.strides,
    )


def cover(
    pieces: Sequence[Piece],
    file_bytes: Mapping[tuple[int, int], int],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> list[Read]:
    """Cover all pieces by reads of whole blocks, in order of file and offset.

    Args:
        pieces: in any order.
        file_bytes: size of each data file, by rank and file index.
        block_bytes: reads start and end at multiples of this.
    """
    by_file: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(pieces):
        by_file.setdefault((piece.rank, piece.file), []).append(index)
    reads: list[Read] = []
    for (rank, file), members in sorted(by_file.items()):
        members.sort(key=lambda index: pieces[index].start)
        for start, stop in _runs([pieces[index] for index in members], block_bytes):
            end = min(stop, file_bytes[rank, file])
            reads += _split(rank, file, start, end, members, pieces)
    return reads


def _runs(pieces: Sequence[Piece], block_bytes: int) -> list[tuple[int, int]]:
    """Block-aligned runs of bytes that cover pieces sorted by start."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        start = piece.start // block_bytes * block_bytes
        stop = -(-(piece.start + piece.num_bytes) // block_bytes) * block_bytes
        if runs and start <= runs[-1][1] + MERGE_GAP_BYTES:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        else:
            runs.append((start, stop))
    return runs


def _split(
    rank: int, file: int, start: int, end: int, members: Sequence[int], pieces: Sequence[Piece]
) -> list[Read]:
    """Split one run into reads, each with the pieces that overlap it."""
    reads = []
    first = 0
    for offset in range(start, end, READ_BYTES):
        stop = min(offset + READ_BYTES, end)
        while first < len(members) and _stop(pieces[members[first]]) <= offset:
            first += 1
        touching = []
        for index in members[first:]:
            if pieces[index].start >= stop:
                break
            if _stop(pieces[index]) > offset:
                touching.append(index)
        reads.append(
            Read(
                rank=rank,
                file=file,
                first_block=offset // BLOCK_BYTES,
                start=offset,
                num_bytes=stop - offset,
                pieces=tuple(touching),
            )
        )
    return reads


def _stop(piece: Piece) -> int:
    return piece.start + piece.num_bytes
