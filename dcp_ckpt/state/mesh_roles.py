"""What the dimensions of a device mesh are for: which ranks share data, which a part of the model.

Owns that reading of a mesh. It cannot be derived from placements: a rank of a tensor-parallel group draws the
same samples and often the same random numbers as its peers, and a plain tensor of a pipeline stage exists on
that stage only. Called by TrainState and the components, and by the save plan; knows nothing of files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from torch.distributed.device_mesh import DeviceMesh

from dcp_ckpt.errors import ConfigError, StateError
from dcp_ckpt.format.boxes import Mesh
from dcp_ckpt.state.placements import layout_of

__all__ = ["Holders", "MeshRoles"]


@dataclass(frozen=True, kw_only=True)
class Holders:
    """Which ranks hold one part of the model, as shards of it or as copies. Pure.

    Args:
        mesh: of all ranks.
        pipeline: the dimensions of `mesh` along which ranks hold different parts.
        stages: where along these dimensions the part is held.
    """

    mesh: Mesh
    pipeline: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...]

    def copies(self, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The ranks of every copy of what `ranks` hold together; the same whichever copy is asked for.

        Args:
            ranks: in the order of the tensor's own mesh; one rank for a plain tensor.

        Returns:
            For each copy its ranks, in that order. Only `ranks` where they are no slice of the mesh, so that
            no other ranks correspond to them.
        """
        own = [self._coordinates[rank] for rank in ranks if rank in self._coordinates]
        spread = {dim for dim, column in enumerate(zip(*own, strict=True)) if len(set(column)) > 1}
        is_slice = len(ranks) == len(own) == prod(self.mesh.shape[dim] for dim in spread)
        if not is_slice or not spread.isdisjoint(self.pipeline):
            return (tuple(ranks),)
        free = [dim for dim in range(len(self.mesh.shape)) if dim not in spread and dim not in self.pipeline]
        places = itertools.product(self.stages, itertools.product(*(range(self.mesh.shape[d]) for d in free)))
        moves = [dict(zip((*self.pipeline, *free), (*stage, *at), strict=True)) for stage, at in places]
        return tuple(
            tuple(
                self._ranks[tuple(move.get(dim, position) for dim, position in enumerate(coordinate))]
                for coordinate in own
            )
            for move in moves
        )

    @cached_property
    def _coordinates(self) -> dict[int, tuple[int, ...]]:
        return dict(zip(self.mesh.ranks, self.mesh.coordinates(), strict=True))

    @cached_property
    def _ranks(self) -> dict[tuple[int, ...], int]:
        return {coordinate: rank for rank, coordinate in self._coordinates.items()}


@dataclass(frozen=True, kw_only=True)
class MeshRoles:
    """The roles of a mesh's dimensions. Equal on all ranks; the mesh holds every rank that saves.

    Dimensions that are not named (tensor, context or expert parallel) hold ranks that share their data. Ranks
    that differ along `pipeline` hold different parts of the model; all others hold the same one, as shards or
    as copies.

    Args:
        mesh: of all ranks, with `mesh_dim_names`.
        data: the dimensions along which ranks train on different samples, outermost first: that of DDP, those
            of FSDP and HSDP.
        pipeline: the dimensions along which ranks hold different parts of the model.
        shared: parameters that several parts have under one name, such as an embedding that the last stage
            uses as its head: the full name, with the model's key in front where there are several, and the
            positions along `pipeline` (counted row by row where there are several dimensions). They are
            stored once; training keeps them equal.

    Raises:
        ConfigError: a dimension that the mesh does not have, or one with two roles; this rank is not in the
            mesh; a position that the pipeline does not have.
    """

    mesh: DeviceMesh
    data: tuple[str, ...] = ()
    pipeline: tuple[str, ...] = ()
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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
        num_stages = prod(self.mesh.shape[dim] for dim in self._dims(self.pipeline))
        for name, stages in self.shared.items():
            if len(set(stages)) < len(stages) or not set(stages) <= set(range(num_stages)) or len(stages) < 2:
                raise ConfigError(
                    f"shared[{name!r}] is {stages}, not two or more different ones of {num_stages} stage(s)"
                )

    @property
    def data_size(self) -> int:
        """The number of different data-parallel coordinates."""
        return prod(self.mesh.shape[dim] for dim in self._dims(self.data))

    @property
    def data_coordinate(self) -> int:
        """That of this rank, 0 to `data_size` - 1."""
        return self._layout.number(self._own, self._dims(self.data))

    def data_coordinates(self) -> Mapping[int, int]:
        """Global rank -> data-parallel coordinate, of all ranks of the mesh."""
        pairs = zip(self._layout.ranks, self._layout.coordinates(), strict=True)
        return {rank: self._layout.number(coordinate, self._dims(self.data)) for rank, coordinate in pairs}

    def stage_ranks(self) -> tuple[int, ...]:
        """The global ranks that hold the same part of the model as this one, in order."""
        stage = self._stage_of(self._own)
        pairs = zip(self._layout.ranks, self._layout.coordinates(), strict=True)
        return tuple(sorted(rank for rank, coordinate in pairs if self._stage_of(coordinate) == stage))

    def holders(self, parameter: str = "") -> Holders:
        """Who holds this rank's part of the model, or a parameter of it, which others may share.

        Raises:
            StateError: `shared` says that other stages have the parameter, and not this one.
        """
        own = self._stage_of(self._own)
        stages = self.shared.get(parameter, (own,))
        if own not in stages:
            raise StateError(
                f"MeshRoles(shared=...) says that stages {', '.join(map(str, sorted(stages)))} have "
                f"{parameter}, and stage {own} has it, too; name them all, or rename it there"
            )
        key = tuple(sorted(stages))
        if key not in self._known_holders:
            dims = tuple(self._dims(self.pipeline))
            positions = list(itertools.product(*(range(self._layout.shape[dim]) for dim in dims)))
            self._known_holders[key] = Holders(
                mesh=self._layout, pipeline=dims, stages=tuple(positions[stage] for stage in key)
            )
        return self._known_holders[key]

    @cached_property
    def _known_holders(self) -> dict[tuple[int, ...], Holders]:
        """By stages; made once, since every save asks for them."""
        return {}

    @cached_property
    def _layout(self) -> Mesh:
        return layout_of(self.mesh)

    @cached_property
    def _own(self) -> tuple[int, ...]:
        own = self.mesh.get_coordinate()
        assert own is not None, "checked at construction"
        return tuple(own)

    def _stage_of(self, coordinate: tuple[int, ...]) -> int:
        """Which part of the model the rank at a coordinate holds."""
        return self._layout.number(coordinate, self._dims(self.pipeline))

    def _dims(self, names: tuple[str, ...]) -> list[int]:
        known = self.mesh.mesh_dim_names or ()
        return [known.index(name) for name in names]
