"""Which bytes of which files go where: pure interval arithmetic.

A rank needs boxes of tensors; checkpoints hold chunks of them. A *piece* is what one chunk gives to one
target: elements at fixed strides in a byte range of a file, and the part of the target that they fill.
Pieces of one file are covered by *reads* of whole blocks, merged when they are near each other, so each
block is read and checked once. What one read gives to a piece is a few *parts*, each a box again, so bytes
go from the memory that they were read into straight to their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcp_ckpt.format.boxes import Box, intersect
from dcp_ckpt.format.digests import BLOCK_BYTES
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.source import StridedChunk

__all__ = [
    "MERGE_GAP_BYTES",
    "READ_BYTES",
    "Part",
    "Piece",
    "Read",
    "Stretch",
    "cover",
    "parts_between",
    "pieces_of",
    "stretches_of",
]

READ_BYTES = 4 * BLOCK_BYTES
"""One read: large enough for the device, small enough to stay in cache while it is checked and copied."""

MERGE_GAP_BYTES = 256 << 10
"""Blocks with a smaller gap between them are read in one go."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one chunk gives to one target.

    Args:
        tensor: name of the stored tensor.
        rank, file: the data file.
        start: of the first element, in bytes from the start of the file.
        num_bytes: from the first element to the end of the last one, whatever lies between them.
        sizes: of the box of elements, per dimension.
        strides: from one element to the next along each dimension, in elements.
        outer: the part of the target that it fills, per dimension.
    """

    tensor: str
    rank: int
    file: int
    start: int
    num_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    outer: tuple[slice, ...]

    @property
    def stop(self) -> int:
        return self.start + self.num_bytes

    @property
    def is_row_major(self) -> bool:
        """Whether its elements follow each other row by row, without gaps."""
        dense = _row_major(self.sizes)
        return self.strides == dense or all(
            stride == wanted or size == 1
            for size, stride, wanted in zip(self.sizes, self.strides, dense, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Read:
    """One read of whole blocks, and the pieces that take elements from it.

    Args:
        start, stop: the elements that begin in these bytes of the file are taken from this read.
        num_bytes: that are read; more than to `stop` where elements may reach beyond it.
        pieces: their indices.
    """

    rank: int
    file: int
    start: int
    stop: int
    num_bytes: int
    pieces: tuple[int, ...]

    @property
    def first_block(self) -> int:
        return self.start // BLOCK_BYTES


_MOST_STRETCHES = 64
"""A read with more of them is faster copied than scattered."""


@dataclass(frozen=True)
class Stretch:
    """Some bytes of a read: `num_bytes` of a piece from `offset` in it, or of nothing that is wanted."""

    piece: int | None
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Part:
    """A box of a piece: where in the piece, and which `span` elements in file order hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int
    span: int


def pieces_of(tensor: str, dtype: str, wanted: Box, chunks: Sequence[tuple[int, ChunkEntry]]) -> list[Piece]:
    """What the chunks give to a wanted box of one tensor."""
    item_bytes = dtype_info(dtype).item_bytes
    pieces: list[Piece] = []
    for rank, chunk in chunks:
        common = intersect(chunk.box, wanted)
        if common is None:
            continue
        strides = chunk.strides if isinstance(chunk, StridedChunk) else _row_major(chunk.sizes)
        for box in _near_parts(common, strides, item_bytes):
            inside = [a - b for a, b in zip(box.offsets, chunk.offsets, strict=True)]
            outside = [a - b for a, b in zip(box.offsets, wanted.offsets, strict=True)]
            first = sum(offset * stride for offset, stride in zip(inside, strides, strict=True))
            pieces.append(
                Piece(
                    tensor=tensor,
                    rank=rank,
                    file=chunk.file,
                    start=chunk.payload_offset + first * item_bytes,
                    num_bytes=_span(box.sizes, strides) * item_bytes,
                    sizes=box.sizes,
                    strides=strides,
                    outer=tuple(
                        slice(offset, offset + size) for offset, size in zip(outside, box.sizes, strict=True)
                    ),
                )
            )
    return pieces


def _near_parts(box: Box, strides: Sequence[int], item_bytes: int) -> Iterator[Box]:
    """The box, or its parts where whole blocks lie between them that nobody wants."""
    dim = 0
    while dim < len(strides):
        gap = strides[dim] - _span(box.sizes[dim + 1 :], strides[dim + 1 :])
        if box.sizes[dim] > 1 and gap * item_bytes < MERGE_GAP_BYTES + 2 * BLOCK_BYTES:
            break
        dim += 1
    for indices in itertools.product(*map(range, box.sizes[:dim])):
        offsets = (offset + index for offset, index in zip(box.offsets, indices, strict=False))
        yield Box((*offsets, *box.offsets[dim:]), (*(1 for _ in indices), *box.sizes[dim:]))


def parts_between(sizes: Sequence[int], strides: Sequence[int], first: int, stop: int) -> Iterator[Part]:
    """The elements of a box that lie at positions `first` to `stop` of file order, as few boxes.

    Args:
        sizes, strides: of the box, strides descending, in elements.
        first, stop: in elements, counted from the box's first one.
    """
    span = _span(sizes, strides)
    if first <= 0 and stop >= span:
        yield Part((0,) * len(sizes), tuple(sizes), 0, span)
        return
    if stop <= 0 or first >= span:
        return
    size, stride = sizes[0], strides[0]
    if size == 1:
        yield from _below(0, sizes, strides, first, stop)
        return
    inner = _span(sizes[1:], strides[1:])
    touched = range(max(0, (first - inner) // stride + 1), min(size, -(-stop // stride)))
    whole = range(max(touched.start, -(-first // stride)), min(touched.stop, (stop - inner) // stride + 1))
    if not whole:
        whole = range(touched.stop, touched.stop)
    for index in range(touched.start, whole.start):
        yield from _below(index, sizes, strides, first, stop)
    if whole:
        offsets, rest = (whole.start, *(0 for _ in sizes[1:])), tuple(sizes[1:])
        yield Part(offsets, (len(whole), *rest), whole.start * stride, (len(whole) - 1) * stride + inner)
    for index in range(whole.stop, touched.stop):
        yield from _below(index, sizes, strides, first, stop)


def _below(index: int, sizes: Sequence[int], strides: Sequence[int], first: int, stop: int) -> Iterator[Part]:
    """The parts at one index of the first dimension."""
    start = index * strides[0]
    for part in parts_between(sizes[1:], strides[1:], first - start, stop - start):
        yield Part((index, *part.offsets), (1, *part.sizes), start + part.first, part.span)


def _row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * sizes[dim]
    return tuple(strides)


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements there are from the first to the last one of a box."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def cover(
    pieces: Sequence[Piece],
    file_bytes: Mapping[tuple[int, int], int],
    *,
    block_bytes: int = BLOCK_BYTES,
    overlap_bytes: int = 0,
) -> list[Read]:
    """Cover all pieces by reads of whole blocks, in order of file and offset.

    Args:
        pieces: in any order.
        file_bytes: size of each data file, by rank and file index.
        block_bytes: reads start and end at multiples of this.
        overlap_bytes: how far a read goes on beyond its last block, for elements that lie across its end.
    """
    by_file: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(pieces):
        by_file.setdefault((piece.rank, piece.file), []).append(index)
    reads: list[Read] = []
    for (rank, file), members in sorted(by_file.items()):
        members.sort(key=lambda index: pieces[index].start)
        size_bytes = file_bytes[rank, file]
        for start, stop in _runs([pieces[index] for index in members], block_bytes):
            for first, end, touching in _split(start, min(stop, size_bytes), members, pieces):
                reads.append(
                    Read(
                        rank=rank,
                        file=file,
                        start=first,
                        stop=end,
                        num_bytes=min(end + overlap_bytes, size_bytes) - first,
                        pieces=touching,
                    )
                )
    return reads


def _runs(pieces: Sequence[Piece], block_bytes: int) -> list[tuple[int, int]]:
    """Block-aligned runs of bytes that cover pieces sorted by start."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        start = piece.start // block_bytes * block_bytes
        stop = -(-piece.stop // block_bytes) * block_bytes
        if runs and start <= runs[-1][1] + MERGE_GAP_BYTES:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        else:
            runs.append((start, stop))
    return runs


def _split(
    start: int, end: int, members: Sequence[int], pieces: Sequence[Piece]
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Split one run into the bytes of reads, each with the pieces that overlap them."""
    first = 0
    for offset in range(start, end, READ_BYTES):
        stop = min(offset + READ_BYTES, end)
        while first < len(members) and pieces[members[first]].stop <= offset:
            first += 1
        touching = []
        for index in members[first:]:
            if pieces[index].start >= stop:
                break
            if pieces[index].stop > offset:
                touching.append(index)
        yield offset, stop, tuple(touching)


def stretches_of(read: Read, pieces: Sequence[Piece], fits: Sequence[bool]) -> list[Stretch] | None:
    """The bytes of a read, cut where the memory that they go to changes; None where they must be copied.

    Args:
        fits: for each piece, whether its bytes can lie in its target as they are.
    """
    found: list[Stretch] = []
    end = read.start
    for index in read.pieces:
        start, stop = max(pieces[index].start, read.start), min(pieces[index].stop, read.stop)
        # One chunk may fill several targets: bytes can be read into one of them only.
        if not fits[index] or start < end:
            return None
        if start > end:
            found.append(Stretch(None, 0, start - end))
        found.append(Stretch(index, start - pieces[index].start, stop - start))
        end = stop
    if end < read.start + read.num_bytes:
        found.append(Stretch(None, 0, read.start + read.num_bytes - end))
    return found if len(found) <= _MOST_STRETCHES else None
