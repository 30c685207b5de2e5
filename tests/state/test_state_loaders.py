"""Loaders of two kinds: one position for all ranks, or one of every rank's own, and what fits where."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from dcp_ckpt.data import ElasticSampler
from dcp_ckpt.state.component import Component, Problem
from dcp_ckpt.state.keying import KeyingComponent
from dcp_ckpt.state.loaders import loader_component
from tests.state import in_memory
from tests.state.fake_worlds import Dims, mesh_roles


class Stream:
    """A loader that knows its own position only."""

    def __init__(self, position: int = -1) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Shared(Stream):
    """One that says of itself that its position is that of all ranks."""

    is_elastic = True


def component(loader: Any, roles: Any = None) -> Component:
    return loader_component(("dataloader",), loader, roles)


def save_streams(dims: Dims, size: int) -> in_memory.InMemory:
    """Every rank's loader stands at the number of the rank."""
    with ExitStack() as stack:
        roles = stack.enter_context(mesh_roles(dims)) if dims else None

        def make(rank: int) -> list[Component]:
            keying: list[Component] = [] if roles is None else [KeyingComponent(roles)]
            return [*keying, component(Stream(rank), roles)]

        return in_memory.save_ranks(make, size)


def load_streams(saved: in_memory.InMemory, dims: Dims, size: int) -> tuple[list[int], list[Problem]]:
    positions, problems = [], []
    with ExitStack() as stack:
        roles = stack.enter_context(mesh_roles(dims)) if dims else None
        for rank in range(size):
            stream = Stream()
            found = in_memory.problems_of(saved, [component(stream, roles)], rank=rank, world_size=size)
            problems += found
            if not found:
                in_memory.load(saved, [component(stream, roles)], rank=rank, world_size=size)
                positions.append(stream.position)
    return positions, problems


GRID: Dims = (("dp", 2), ("tp", 2))


@pytest.mark.parametrize(
    ("before", "size", "after", "new_size", "expected"),
    [
        ((), 3, (), 3, [0, 1, 2]),
        (GRID, 4, GRID, 4, [0, 1, 2, 3]),
        (GRID, 4, (("dp", 2),), 2, [0, 2]),
        (GRID, 4, (("dp", 2), ("tp", 3)), 6, [0, 1, 0, 2, 3, 2]),
        ((), 2, GRID, 4, [0, 0, 1, 1]),
    ],
)
def test_a_position_of_its_own_follows_the_data_coordinate(before, size, after, new_size, expected):
    assert load_streams(save_streams(before, size), after, new_size) == (expected, [])


@pytest.mark.parametrize(
    ("before", "size", "after", "new_size", "counts"),
    [
        ((), 2, (), 3, "of 2 data-parallel rank(s), and there are 3 here; load on 2"),
        ((), 4, GRID, 4, "of 4 data-parallel rank(s), and there are 2 here; load on 4"),
        (GRID, 4, (("dp", 1), ("tp", 4)), 4, "of 2 data-parallel rank(s), and there are 1 here"),
    ],
)
def test_a_position_of_its_own_is_refused_with_advice_where_the_data_size_differs(
    before, size, after, new_size, counts
):
    positions, problems = load_streams(save_streams(before, size), after, new_size)
    assert positions == []
    assert len(problems) == new_size
    for problem in problems:
        assert (problem.kind, problem.key) == ("other", "dataloader")
        assert counts in problem.detail
        assert 'exclude=("dataloader",)' in problem.detail
        assert "dcp_ckpt.data.ElasticLoader" in problem.detail


def test_what_says_that_it_is_elastic_is_stored_once_and_loads_anywhere():
    saved = in_memory.save([component(Shared(5))], world_size=4)
    assert saved.names == {"dataloader"}
    assert saved.per_rank == {}
    live = Shared()
    assert in_memory.load(saved, [component(live)], rank=1, world_size=3) == []
    assert live.position == 5


def test_the_two_kinds_do_not_load_into_each_other():
    elastic = in_memory.save([component(ElasticSampler(10, 2, 0, 1, seed=0))])
    (problem,) = in_memory.problems_of(elastic, [component(Stream())])
    assert "the position of an elastic loader, and Stream keeps one of its own" in problem.detail
    own = save_streams((), 1)
    (problem,) = in_memory.problems_of(own, [component(ElasticSampler(10, 2, 0, 1, seed=0))])
    assert "a position of every rank's own, and ElasticSampler has one for all" in problem.detail


def test_a_checkpoint_without_a_position_lacks_it():
    empty = in_memory.InMemory()
    for loader in (Stream(), Shared()):
        (problem,) = in_memory.problems_of(empty, [component(loader)])
        assert (problem.kind, problem.key) == ("missing", "dataloader")
    of_no_ranks = in_memory.InMemory(world_size=0)
    (problem,) = in_memory.problems_of(of_no_ranks, [component(Stream())])
    assert problem.kind == "missing"


def test_another_dataset_is_found_before_anything_is_changed():
    saved = in_memory.save([component(ElasticSampler(10, 2, 0, 1, seed=0, fingerprint="a"))])
    for other in (ElasticSampler(11, 2, 0, 1, seed=0), ElasticSampler(10, 2, 0, 1, seed=0, fingerprint="b")):
        (problem,) = in_memory.problems_of(saved, [component(other)])
        assert (problem.kind, problem.key) == ("other", "dataloader")
        assert "use the same data" in problem.detail
    told = ElasticSampler(11, 2, 0, 1, seed=0, allow_other_dataset=True)
    assert in_memory.problems_of(saved, [component(told)]) == []
