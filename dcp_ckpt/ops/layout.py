"""How one stored tensor would be spread over the ranks of another mesh: its own placements, other sizes.

Pure integer arithmetic. Knows no chunks and no bytes. Called by `dcp_ckpt.ops.plan`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dcp_ckpt.format.boxes import Box, Placement, shard_box
from dcp_ckpt.format.fragment import MeshEntry, TensorEntry

__all__ = ["TensorLayout", "coordinates"]


def coordinates(mesh: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The coordinate of every rank of a mesh, name -> position; ranks are counted row by row.

    Args:
        mesh: name -> size, outermost first.
    """
    for position in itertools.product(*map(range, mesh.values())):
        yield dict(zip(mesh, position, strict=True))


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """A tensor's shape, and the dimensions of its mesh by name, outermost first.

    Args:
        dims: names; empty for a tensor that every rank holds whole.
        placements: one per dimension.
        num_ranks: of the mesh that it was saved from; None for a tensor that every rank holds whole.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    placements: tuple[Placement, ...]
    num_ranks: int | None

    @classmethod
    def of(cls, entry: TensorEntry, mesh: MeshEntry | None) -> TensorLayout:
        """That of a stored tensor. Dimensions without names are called `dim0`, `dim1`, ..."""
        if mesh is None:
            return cls(shape=tuple(entry.shape), dims=(), placements=(), num_ranks=None)
        return cls(
            shape=tuple(entry.shape),
            dims=tuple(mesh.dim_names) or tuple(f"dim{number}" for number in range(len(mesh.shape))),
            placements=tuple(map(Placement.parse, entry.placements)),
            num_ranks=math.prod(mesh.shape),
        )

    @property
    def sharding_dim(self) -> str | None:
        """The first dimension that shards; None for a replicated tensor."""
        pairs = zip(self.dims, self.placements, strict=True)
        return next((dim for dim, placement in pairs if placement.dim is not None), None)

    def along(self, name: str) -> TensorLayout:
        """The same with the dimension that shards under another name, unless there is one of that name."""
        if name in self.dims:
            return self
        dims = tuple(name if dim == self.sharding_dim else dim for dim in self.dims)
        return replace(self, dims=dims)

    def box(self, mesh: Mapping[str, int], coordinate: Mapping[str, int]) -> Box:
        """What the rank at `coordinate` of a new mesh holds.

        Args:
            mesh: name -> size; dimensions that it lacks have size 1.
            coordinate: name -> position.
        """
        sizes = [mesh.get(dim, 1) for dim in self.dims]
        position = [coordinate.get(dim, 0) for dim in self.dims]
        return shard_box(self.shape, sizes, self._placements_on(sizes), position)

    def _placements_on(self, sizes: list[int]) -> list[Placement]:
        """As stored; a strided dimension strides over the new sizes of the later ones that split the same."""
        found = []
        for number, placement in enumerate(self.placements):
            factor = 1
            if placement.split_factor > 1:
                later = zip(self.placements[number + 1 :], sizes[number + 1 :], strict=True)
                factor = math.prod(size for other, size in later if other.dim == placement.dim)
            found.append(replace(placement, split_factor=factor))
        return found
