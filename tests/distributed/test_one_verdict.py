"""A failure of any rank is every rank's failure, names its cause, and leaves the next save unharmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer
from dcp_ckpt.save.handle import SaveHandle
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

Outcome = tuple[str, str]


def good() -> dict[str, Any]:
    return {"shared": torch.arange(100), "value": 1}


def spoil(how: str) -> dict[str, Any]:
    """This rank's state, wrong on rank 2."""
    state = good()
    if dist.get_rank() == 2:
        if how == "tensor":
            state["shared"][5] = -1
        elif how == "value":
            state["value"] = 2
        elif how == "sparse":
            state["shared"] = torch.eye(3).to_sparse()
        elif how == "key":
            state["more"] = torch.zeros(2)
        elif how == "alias":
            state["more"] = state["shared"]
        elif how == "shape":
            state["shared"] = torch.arange(99)
        elif how == "type":
            state["value"] = object()
    return state


def told(handle: SaveHandle) -> Outcome:
    return worlds.outcome(lambda: handle.result(30))


def save_spoiled_then_good(path: str, how: str) -> tuple[Outcome, Outcome, str]:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        handle = checkpointer.save(spoil(how), step=1)
        bad = told(handle)
        after = told(checkpointer.save(good(), step=1))
    return bad, after, handle.outcome


@pytest.mark.parametrize(
    ("how", "kind", "named"),
    [
        ("tensor", "SaveFailed", ("shared", "rank 2", "step 1")),
        ("value", "SaveFailed", ("value", "rank 2", "step 1")),
        ("sparse", "StateError", ("shared", "rank 2", "step 1", "sparse")),
        ("key", "SaveFailed", ("more", "rank 2", "step 1")),
        ("alias", "SaveFailed", ("more", "rank 2", "step 1")),
        ("shape", "SaveFailed", ("shared", "rank 2", "step 1")),
        ("type", "StateError", ("value", "rank 2", "step 1", "object")),
    ],
)
def test_state_that_is_wrong_on_one_rank_fails_all_by_name(pool, tmp_path, how, kind, named):
    results = pool.run(save_spoiled_then_good, 4, str(tmp_path), how)
    (bad, after, outcome) = results[0]
    assert all(result == results[0] for result in results)
    assert bad[0] == kind
    for part in named:
        assert part in bad[1]
    assert outcome == "failed"
    assert after == ("ok", ""), "the same step may be tried again"


def save_other_step(path: str) -> tuple[Outcome, Outcome]:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        bad = told(checkpointer.save(good(), step=7 if dist.get_rank() == 1 else 5))
        after = told(checkpointer.save(good(), step=8))
    return bad, after


def test_other_step_on_one_rank_fails_all_and_names_both(pool, tmp_path):
    for bad, after in pool.run(save_other_step, 3, str(tmp_path)):
        assert bad[0] == "CoordinationError"
        assert "step=7" in bad[1]
        assert "step=5" in bad[1]
        assert "rank 1" in bad[1]
        assert after == ("ok", "")


def save_without(path: str, silent: int) -> tuple[Outcome, bool]:
    """One rank never calls save(); returns what the others are told, and whether a manifest appeared."""
    rank = dist.get_rank()
    with Checkpointer(path, config=worlds.config(timeout_seconds=3.0)) as checkpointer:
        checkpointer.load(good())
        result = ("ok", "")
        if rank != silent:
            result = worlds.outcome(lambda: checkpointer.save(good(), step=1).result(30))
        dist.barrier()
    return result, any(Path(path).glob("step-*/manifest.json"))


@pytest.mark.parametrize("silent", [0, 2])
def test_rank_that_never_saves_is_named_within_the_deadline(pool, tmp_path, silent):
    results = pool.run(save_without, 3, str(tmp_path), silent, timeout_seconds=20)
    assert not any(committed for _, committed in results)
    for rank, (bad, _) in enumerate(results):
        if rank != silent:
            assert bad[0] in ("SaveFailed", "CoordinationError")
            assert f"rank {silent}" in bad[1] or f"rank(s) {silent}" in bad[1]


def raise_at_next_call(path: str) -> tuple[Outcome, Outcome, list[str]]:
    with Checkpointer(path, config=worlds.config(on_failure="raise")) as checkpointer:
        handle = checkpointer.save(spoil("value"), step=1)
        checkpointer.wait()
        second = worlds.outcome(lambda: checkpointer.save(good(), step=2))
        third = told(checkpointer.save(good(), step=2))
        steps = [str(info.step) for info in checkpointer.checkpoints()]
    return second, third, [handle.outcome, *steps]


def test_on_failure_raise_surfaces_at_the_same_call_on_all_ranks(pool, tmp_path):
    for second, third, found in pool.run(raise_at_next_call, 3, str(tmp_path)):
        assert second[0] == "SaveFailed"
        assert "value" in second[1]
        assert "rank 2" in second[1]
        assert third == ("ok", ""), "a failure is told once"
        assert found == ["failed", "2"]


def close_after_failure(path: str, read: bool) -> Outcome:
    checkpointer = Checkpointer(path, config=worlds.config())
    handle = checkpointer.save(spoil("value"), step=1)
    if read:
        told(handle)
    result = worlds.outcome(checkpointer.close)
    checkpointer.close()
    return result


@pytest.mark.parametrize("read", [True, False], ids=["read", "unread"])
def test_close_raises_a_failure_that_nobody_was_told(pool, tmp_path, read):
    for kind, message in pool.run(close_after_failure, 3, str(tmp_path), read):
        assert kind == ("ok" if read else "SaveFailed")
        assert read or "rank 2" in message


def save_steps(path: str, steps: list[int]) -> list[Outcome]:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        return [told_at_once(checkpointer, step) for step in steps]


def told_at_once(checkpointer: Checkpointer, step: int) -> Outcome:
    return worlds.outcome(lambda: checkpointer.save(good(), step=step).result(30))


def load_then_save(path: str, step: int) -> Outcome:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.load(good())
        return worlds.outcome(lambda: checkpointer.save(good(), step=step).result(30))


def test_steps_only_grow_and_are_never_replaced(pool, tmp_path):
    for results in pool.run(save_steps, 2, str(tmp_path), [4, 4, 3, 5]):
        assert [kind for kind, _ in results] == ["ok", "StepAlreadySaved", "StepAlreadySaved", "ok"]
        assert "step 4" in results[1][1]
        assert "step 3" in results[2][1]
    for kind, message in pool.run(load_then_save, 2, str(tmp_path), 5):
        assert kind == "StepAlreadySaved"
        assert "step 5" in message
    assert pool.run(load_then_save, 2, str(tmp_path), 6) == [("ok", "")] * 2


class Late:
    """State whose reading takes rank 1 until rank 0 has been through its next call of save()."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            store = dist.distributed_c10d._get_default_store()
            store.wait(["rank 0 went on"])
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def save_twice_while_rank_1_is_late(path: str) -> tuple[str, str, Outcome, list[int]]:
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    with Checkpointer(path, config=worlds.config(when_busy="skip")) as checkpointer:
        checkpointer.load(good())
        first = checkpointer.save({"late": Late(rank)}, step=1)
        second = checkpointer.save(good(), step=2)
        if rank == 0:
            store.set("rank 0 went on", "")
        result = told(second)
        checkpointer.wait(30)
        return first.outcome, second.outcome, result, [info.step for info in checkpointer.checkpoints()]


def test_busy_save_is_skipped_on_all_ranks(pool, tmp_path):
    for first, second, (kind, message), steps in pool.run(save_twice_while_rank_1_is_late, 3, str(tmp_path)):
        assert (first, second) == ("committed", "skipped")
        assert kind == "SaveFailed"
        assert "skipped" in message
        assert steps == [1]
