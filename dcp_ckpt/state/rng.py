"""The random streams of every rank: which one it continues after a load, on whatever world.

Owns that decision. Must be installed last, since installing other components may draw random numbers. Knows
nothing of samplers, which have generators of their own.

A stream is one generator of one kind: Python's, NumPy's, torch's, an accelerator's. Ranks are known by their
data-parallel coordinate (`MeshRoles`; without, every rank is a coordinate of its own) and by their place
among the peers that have the same one. At load:

| data size | the rank's place | streams of the kind at the save | the rank gets |
|---|---|---|---|
| the same | as at the save | however | the very stream of that place, bit for bit |
| the same | new index in a dimension | the same along it | the stream of the first index |
| the same | new index in a dimension | different along it | a new one: step, coordinate, index |
| the same | new dimension | however | the stream of its coordinate; new peers share it |
| another | any | the same on all coordinates | that very stream, of its place among the peers |
| another | any | the same on all peers | a new one: step, coordinate |
| another | any | different along some dimension | a new one: step, coordinate, index in that |
| another | any | of one coordinate only | a new one: step, coordinate |
| any | any | not saved | a new one: step, coordinate |

How streams were shared is found by comparing a few ranks (`_samples`), never all. New streams depend on the
checkpoint alone, so they are the same at every attempt, and on the step, so no two checkpoints give the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.state.component import Captured, Path, StoredState, Targets
from dcp_ckpt.state.generators import live_kinds, read_stream, seed_stream, stream_identity, write_stream
from dcp_ckpt.state.keying import (
    NOTHING_SHARED,
    Keying,
    Shared,
    all_places_known,
    live_keying,
    saved_keying,
    source_rank,
)
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.paths import join_path

__all__ = ["RngComponent"]

_WHAT = "random numbers"


class RngComponent:
    """The global generators of one rank, stored per rank; see the table above.

    A checkpoint of plain `dcp.save` holds no streams of ranks: the generators are left as they are.

    Args:
        roles: which ranks share their data, where it is not "none".
    """

    def __init__(self, prefix: Path = ("rng",), roles: MeshRoles | None = None) -> None:
        self._prefix = prefix
        self._roles = roles

    @property
    def prefix(self) -> Path:
        return self._prefix

    @property
    def _name(self) -> str:
        return join_path(self._prefix)

    def capture(self) -> Captured:
        streams = {kind: read_stream(kind) for kind in live_kinds()}
        return Captured(per_rank={self._prefix: encode_value(streams, path=self._name)})

    def targets(self, stored: StoredState) -> Targets:
        """Say what goes on and what is new.

        Reads all that `install` needs: damage shows before anything is changed.
        """
        if not stored.saved_world_size:
            return Targets()
        plan = self._plan(stored)
        new = plan.told(new=True)
        return Targets(
            values=frozenset({self._name} if any(plan.num_kept.values()) else ()),
            reinitialised={self._name: new} if new else {},
        )

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        if not stored.saved_world_size:
            return [f"{_WHAT}: not restored, plain dcp.save stores none; left as they are"]
        plan = self._plan(stored)
        kept = plan.told(new=False)
        notes = [f"{_WHAT}: {kept}"] if kept else []
        for kind in plan.kinds:
            source = plan.source(kind, stored.rank)
            state = None if source is None else self._saved(stored, source).get(kind)
            if state is None:
                seed_stream(kind, plan.seed(kind, stored.rank, stored.seed_material))
            elif problem := write_stream(kind, state):
                notes.append(f"{_WHAT}: {kind} was not restored, {problem}")
        return notes

    def _saved(self, stored: StoredState, rank: int) -> Mapping[str, Any]:
        """The streams of one saved rank by kind."""
        streams: Mapping[str, Any] = stored.per_rank_of(rank).get(self._name, {})
        return streams

    def _plan(self, stored: StoredState) -> _Plan:
        saved, live = saved_keying(stored), live_keying(stored, self._roles)
        own = source_rank(stored.rank, live, saved, NOTHING_SHARED)
        if own is not None and all_places_known(live, saved):
            return _Plan(
                live=live, saved=saved, shared=dict.fromkeys(self._saved(stored, own), NOTHING_SHARED)
            )
        first = self._saved(stored, saved.rank_at(0, {}))
        others = {
            axis: [self._saved(stored, rank) for rank in ranks] for axis, ranks in _samples(saved).items()
        }
        shared = {}
        for kind, state in first.items():
            same = {
                axis
                for axis, sampled in others.items()
                if all(kind in streams and _is_same(kind, streams[kind], state) for streams in sampled)
            }
            by_peers = frozenset(axis for axis in same if axis is not None)
            shared[kind] = Shared(by_data=None in same, by_peers=by_peers)
        return _Plan(live=live, saved=saved, shared=shared)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which streams go where, for all ranks.

    Args:
        shared: kind -> along what ranks had the same stream; kinds that were not saved are not in it.
    """

    live: Keying
    saved: Keying
    shared: Mapping[str, Shared]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Those that were saved, and those that this process has."""
        return tuple(dict.fromkeys((*self.shared, *live_kinds())))

    def source(self, kind: str, rank: int) -> int | None:
        """The saved rank whose stream a rank continues; None if it begins a new one."""
        shared = self.shared.get(kind)
        return None if shared is None else source_rank(rank, self.live, self.saved, shared)

    def seed(self, kind: str, rank: int, seed_material: str) -> bytes:
        """Of a new stream: the same for two ranks exactly if they shared one, as far as anybody knows."""
        place = self.live.place(rank)
        own = "" if kind in self.shared and self.shared[kind].by_data else place.data
        peers = "".join(f"/{name}={place.peers.get(name, 0)}" for name in self._distinct_peers(kind))
        return hashlib.sha256(f"{seed_material}/{kind}/{own}{peers}".encode()).digest()

    @cached_property
    def num_kept(self) -> Mapping[str, int]:
        """How many ranks continue a saved stream, by kind."""
        return {
            kind: sum(self.source(kind, rank) is not None for rank in self.live.ranks) for kind in self.kinds
        }

    def told(self, *, new: bool) -> str:
        """What becomes of the kinds, over all ranks; empty where every rank simply goes on.

        Args:
            new: of those of which some rank begins a new stream, or of all others.
        """
        outcomes: dict[str, list[str]] = {}
        for kind in self.kinds:
            outcome = self._outcome(kind)
            if outcome is not None and (self.num_kept[kind] < len(self.live.ranks)) == new:
                outcomes.setdefault(outcome, []).append(kind)
        return "; ".join(f"{', '.join(members)} {outcome}" for outcome, members in outcomes.items())

    def _outcome(self, kind: str) -> str | None:
        derived = "derived from step and data coordinate"
        if kind not in self.shared:
            return f"not saved, {derived}"
        if self._distinct_peers(kind):
            derived += f" and index in {', '.join(self._distinct_peers(kind))}"
        num_kept = self.num_kept[kind]
        if not num_kept:
            return derived
        if num_kept < len(self.live.ranks):
            return f"kept on {num_kept} rank(s), on the others {derived}"
        if self.live.data_size != self.saved.data_size:
            return "continued, the same on all data coordinates"
        return None if self.live == self.saved else "kept, by data coordinate"

    def _distinct_peers(self, kind: str) -> list[str]:
        """The dimensions along which the streams of peers differed."""
        shared = self.shared.get(kind)
        return [] if shared is None else [name for name in self.saved.peers if name not in shared.by_peers]


def _samples(saved: Keying) -> dict[str | None, list[int]]:
    """For each axis (None: the data coordinate) the ranks to compare with the one at the first place.

    The second and the last along it: where only some ranks of an axis have the same, as in a program that
    seeds by node or knows no mesh, these two mostly tell.
    """
    found: dict[str | None, list[int]] = {}
    for name, extent in saved.peers.items():
        found[name] = [saved.rank_at(0, {name: index}) for index in sorted({1, extent - 1})]
    if saved.data_size > 1:
        found[None] = [saved.rank_at(index, {}) for index in sorted({1, saved.data_size - 1})]
    return found


def _is_same(kind: str, a: Any, b: Any) -> bool:
    """Whether two states draw the same numbers."""
    one, other = (encode_value(stream_identity(kind, state), path=kind) for state in (a, b))
    return encode_json(one) == encode_json(other)
