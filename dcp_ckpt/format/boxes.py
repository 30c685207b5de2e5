"""Boxes: axis-aligned parts of a tensor, and which box a rank holds under DTensor placements.

Pure integer arithmetic, no torch: both the side that saves (who owns what) and the side that loads
(who has what I need) compute the same boxes from the same placements.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dcp_ckpt.errors import ConfigError

__all__ = [
    "Box",
    "Mesh",
    "Placement",
    "compress_ranks",
    "expand_ranks",
    "holding_ranks",
    "intersect",
    "shard_box",
    "split_rows",
    "strided_problem",
    "tiling_problem",
]


@dataclass(frozen=True, order=True)
class Box:
    """Offsets and sizes per dimension, in elements. A 0-dim tensor is the box ((), ())."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class Placement:
    """One mesh dimension's placement: replicated (`dim` None), or sharded on tensor dimension `dim`.

    `split_factor` above 1 is DTensor's `_StridedShard`: this mesh dimension splits after the later
    ones that shard the same tensor dimension (FSDP over TP).
    """

    dim: int | None = None
    split_factor: int = 1

    def __str__(self) -> str:
        if self.dim is None:
            return "R"
        return f"S{self.dim}" + (f"/{self.split_factor}" if self.split_factor > 1 else "")

    @classmethod
    def parse(cls, text: str) -> Placement:
        match = re.fullmatch(r"R|S([0-9]{1,9})(?:/([1-9][0-9]{0,17}))?", text)
        if not match:
            raise ConfigError(f"unknown placement {text!r:.80}")
        return cls() if text == "R" else cls(int(match[1]), int(match[2] or 1))


@dataclass(frozen=True)
class Mesh:
    """A device mesh: its shape and its ranks in row-major order."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]

    def __hash__(self) -> int:
        # Many tensors share a mesh, and meshes are keys: that of 16,000 ranks is hashed once.
        return self._hash

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """The mesh coordinate of a rank, or None when the rank is not part of the mesh."""
        position = self._positions.get(rank)
        return None if position is None else self._unravel(position)

    def coordinates(self) -> Iterator[tuple[int, ...]]:
        """The coordinates of `ranks`, in their order."""
        return itertools.product(*map(range, self.shape))

    def number(self, coordinate: Sequence[int], dims: Iterable[int]) -> int:
        """A coordinate along some of the dimensions as one number, row by row."""
        number = 0
        for dim in dims:
            number = number * self.shape[dim] + coordinate[dim]
        return number

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.ranks))

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def _unravel(self, position: int) -> tuple[int, ...]:
        coordinate = []
        for size in reversed(self.shape):
            position, index = divmod(position, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))


def _chunk(size: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Offset and size of part `index` as torch.chunk splits: equal parts, the last ones short or empty."""
    full = -(-size // num_chunks)
    start = min(full * index, size)
    return start, min(full, size - start)


def shard_box(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Box:
    """The box of a tensor that the rank at `coordinate` holds; empty boxes are legal.

    Splits are applied in mesh order; strided ones after the others, the last mesh dimension first. That is
    what a rank holds when FSDP shards what tensor parallelism has sharded before.
    """
    offsets, sizes = [0] * len(shape), list(shape)
    for mesh_dim, dim in _splits(placements):
        start, size = _chunk(sizes[dim], mesh_shape[mesh_dim], coordinate[mesh_dim])
        offsets[dim] += start
        sizes[dim] = size
    return Box(tuple(offsets), tuple(sizes))


def _splits(placements: Sequence[Placement]) -> list[tuple[int, int]]:
    """Mesh dimension and tensor dimension of each split, in the order in which they are applied."""
    splits = [(i, found.dim) for i, found in enumerate(placements) if found.dim is not None]
    plain = [split for split in splits if placements[split[0]].split_factor == 1]
    return plain + [split for split in reversed(splits) if placements[split[0]].split_factor > 1]


def holding_ranks(
    shape: Sequence[int],
    mesh: Mesh,
    placements: Sequence[Placement],
    owners: Sequence[Sequence[int]],
    wanted: Box,
) -> list[int]:
    """The owners that hold elements of a box under these placements, ascending.

    Found by dividing, so it takes as long as there are answers, not as there are ranks.

    Args:
        owners: as runs `[first, count]`, all of them ranks of the mesh.
    """
    if intersect(Box.whole(shape), wanted) is None:
        return []
    splits = _splits(placements)
    split_dims = {mesh_dim for mesh_dim, _ in splits}
    num_copies = math.prod(size for mesh_dim, size in enumerate(mesh.shape) if mesh_dim not in split_dims)
    if sum(count for _, count in owners) <= num_copies:
        held = ((rank, mesh.coordinate(rank)) for rank in expand_ranks(owners))
        return sorted(
            rank
            for rank, at in held
            if at is not None and intersect(shard_box(shape, mesh.shape, placements, at), wanted)
        )
    ranks = [
        mesh.ranks[mesh.number(at, range(len(at)))]
        for split_at in _split_coordinates(splits, mesh.shape, Box.whole(shape), wanted)
        for at in itertools.product(
            *([split_at[i]] if i in split_dims else range(size) for i, size in enumerate(mesh.shape))
        )
    ]
    return sorted(rank for rank in ranks if any(first <= rank < first + count for first, count in owners))


def _split_coordinates(
    splits: Sequence[tuple[int, int]], mesh_shape: Sequence[int], box: Box, wanted: Box
) -> Iterator[dict[int, int]]:
    """Where along each mesh dimension that splits `box` the parts lie that have elements of `wanted`."""
    if not splits:
        yield {}
        return
    (mesh_dim, dim), *rest = splits
    offset, size, num_parts = box.offsets[dim], box.sizes[dim], mesh_shape[mesh_dim]
    first = max(wanted.offsets[dim] - offset, 0)
    stop = min(wanted.offsets[dim] + wanted.sizes[dim] - offset, size)
    if first >= stop:
        return
    full = -(-size // num_parts)
    for index in range(first // full, -(-stop // full)):
        start, part_size = _chunk(size, num_parts, index)
        part = Box(
            (*box.offsets[:dim], offset + start, *box.offsets[dim + 1 :]),
            (*box.sizes[:dim], part_size, *box.sizes[dim + 1 :]),
        )
        for found in _split_coordinates(rest, mesh_shape, part, wanted):
            yield {mesh_dim: index, **found}


def strided_problem(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> str | None:
    """Why it cannot be known which part a rank holds under strided placements; None when it can. Pure.

    DTensor knows two readings of an uneven strided split: that of `fully_shard`, which `shard_box` follows,
    and that of `distribute_tensor`. With two mesh dimensions they give some rank another size, so a tensor
    of the second kind is found by its local shape. With three they may differ in offsets alone.
    """
    for mesh_dim, placement in enumerate(placements):
        if placement.split_factor == 1:
            continue
        same = [other for other, found in enumerate(placements) if found.dim == placement.dim]
        later = [mesh_shape[other] for other in same if other > mesh_dim]
        if math.prod(later) != placement.split_factor:
            return (
                f"{placement} on mesh dimension {mesh_dim} strides over {placement.split_factor} parts, and "
                f"the later mesh dimensions make {math.prod(later)}"
            )
        assert placement.dim is not None, "only sharded placements are strided"
        size, num_parts = shape[placement.dim], math.prod(mesh_shape[other] for other in same)
        if sum(parts > 1 for parts in later) > 1 and size % num_parts:
            return f"dimension {placement.dim} of size {size} is split {len(same)} times, into unequal parts"
    return None


def intersect(a: Box, b: Box) -> Box | None:
    """The common box in global coordinates, or None when it has no elements."""
    offsets, sizes = [], []
    for a_offset, a_size, b_offset, b_size in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True):
        start = max(a_offset, b_offset)
        stop = min(a_offset + a_size, b_offset + b_size)
        if stop <= start:
            return None
        offsets.append(start)
        sizes.append(stop - start)
    return Box(tuple(offsets), tuple(sizes))


def split_rows(box: Box, num_parts: int) -> list[Box]:
    """Split along dimension 0 into at most `num_parts` boxes of nearly equal height, none empty."""
    if not box.sizes or box.sizes[0] <= 1 or num_parts <= 1:
        return [box]
    rows, parts = box.sizes[0], min(num_parts, box.sizes[0])
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [
        Box((box.offsets[0] + start, *box.offsets[1:]), (stop - start, *box.sizes[1:]))
        for start, stop in itertools.pairwise(bounds)
    ]


def tiling_problem(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Why the boxes do not tile the tensor exactly, or None when they do.

    Elements are counted, boxes checked to lie inside, and overlaps found by a sweep along
    dimension 0: O(n log n) for the row-wise splits that occur, never n squared over all chunks.
    """
    boxes = sorted(box for box in boxes if box.num_elements)
    for box in boxes:
        inside = len(box.offsets) == len(shape) and all(
            offset >= 0 and offset + size <= limit
            for offset, size, limit in zip(box.offsets, box.sizes, shape, strict=True)
        )
        if not inside:
            return f"chunk at {box.offsets} with sizes {box.sizes} lies outside of {tuple(shape)}"
    found, wanted = sum(box.num_elements for box in boxes), math.prod(shape)
    if found != wanted:
        return f"chunks hold {found} of {wanted} elements"
    active: list[Box] = []
    for box in boxes:
        if box.offsets:
            active = [a for a in active if a.offsets[0] + a.sizes[0] > box.offsets[0]]
        for other in active:
            if intersect(box, other):
                return f"chunks at {other.offsets} and {box.offsets} overlap"
        active.append(box)
    return None


def compress_ranks(ranks: Sequence[int]) -> list[list[int]]:
    """Ranks as runs `[first, count]`, order kept."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][0] + runs[-1][1] == rank:
            runs[-1][1] += 1
        else:
            runs.append([rank, 1])
    return runs


def expand_ranks(runs: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The inverse of `compress_ranks`."""
    return tuple(rank for first, count in runs for rank in range(first, first + count))
