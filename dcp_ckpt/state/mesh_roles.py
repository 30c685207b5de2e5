"""What the dimensions of a device mesh are for: which ranks share data, which a part of the model.

Owns that reading of a mesh. It cannot be derived from placements: a rank of a tensor-parallel group draws the
same samples and often the same random numbers as its peers, and a plain tensor of a pipeline stage exists on
that stage only. Called by TrainState and the components; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch.distributed.device_mesh import DeviceMesh

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.boxes import Mesh

__all__ = ["MeshRoles"]


@dataclass(frozen=True, kw_only=True)
class MeshRoles:
    """The roles of a mesh's dimensions. Equal on all ranks; the mesh holds every rank that saves.

    Dimensions that are not named (tensor, context or expert parallel) hold ranks that share their data.

    Args:
        mesh: of all ranks, with `mesh_dim_names`.
        data: the dimensions along which ranks train on different samples, outermost first: that of DDP, those
            of FSDP and HSDP.
        pipeline: the dimensions along which ranks hold different parts of the model.

    Raises:
        ConfigError: a dimension that the mesh does not have, or one with two roles; this rank is not in the
            mesh.
    """

    mesh: DeviceMesh
    data: tuple[str, ...] = ()
    pipeline: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.mesh.mesh_dim_names or ()
        for name in (*self.data, *self.pipeline):
            if name not in names:
                raise ConfigError(
                    f"the mesh has no dimension {name!r}; it has {', '.join(names) or 'no names'}"
                )
        both = sorted({*self.data} & {*self.pipeline})
        if both:
            raise ConfigError(f"mesh dimension {both[0]!r} cannot be both data and pipeline")
        if self.mesh.get_coordinate() is None:
            raise ConfigError("this rank is not part of the mesh; pass the mesh of all ranks")

    @property
    def data_size(self) -> int:
        """The number of different data-parallel coordinates."""
        return prod(self.mesh.shape[dim] for dim in self._dims(self.data))

    @property
    def data_coordinate(self) -> int:
        """That of this rank, 0 to `data_size` - 1."""
        own = self.mesh.get_coordinate()
        assert own is not None, "checked at construction"
        return self._flattened(tuple(own), self.data)

    def data_coordinates(self) -> Mapping[int, int]:
        """Global rank -> data-parallel coordinate, of all ranks of the mesh."""
        layout = self._layout()
        pairs = zip(layout.ranks, layout.coordinates(), strict=True)
        return {rank: self._flattened(coordinate, self.data) for rank, coordinate in pairs}

    def stage_ranks(self) -> tuple[int, ...]:
        """The global ranks that hold the same part of the model as this one, in order."""
        layout = self._layout()
        own = self.mesh.get_coordinate()
        assert own is not None, "checked at construction"
        stage = self._flattened(tuple(own), self.pipeline)
        pairs = zip(layout.ranks, layout.coordinates(), strict=True)
        return tuple(
            sorted(rank for rank, coordinate in pairs if self._flattened(coordinate, self.pipeline) == stage)
        )

    def _layout(self) -> Mesh:
        return Mesh(tuple(self.mesh.shape), tuple(int(rank) for rank in self.mesh.mesh.flatten().tolist()))

    def _dims(self, names: tuple[str, ...]) -> list[int]:
        known = self.mesh.mesh_dim_names or ()
        return [known.index(name) for name in names]

    def _flattened(self, coordinate: tuple[int, ...], names: tuple[str, ...]) -> int:
        """The coordinate along the named dimensions, as one number, row-major."""
        number = 0
        for dim in self._dims(names):
            number = number * self.mesh.shape[dim] + coordinate[dim]
        return number
