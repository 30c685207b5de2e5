"""The position in the data: one for all ranks, or one of every rank's own.

Owns telling the two kinds of loaders apart, and on which worlds each continues. Knows loaders by their
`state_dict()` only; called by TrainState.
"""

from __future__ import annotations

from typing import Any, Protocol

from dcp_ckpt.state.component import Captured, Component, Path, Problem, StoredState, Targets
from dcp_ckpt.state.keying import Shared, live_keying, saved_keying, source_rank
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.paths import join_path, names_under
from dcp_ckpt.state.per_rank import Inliner
from dcp_ckpt.state.problems import missing
from dcp_ckpt.state.rebuild import attach_tensors, rebuild
from dcp_ckpt.state.stateful import Stateful, StatefulComponent, load_into

__all__ = ["Elastic", "loader_component"]


class Elastic(Stateful, Protocol):
    """A loader or sampler whose state is equal on all ranks and continues on any number of them.

    What has a true `is_elastic` is taken for one.
    """

    is_elastic: bool

    def state_problem(self, state: Any) -> str | None:
        """Why `load_state_dict` would refuse a state, or None. Changes nothing; need not be there."""
        ...


def loader_component(prefix: Path, loader: Stateful, roles: MeshRoles | None) -> Component:
    """The component of a loader, by its kind."""
    if getattr(loader, "is_elastic", False):
        return ElasticLoaderComponent(prefix, loader)
    return RankLoaderComponent(prefix, loader, roles)


class ElasticLoaderComponent(StatefulComponent):
    """An elastic loader: its state is equal on all ranks. One that does not fit is found by the diff."""

    def targets(self, stored: StoredState) -> Targets:
        targets = super().targets(stored)
        problem = self._problem(stored, targets)
        return targets if problem is None else Targets(problems=(problem,))

    def _problem(self, stored: StoredState, targets: Targets) -> Problem | None:
        name, kind = join_path(self._prefix), type(self._stateful).__qualname__
        if targets.problems:
            if not stored.saved_world_size or name not in stored.per_rank_of(0):
                return None
            detail = (
                f"the checkpoint holds a position of every rank's own, and {kind} has one for all ranks; use "
                f'the loader that saved it, or exclude=("{name}",) to start anew'
            )
            return Problem(kind="other", key=name, detail=detail)
        judge = getattr(self._stateful, "state_problem", None)
        if judge is None or targets.tensors:
            return None
        refusal = judge(rebuild(stored, targets, targets.values, depth=len(self._prefix)))
        return None if refusal is None else Problem(kind="other", key=name, detail=refusal)


class RankLoaderComponent:
    """A data loader with a state of its own on every rank, such as torchdata's StatefulDataLoader.

    Such a state is the position in the part of the data that one of N ranks reads. So it fits wherever the
    data-parallel size is N, and every rank gets that of its coordinate; elsewhere it is refused.
    """

    def __init__(self, prefix: Path, loader: Stateful, roles: MeshRoles | None = None) -> None:
        self._prefix = prefix
        self._loader = loader
        self._roles = roles

    @property
    def prefix(self) -> Path:
        return self._prefix

    @property
    def _name(self) -> str:
        return join_path(self._prefix)

    def capture(self) -> Captured:
        """Encode the loader's state.

        Raises:
            StateError: it holds something that cannot be stored exactly.
        """
        return Captured(
            per_rank={self._prefix: Inliner(self._name).encode(self._prefix, self._loader.state_dict())}
        )

    def targets(self, stored: StoredState) -> Targets:
        problem = self._problem(stored)
        return Targets(values=frozenset({self._name})) if problem is None else Targets(problems=(problem,))

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        if self._problem(stored) is None:
            source = self._source(stored)
            assert source is not None, "it would be a problem"
            state = attach_tensors(stored.per_rank_of(source)[self._name], {})
            load_into(self._loader, state, self._name)
        return []

    def _problem(self, stored: StoredState) -> Problem | None:
        kind = type(self._loader).__qualname__
        if names_under(stored.values, self._prefix):
            detail = (
                f"the checkpoint holds the position of an elastic loader, and {kind} keeps one of its own on "
                f'every rank; use an elastic one again, or exclude=("{self._name}",) to start anew'
            )
            return Problem(kind="other", key=self._name, detail=detail)
        if not stored.saved_world_size:
            return missing(self._name)
        source = self._source(stored)
        if source is None:
            saved, live = saved_keying(stored).data_size, live_keying(stored, self._roles).data_size
            detail = (
                f"{kind} keeps a position of its own on every rank: these are of {saved} data-parallel "
                f'rank(s), and there are {live} here; load on {saved}, exclude=("{self._name}",) to start '
                "anew, or train with dcp_ckpt.data.ElasticLoader, which continues on any number"
            )
            return Problem(kind="other", key=self._name, detail=detail)
        return None if self._name in stored.per_rank_of(source) else missing(self._name)

    def _source(self, stored: StoredState) -> int | None:
        saved, live = saved_keying(stored), live_keying(stored, self._roles)
        # Peers read the same data, so new ones get what those of their coordinate had.
        peers_share = Shared(by_data=False, by_peers=frozenset(saved.peers))
        return source_rank(stored.rank, live, saved, peers_share)
