"""What parts of a model have in common, what they lack, and what is refused: by name, and with the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcp_ckpt import TrainState, load_checkpoint, open_checkpoint, verify
from tests.layouts import states
from tests.layouts.models import same_bits

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def refused(pool, tmp_path_factory) -> dict[str, str]:
    """Why states of four ranks, two for each stage, cannot be saved; all ranks say the same."""
    first: dict[str, str]
    first, *others = pool.run(states.save_wrong, 4, str(tmp_path_factory.mktemp("wrong")))
    assert others == [first] * 3
    return first


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("other_learning_rate", ["optimizer.param_groups[0].lr differs between rank 0 and rank 2"]),
        ("drifted_within_a_stage", ["ranks 2, 3 differs from rank 2's: model.own1.bias", "rank 3"]),
        ("drifted_on_all_ranks", ["all ranks differs from rank 0's: extra.note", "rank 1", "per_rank"]),
        ("undeclared", ["model.both.bias is described by rank 0 and by rank 2", "MeshRoles"]),
        (
            "tied_to_the_name_of_another_stage",
            ["model.own1.bias is described by rank 0 and by rank 2", "MeshRoles"],
        ),
        ("declared_and_different", ["rank 0's: model.both.bias, model.both.weight", "rank 2"]),
        ("a_partial_sum", ["extra.sum", "Partial", "redistribute"]),
        ("without_roles", ["differs from rank 0's: model.own0.bias", "TrainState(mesh_roles=...)"]),
    ],
)
def test_what_is_refused_is_named(refused, state, words):
    assert refused[state].startswith(("SaveFailed", "StateError"))
    assert [word for word in words if word not in refused[state]] == []


@pytest.fixture(scope="module")
def right(pool, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("right"))
    pool.run(states.save_right, 4, path)
    return path


def test_parts_with_things_in_common_and_parts_that_lack_some_come_back(pool, right):
    assert pool.run(states.load_right, 4, right, "step-00000002") == [[]] * 4
    assert pool.run(states.load_right, 2, right, states.STEP) == [[]] * 2


@pytest.mark.parametrize("name", ["one_embedding", "one_sharded_embedding"])
def test_what_stages_share_is_stored_once_and_loads_into_the_whole_model(right, name):
    step = f"{right}/{name}/{states.STEP}"
    assert verify(step).ok
    loaded, right_one = trained_whole(seed=1), trained_whole(seed=0)
    load_checkpoint(step, loaded)
    found, expected = states.tensors_of(loaded), states.tensors_of(right_one)
    assert [key for key in found if not same_bits(found[key], expected[key])] == []
    with open_checkpoint(step) as checkpoint:
        (group,) = checkpoint.read_value("optimizer.param_groups")
        assert sorted(group["params"]) == sorted(name for name, _ in loaded.model.named_parameters())
        stored = sum(len(checkpoint.fragment(rank).chunks) for rank in range(4))
    num_shards = 2 if "sharded" in name else 1
    # Weight, bias and two moments of each are sharded, the two step counters are not.
    assert stored == 3 * (6 * num_shards + 2)


def trained_whole(seed: int) -> Any:
    model = states.Part("own0", "own1", "both", seed=seed)
    optimizer = states.stepped(torch.optim.AdamW(model.parameters(), lr=states.RATE))
    return TrainState(model=model, optimizer=optimizer, rng=False)


def test_a_pipelined_load_says_what_no_stage_has_and_what_one_lacks(pool, tmp_path):
    results = pool.run(states.load_unfit, 2, str(tmp_path))
    assert results[0] == results[1]
    (left_over, is_untouched), (lacking, is_still) = results[0]["more"], results[0]["less"]
    assert is_untouched
    assert is_still
    assert left_over.startswith("StateMismatch")
    assert "model.over.*: 2 unexpected (bias, weight)" in left_over
    assert "model.own" not in left_over
    assert "optimizer.state.over.*: 2 unexpected (bias, weight)" in left_over, "parameters without state, too"
    assert lacking.startswith("StateMismatch")
    assert "model.own1.weight: the model has it, the checkpoint does not (rank 1)" in lacking


def test_a_tensor_beyond_the_saving_group_is_refused(pool, tmp_path):
    found = pool.run(states.save_outside, 4, str(tmp_path))
    assert "spread is sharded over rank(s) [2, 3] outside of the process group" in found[0]
    assert found[0] == found[1]
