"""Which random stream every rank has after a load, on every kind of world: the table of `state.rng`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod

import numpy
import pytest
import torch

from dcp_ckpt import MeshRoles
from dcp_ckpt.state import RngComponent
from dcp_ckpt.state.component import Component
from dcp_ckpt.state.keying import KeyingComponent
from tests.state import in_memory
from tests.state.fake_worlds import Dims, mesh_roles


@pytest.fixture(autouse=True)
def keep_generators():
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])


def seed(value: int) -> None:
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def draw() -> tuple[object, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    )


def test_the_same_world_continues_every_stream():
    seed(1)
    draw()  # leaves half a pair of gaussians behind in every generator
    saved = in_memory.save([RngComponent()])
    expected = draw(), draw()
    seed(2)
    assert in_memory.load(saved, [RngComponent()]) == []
    assert (draw(), draw()) == expected


def test_capture_draws_nothing():
    seed(1)
    expected = draw()
    seed(1)
    RngComponent().capture()
    assert draw() == expected


def told(
    saved: in_memory.InMemory, components: list[Component], *, rank: int = 0, world_size: int = 1
) -> str:
    """What a load tells of random streams: why some are new, and its notes."""
    stored = saved.stored(rank=rank, world_size=world_size)
    new = components[-1].targets(stored).reinitialised.values()
    return "\n".join((*new, *in_memory.load(saved, components, rank=rank, world_size=world_size)))


def test_a_checkpoint_without_streams_derives_them_and_says_so():
    saved = in_memory.InMemory()
    drawn = []
    for start in (1, 2):
        seed(start)
        reason = told(saved, [RngComponent()])
        assert reason == "python, numpy, torch not saved, derived from step and data coordinate"
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_streams_of_a_library_that_is_not_there_at_the_save_are_derived(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "numpy")
    seed(1)
    saved = in_memory.save([RngComponent()])
    monkeypatch.undo()
    expected = torch.rand(2).tolist()
    seed(2)
    assert told(saved, [RngComponent()]) == "numpy not saved, derived from step and data coordinate"
    assert torch.rand(2).tolist() == expected


BY_RANK: Dims = ()


World = tuple[Dims, int]


def world(size: int) -> World:
    """One without mesh roles."""
    return BY_RANK, size


def mesh(**dims: int) -> World:
    return tuple(dims.items()), prod(dims.values())


def all_the_same(index: dict[str, int]) -> int:
    return 7


def all_distinct(index: dict[str, int]) -> int:
    return 1000 + sum(position * (1, 10, 100)[power] for power, position in enumerate(index.values()))


def same_in_tp(index: dict[str, int]) -> int:
    return all_distinct({name: position for name, position in index.items() if name != "tp"})


def same_in_dp(index: dict[str, int]) -> int:
    return all_distinct({name: position for name, position in index.items() if name != "dp"})


Seeds = Callable[[dict[str, int]], int]


def components(roles: MeshRoles | None) -> list[Component]:
    keying: list[Component] = [] if roles is None else [KeyingComponent(roles)]
    return [*keying, RngComponent(roles=roles)]


def save_world(saving: World, seeds: Seeds) -> tuple[in_memory.InMemory, list[float]]:
    """A save of ranks seeded by their mesh indices; also what each would have drawn next from torch."""
    dims, size = saving
    shape = [extent for _, extent in dims] or [size]
    names = [name for name, _ in dims] or ["dp"]
    upcoming = []
    with ExitStack() as stack:
        roles = stack.enter_context(mesh_roles(dims)) if dims else None

        def make(rank: int) -> list[Component]:
            position = map(int, numpy.unravel_index(rank, shape))
            torch.manual_seed(seeds(dict(zip(names, position, strict=True))))
            random.seed(rank)
            return components(roles)

        saved = in_memory.save_ranks(make, size)
        for rank in range(size):
            make(rank)
            upcoming.append(torch.rand(()).item())
    return saved, upcoming


def load_world(saved: in_memory.InMemory, loading: World) -> tuple[list[float], str]:
    """What each rank of another world draws from torch after a load, and what all of them are told."""
    dims, size = loading
    drawn, notes = [], set()
    with ExitStack() as stack:
        roles = stack.enter_context(mesh_roles(dims)) if dims else None
        for rank in range(size):
            seed(rank + 99)
            notes.add(told(saved, components(roles), rank=rank, world_size=size))
            drawn.append(torch.rand(()).item())
            assert in_memory.load(saved, components(roles), rank=rank, world_size=size) is not None
            assert torch.rand(()).item() == drawn[-1], "every attempt of a load gives the same"
    (note,) = notes
    return drawn, note


def labelled(drawn: Sequence[float], upcoming: Sequence[float]) -> list[int | str]:
    """Each rank's stream: the number of the first saved rank that had it, or a letter for a new one."""
    letters: dict[float, str] = {}
    return [
        upcoming.index(value)
        if value in upcoming
        else letters.setdefault(value, chr(ord("a") + len(letters)))
        for value in drawn
    ]


@pytest.mark.parametrize(
    ("before", "after", "seeds", "expected", "says"),
    [
        (world(2), world(2), all_distinct, [0, 1], None),
        (world(2), world(2), all_the_same, [0, 0], None),
        (world(2), world(3), all_distinct, ["a", "b", "c"], "torch derived from step and data coordinate"),
        (world(2), world(3), all_the_same, [0, 0, 0], "torch continued"),
        (world(3), world(1), all_distinct, ["a"], "torch derived"),
        (world(3), world(1), all_the_same, [0], "torch continued"),
        (world(1), world(2), all_the_same, ["a", "b"], "torch derived"),
        (world(4), mesh(dp=2, tp=2), all_distinct, ["a", "a", "b", "b"], "torch derived"),
        (world(4), mesh(dp=4, tp=2), all_distinct, [0, 0, 1, 1, 2, 2, 3, 3], "kept, by data coordinate"),
        (mesh(dp=4, tp=2), world(4), all_distinct, [0, 2, 4, 6], "kept, by data coordinate"),
        (mesh(dp=2, tp=2), mesh(dp=2, tp=2), all_distinct, [0, 1, 2, 3], None),
        (mesh(dp=2, tp=2), mesh(tp=2, dp=2), all_distinct, [0, 2, 1, 3], "kept, by data coordinate"),
        (mesh(dp=2, tp=2), mesh(dp=2, tp=1), all_distinct, [0, 2], "kept, by data coordinate"),
        (mesh(dp=2, tp=2), mesh(dp=2, tp=3), same_in_tp, [0, 0, 0, 2, 2, 2], "kept, by data coordinate"),
        (mesh(dp=2, tp=2), mesh(dp=2, tp=3), all_distinct, [0, 1, "a", 2, 3, "b"], "torch kept on 4 rank(s)"),
        (mesh(dp=2, tp=2), mesh(dp=3, tp=2), same_in_tp, ["a", "a", "b", "b", "c", "c"], "torch derived"),
        (mesh(dp=2, tp=2), mesh(dp=1, tp=2), all_distinct, ["a", "b"], "and index in tp"),
        (mesh(dp=2, tp=2), mesh(dp=3, tp=2), same_in_dp, [0, 1, 0, 1, 0, 1], "torch continued"),
        (mesh(dp=2, tp=2), mesh(dp=3, tp=3), same_in_dp, [0, 1, "a"] * 3, "torch kept on 6 rank(s)"),
        (mesh(dp=2, tp=2), world(4), same_in_tp, ["a", "b", "c", "d"], "torch derived"),
        (
            mesh(pp=2, dp=2, tp=2),
            mesh(pp=2, dp=1, tp=2),
            same_in_tp,
            ["a", "a", "b", "b"],
            "torch derived from step and data coordinate and index in pp",
        ),
    ],
)  # fmt: skip
def test_the_table_of_streams(before, after, seeds, expected, says):
    saved, upcoming = save_world(before, seeds)
    drawn, note = load_world(saved, after)
    assert labelled(drawn, upcoming) == expected
    assert (note == "") if says is None else (says in note)


def test_streams_that_differ_are_not_taken_for_shared_when_some_ranks_have_the_same():
    """A program that knows no mesh: neighbours share, as peers of tensor parallelism do."""
    saved, upcoming = save_world(world(4), lambda index: 5 + index["dp"] // 2)
    drawn, note = load_world(saved, world(2))
    assert labelled(drawn, upcoming) == ["a", "b"]
    assert "torch derived" in note


def test_only_a_few_ranks_are_read_however_many_saved():
    saved, _ = save_world(mesh(dp=64, tp=2), all_distinct)
    read: set[int] = set()
    stored = saved.stored(rank=5, world_size=7)

    def count(rank: int) -> dict[str, object]:
        read.add(rank)
        return dict(saved.stored().per_rank_of(rank))

    object.__setattr__(stored, "per_rank_of", count)
    component = RngComponent()
    component.targets(stored)
    assert 2 <= len(read) <= 5
    before = set(read)
    component.install(stored, component.targets(stored))
    assert read == before, "what install needs has been read before anything is changed"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b"[[0,4]]", b"[[0,3]]"),
        (b"[[0,4]]", b"[[0,100000000000],[0,-99999999996]]"),
        (b"[[0,4]]", b"[[1,4]]"),
        (b"[[0,4]]", b"4"),
        (b"[2,2]", b"[true,4]"),
        (b"[2,2]", b"[2,2,-1,-1]"),
        (b"[2,2]", b"[4]"),
        (b'["dp"]', b"[1]"),
    ],
)
def test_a_keying_that_makes_no_sense_counts_as_none(right, wrong):
    saved, upcoming = save_world(mesh(dp=2, tp=2), all_distinct)
    assert right in saved.values["mesh_roles"]
    saved.values["mesh_roles"] = saved.values["mesh_roles"].replace(right, wrong)
    drawn, _ = load_world(saved, world(4))
    assert labelled(drawn, upcoming) == [0, 1, 2, 3]
