"""Values of single ranks: exact, small tensors included, and whose they are on another world."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.state import PerRankComponent
from dcp_ckpt.state.component import Component
from dcp_ckpt.state.keying import KeyingComponent
from dcp_ckpt.state.per_rank import INLINE_BYTES_MAX
from tests.state import in_memory
from tests.state.fake_worlds import Dims, mesh_roles


class Box:
    """An object that keeps what it is given."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        assert self.state is not None
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def component(mapping: dict[str, Any], roles: Any = None) -> PerRankComponent:
    return PerRankComponent(("per_rank",), mapping, roles)


def test_values_come_back_on_the_same_world():
    source = {"seen": [1, 2], "array": numpy.arange(3), "box": Box({"count": {4: 5}})}
    live: dict[str, Any] = {"seen": [], "array": None, "box": Box()}
    seen = live["seen"]
    saved = in_memory.save([component(source)], world_size=2)
    assert in_memory.load(saved, [component(live)], world_size=2) == []
    assert seen == [1, 2]
    assert live["seen"] is seen
    assert live["array"].tolist() == [0, 1, 2]
    assert live["box"].state == {"count": {4: 5}}


def test_keys_on_one_side_only_are_problems():
    saved = in_memory.save([component({"a": 1})])
    found = in_memory.problems_of(saved, [component({"b": 1})])
    assert {(p.kind, p.key) for p in found} == {("missing", "per_rank.b"), ("unexpected", "per_rank.a")}


def of_every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        data = torch.randint(0, 2 if name == "bool" else 256, (6 * dtype.itemsize,), generator=generator)
        tensors[name] = data.to(torch.uint8).view(dtype).reshape(2, 3)
    return tensors


def awkward() -> dict[str, torch.Tensor]:
    return {
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3, dtype=torch.float8_e5m2),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "expanded": torch.arange(3.0).expand(2, 3),
        "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "generator": torch.Generator().manual_seed(7).get_state(),
    }


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    plain = tensor.detach().resolve_conj().contiguous()
    return plain.dtype, tuple(plain.shape), plain.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("make", [of_every_dtype, awkward], ids=lambda make: make.__name__)
def test_small_tensors_come_back_bit_for_bit_wherever_they_stand(make):
    tensors = make()
    source = {**tensors, "nested": {"in": [(tensor,) for tensor in tensors.values()]}, "box": Box(tensors)}
    saved = in_memory.save([component(source)])
    live: dict[str, Any] = {**{name: torch.zeros_like(t).clone() for name, t in tensors.items()}}
    before = dict(live)
    live |= {"nested": None, "box": Box()}
    in_memory.load(saved, [component(live)])
    for name, tensor in tensors.items():
        assert bits(live[name]) == bits(tensor), name
        assert live[name] is before[name], "filled in place"
    for (loaded,), tensor in zip(live["nested"]["in"], tensors.values(), strict=True):
        assert bits(loaded) == bits(tensor)
    assert {name: bits(tensor) for name, tensor in live["box"].state.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }


def test_a_captured_tensor_is_a_copy():
    tensor = torch.ones(2)
    saved = in_memory.save([component({"t": tensor})])
    tensor.zero_()
    live = {"t": torch.zeros(2)}
    in_memory.load(saved, [component(live)])
    assert live["t"].tolist() == [1.0, 1.0]


def test_another_shape_or_dtype_is_a_problem_and_changes_nothing():
    saved = in_memory.save([component({"shape": torch.ones(2), "dtype": torch.ones(2), "value": 5})])
    live = {"shape": torch.zeros(3), "dtype": torch.zeros(2, dtype=torch.bfloat16), "value": torch.zeros(1)}
    found = in_memory.problems_of(saved, [component(live)])
    assert {(p.kind, p.key) for p in found} == {
        ("shape", "per_rank.shape"),
        ("dtype", "per_rank.dtype"),
        ("other", "per_rank.value"),
    }


def test_what_is_not_small_or_not_plain_is_refused_with_advice():
    half = torch.zeros(INLINE_BYTES_MAX // 2, dtype=torch.uint8)
    component({"a": half, "b": [half]}).capture()
    with pytest.raises(StateError, match=r"per_rank\.b\.1: up to here, .* DTensors.*extra"):
        component({"a": half, "b": [half, torch.zeros(1)]}).capture()
    with pytest.raises(StateError, match=r"per_rank\.x\.0 cannot be stored: it is sparse"):
        component({"x": [torch.eye(2).to_sparse()]}).capture()
    with mesh_roles((("dp", 2),)):
        mesh = DeviceMesh("cpu", [0, 1])
        sharded = DTensor.from_local(torch.ones(1), mesh, [Replicate()])
        with pytest.raises(StateError, match=r"per_rank\.x is a DTensor.*extra"):
            component({"x": sharded}).capture()


def moved(before: Dims, size: int, after: Dims, new_size: int) -> tuple[list[Any], str]:
    """What each rank of the second world has, where each of the first had its number; and the note."""
    found, told = [], set()
    with ExitStack() as stack:
        roles = stack.enter_context(mesh_roles(before)) if before else None

        def make(rank: int) -> list[Component]:
            keying: list[Component] = [] if roles is None else [KeyingComponent(roles)]
            return [*keying, component({"mine": rank}, roles)]

        saved = in_memory.save_ranks(make, size)
    with ExitStack() as stack:
        roles = stack.enter_context(mesh_roles(after)) if after else None
        for rank in range(new_size):
            live: dict[str, Any] = {"mine": "untouched"}
            told.add("".join(in_memory.load(saved, [component(live, roles)], rank=rank, world_size=new_size)))
            found.append(live["mine"])
    (note,) = told
    return found, note


GRID: Dims = (("dp", 2), ("tp", 2))


@pytest.mark.parametrize(
    ("before", "size", "after", "new_size", "expected", "told"),
    [
        ((), 2, (), 2, [0, 1], ""),
        ((), 2, (), 3, None, "saved on 2 rank(s), loaded on 3; left untouched"),
        ((), 3, (), 2, None, "left untouched"),
        (GRID, 4, GRID, 4, [0, 1, 2, 3], ""),
        (GRID, 4, (("tp", 2), ("dp", 2)), 4, [0, 2, 1, 3], "taken from the ranks at the same places"),
        (GRID, 4, (("dp", 2),), 2, [0, 2], "taken from the ranks at the same places"),
        (GRID, 4, (("dp", 2), ("tp", 3)), 6, None, "left untouched"),
        ((("dp", 4),), 4, (("dp", 4), ("tp", 2)), 8, None, "left untouched"),
        (GRID, 4, (("dp", 4),), 4, [0, 1, 2, 3], "same places"),
        (GRID, 4, (("dp", 3), ("tp", 2)), 6, None, "left untouched"),
    ],
)
def test_whose_values_are_whose(before, size, after, new_size, expected, told):
    found, note = moved(before, size, after, new_size)
    assert found == (expected or ["untouched"] * new_size)
    assert (told in note) if told else note == ""


def test_a_checkpoint_without_ranks_leaves_them_untouched():
    saved = in_memory.InMemory(world_size=0)
    live = {"mine": 1}
    (note,) = in_memory.load(saved, [component(live)])
    assert "plain dcp.save stores nothing of single ranks" in note
    assert live == {"mine": 1}
