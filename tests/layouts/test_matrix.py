"""Every parallel layout saves, and loads into any other: the same bits as in one process that never saved."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from dcp_ckpt import open_checkpoint, plan_load, verify
from dcp_ckpt.dcp import Reader
from dcp_ckpt.testing.ranks import RankPool
from tests.layouts.models import Layout, Model, known, same_bits
from tests.layouts.programs import STEP, load_all, save_all
from tests.layouts.training import MOMENTS, UNTOUCHED, VALUES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

LAYOUTS = (
    "alone", "ddp1", "fsdp1",
    "ddp2", "fsdp2", "rep2.fsdp1", "tp2", "pp2", "efsdp1.ep2",
    "ddp3", "fsdp3", "tp3", "pp3",
    "ddp4", "fsdp4", "rep2.fsdp2", "tp4", "sp4", "ddp2.tp2", "fsdp2.tp2", "fsdp2.sp2", "rep2.fsdp1.tp2",
    "efsdp2.ep2", "pp4", "pp2.ddp2", "pp2.fsdp2", "pp2.tp2",
)  # fmt: skip
HUBS = ("fsdp3", "pp2.fsdp2")
NUM_OTHERS = 10

WORLDS = {
    world: [layout for layout in LAYOUTS if Layout(layout).world_size == world] for world in (1, 2, 3, 4)
}

Pair = tuple[str, str]


def sampled_pairs() -> set[Pair]:
    """Each layout with itself, with both hubs in both directions, and some more."""
    pairs = {(layout, layout) for layout in LAYOUTS}
    for hub, layout in itertools.product(HUBS, LAYOUTS):
        pairs |= {(hub, layout), (layout, hub)}
    others = sorted({*itertools.product(LAYOUTS, LAYOUTS)} - pairs)
    return pairs | {*random.Random(0).sample(others, NUM_OTHERS)}


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Path:
    """The same training state, saved in every layout."""
    base = tmp_path_factory.mktemp("layouts")
    for world, layouts in WORLDS.items():
        pool.run(save_all, world, str(base), layouts, timeout_seconds=100)
    return Path(base)


def require_equal(pool, saved: Path, world: int, pairs: Sequence[Pair]) -> None:
    for rank, found in enumerate(pool.run(load_all, world, str(saved), pairs, timeout_seconds=100)):
        assert list(found) == list(pairs)
        wrong = {pair: names for pair, names in found.items() if names}
        assert (rank, wrong) == (rank, {})


@pytest.mark.parametrize("world", WORLDS)
def test_layouts_load_into_each_other(pool, saved, world):
    pairs = sorted(pair for pair in sampled_pairs() if pair[1] in WORLDS[world])
    require_equal(pool, saved, world, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", LAYOUTS)
def test_every_layout_loads_into_every_other(pool, saved, loaded):
    require_equal(pool, saved, Layout(loaded).world_size, [(layout, loaded) for layout in LAYOUTS])


EIGHT = ("rep2.fsdp2.tp2", "pp2.fsdp2.sp2", "pp2.rep2.fsdp2", "efsdp2.ep4")


@pytest.mark.slow
def test_three_dimensions_on_eight_ranks(tmp_path):
    with RankPool(8) as pool:
        pool.run(save_all, 8, str(tmp_path), EIGHT, timeout_seconds=100)
        pairs = [*itertools.product(EIGHT, EIGHT)]
        for found in pool.run(load_all, 8, str(tmp_path), pairs, timeout_seconds=100):
            assert {pair: names for pair, names in found.items() if names} == {}
        (alone,) = pool.run(load_all, 1, str(tmp_path), [(layout, "alone") for layout in EIGHT])
        assert not any(alone.values())


def whole_tensors() -> dict[str, torch.Tensor]:
    """What one process holds, by stored name."""
    model = Model()
    found = {
        f"model.{name}": known(name, "parameter", tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, parameter in model.named_parameters():
        if name != UNTOUCHED:
            found[f"optimizer.state.{name}.step"] = known(name, "step", torch.zeros(()))
            found |= {f"optimizer.state.{name}.{kind}": known(name, kind, parameter) for kind in MOMENTS}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_stored_does_not_depend_on_the_layout(saved, layout):
    step = saved / layout / STEP
    assert verify(step).ok
    right = whole_tensors()
    with open_checkpoint(step) as checkpoint:
        assert set(checkpoint.tensors) == set(right)
        for name, tensor in right.items():
            assert same_bits(checkpoint.read_tensor(name), tensor), name
        groups = checkpoint.read_value("optimizer.param_groups")
        assert [group["lr"] for group in groups] == [0.125, 0.125]
        assert [set(group["params"]) for group in groups] == parameter_groups(Model())
        assert [len(group["params"]) for group in groups] == [
            len(group) for group in parameter_groups(Model())
        ]
        assert checkpoint.read_value("lr_scheduler")["last_epoch"] == 3
        assert {name: checkpoint.read_value(f"extra.{name}") for name in VALUES} == VALUES
        assert plan_load(checkpoint, 1).needed_bytes == sum(tensor.nbytes for tensor in right.values())


def parameter_groups(model: nn.Module) -> list[set[str]]:
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return [matrices, {name for name, _ in model.named_parameters()} - matrices]


@pytest.mark.parametrize("layout", ["pp3", "pp2.fsdp2", "ddp2.tp2"])
def test_stock_readers_find_every_tensor(saved, layout):
    right = whole_tensors()
    state = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
    stock_load(state, checkpoint_id=str(saved / layout / STEP), no_dist=True)
    assert [name for name, tensor in right.items() if not same_bits(state[name], tensor)] == []


@pytest.mark.parametrize("layout", ["pp3", "ddp2.tp2"])
def test_our_reader_gives_stock_dcp_whole_groups_of_a_pipeline(saved, layout):
    state: dict[str, Any] = {"optimizer.param_groups": 0}
    stock_load(state, storage_reader=Reader(saved / layout / STEP), no_dist=True)
    assert [set(group["params"]) for group in state["optimizer.param_groups"]] == parameter_groups(Model())
