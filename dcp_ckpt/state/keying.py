"""Whose state is whose when the world changes: ranks are known by their data-parallel coordinate.

Owns the places of a world's ranks, how a checkpoint remembers them, and which saved rank a rank continues.
Called by the components of what every rank has for itself: random streams, per-rank values, loaders. Knows
none of them, and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.boxes import Mesh, compress_ranks, expand_ranks
from dcp_ckpt.format.consistency import ranks_problem
from dcp_ckpt.format.documents import converted
from dcp_ckpt.format.fields import Dims, RankRuns
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.state.component import Captured, Path, StoredState, Targets
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.placements import layout_of

__all__ = [
    "NOTHING_SHARED",
    "Keying",
    "KeyingComponent",
    "Place",
    "Shared",
    "all_places_known",
    "live_keying",
    "saved_keying",
    "source_rank",
    "take_keying",
]

_PATH: Path = ("mesh_roles",)
_NAME = "mesh_roles"


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Args:
        data: its data-parallel coordinate.
        peers: its index along every dimension whose ranks share their data.
    """

    data: int
    peers: Mapping[str, int]


@dataclass(frozen=True)
class Shared:
    """Along what ranks had the same when they saved: over all data coordinates, and over which dimensions."""

    by_data: bool
    by_peers: frozenset[str]


NOTHING_SHARED = Shared(by_data=False, by_peers=frozenset())


@dataclass(frozen=True, kw_only=True)
class Keying:
    """The places of all ranks of one world.

    Args:
        shape: of the mesh.
        dim_names: one per dimension.
        ranks: row-major, numbered from 0 as those that save.
        data: the dimensions along which ranks train on different samples, outermost first.
    """

    shape: tuple[int, ...]
    dim_names: tuple[str, ...]
    ranks: tuple[int, ...]
    data: tuple[str, ...]

    @classmethod
    def by_rank(cls, world_size: int) -> Keying:
        """Every rank is a coordinate of its own."""
        return cls(shape=(world_size,), dim_names=("rank",), ranks=tuple(range(world_size)), data=("rank",))

    @classmethod
    def of(cls, roles: MeshRoles) -> Keying:
        mesh = layout_of(roles.mesh)
        # A group numbers its ranks in the order of their numbers in the whole world.
        numbers = {rank: number for number, rank in enumerate(sorted(mesh.ranks))}
        return cls(
            shape=mesh.shape,
            dim_names=tuple(roles.mesh.mesh_dim_names or ()),
            ranks=tuple(numbers[rank] for rank in mesh.ranks),
            data=roles.data,
        )

    @property
    def data_size(self) -> int:
        """The number of different data-parallel coordinates."""
        return prod(self._extents[name] for name in self.data)

    @cached_property
    def peers(self) -> dict[str, int]:
        """The dimensions along which several ranks share their data, with their sizes."""
        return {name: n for name, n in self._extents.items() if name not in self.data and n > 1}

    def place(self, rank: int) -> Place:
        return self._places[rank]

    def rank_at(self, data: int, peers: Mapping[str, int]) -> int:
        """The rank of a place; indices that are not given are 0."""
        return self._ranks[data, tuple(peers.get(name, 0) for name in self.peers)]

    @cached_property
    def _extents(self) -> dict[str, int]:
        return dict(zip(self.dim_names, self.shape, strict=True))

    @cached_property
    def _places(self) -> dict[int, Place]:
        mesh, data = Mesh(self.shape, self.ranks), list(map(self.dim_names.index, self.data))
        found = {}
        for rank, coordinate in zip(mesh.ranks, mesh.coordinates(), strict=True):
            index = dict(zip(self.dim_names, coordinate, strict=True))
            peers = {name: index[name] for name in self.peers}
            found[rank] = Place(mesh.number(coordinate, data), peers)
        return found

    @cached_property
    def _ranks(self) -> dict[tuple[int, tuple[int, ...]], int]:
        return {(place.data, tuple(place.peers.values())): rank for rank, place in self._places.items()}


def source_rank(rank: int, live: Keying, saved: Keying, shared: Shared) -> int | None:
    """The saved rank that `rank` continues: the one at its place, or one that had what it would have had.

    Returns:
        None where there was no such rank: its state has to be new.
    """
    place = live.place(rank)
    data = place.data
    if live.data_size != saved.data_size:
        if not shared.by_data:
            return None
        data = 0
    peers = {}
    for name, extent in saved.peers.items():
        index = place.peers.get(name, 0)
        if index >= extent and name not in shared.by_peers:
            return None
        peers[name] = index if index < extent else 0
    return saved.rank_at(data, peers)


def all_places_known(live: Keying, saved: Keying) -> bool:
    """Whether every rank stands where one stood at the save; along a new dimension, peers count as one."""
    return live.data_size == saved.data_size and all(
        live.peers.get(name, 1) <= extent for name, extent in saved.peers.items()
    )


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What a `KeyingComponent` stores; it has more, of no use here."""

    shape: Dims
    dim_names: list[str]
    ranks: RankRuns
    data: list[str]


class KeyingComponent:
    """Remembers how ranks are keyed, as one small replicated value whatever the number of ranks.

    Without mesh roles there is nothing to remember: every rank is a coordinate of its own.
    """

    def __init__(self, roles: MeshRoles) -> None:
        self._roles = roles

    @property
    def prefix(self) -> Path:
        return _PATH

    def capture(self) -> Captured:
        return self._captured

    @cached_property
    def _captured(self) -> Captured:
        keying = Keying.of(self._roles)
        value = {
            "data": list(keying.data),
            "dim_names": list(keying.dim_names),
            "pipeline": list(self._roles.pipeline),
            "ranks": compress_ranks(keying.ranks),
            "shape": list(keying.shape),
        }
        return Captured(values={_PATH: encode_value(value, path=_NAME)}, stock={_PATH: value})

    def targets(self, stored: StoredState) -> Targets:
        return Targets()

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        return []


def live_keying(stored: StoredState, roles: MeshRoles | None) -> Keying:
    """That of the ranks that load.

    Raises:
        ConfigError: the mesh does not hold all of them.
    """
    if roles is None:
        return Keying.by_rank(stored.world_size)
    keying = Keying.of(roles)
    if len(keying.ranks) != stored.world_size:
        raise ConfigError(
            f"the mesh of mesh_roles has {len(keying.ranks)} ranks, and {stored.world_size} take part; "
            "pass the mesh of all ranks"
        )
    return keying


def saved_keying(stored: StoredState) -> Keying:
    """That of the ranks that saved."""
    return stored.keying or Keying.by_rank(stored.saved_world_size)


def take_keying(values: dict[str, Any], world_size: int) -> Keying | None:
    """Take what a `KeyingComponent` has stored out of a checkpoint's values, and decode it.

    It tells whose state is whose and is not itself state that could be asked for, left out or renamed.

    Args:
        values: decoded, by name.
        world_size: the number of ranks that saved.

    Returns:
        None where there is nothing that makes sense; what has the name and is something else stays.
    """
    keying = _decoded(values.get(_NAME), world_size)
    if keying is not None:
        del values[_NAME]
    return keying


def _decoded(value: Any, world_size: int) -> Keying | None:
    try:
        stored = converted(_Stored, value)
    except ValueError:
        return None
    # Before the ranks are listed: a few digits may state very many.
    if ranks_problem(stored.ranks, world_size) or prod(stored.shape) != world_size:
        return None
    ranks = expand_ranks(stored.ranks)
    names, data = stored.dim_names, stored.data
    is_sound = (
        len(ranks) == world_size
        and len(set(names)) == len(names) == len(stored.shape)
        and set(data) <= set(names)
        and len(set(data)) == len(data)
    )
    if not is_sound:
        return None
    return Keying(shape=tuple(stored.shape), dim_names=tuple(names), ranks=ranks, data=tuple(data))
