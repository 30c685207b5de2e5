"""What goes wrong on one rank only: every rank learns of it, and all go on together."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer, verify
from tests.distributed import worlds
from tests.failing_calls import failing

pytestmark = pytest.mark.distributed

Outcome = tuple[str, str]


def good() -> dict[str, Any]:
    return {"shared": torch.arange(10), "value": 1}


def store() -> Any:
    return dist.distributed_c10d._get_default_store()


def told(checkpointer: Checkpointer, state: Any, step: int) -> Outcome:
    return worlds.outcome(lambda: checkpointer.save(state, step=step).result(30))


def save_and_load_wrong_state(path: str, bad: int) -> list[Outcome]:
    """One rank passes what is no state at all."""
    state: Any = [] if dist.get_rank() == bad else good()
    with Checkpointer(path, config=worlds.config(timeout_seconds=10.0)) as checkpointer:
        return [
            told(checkpointer, state, 1),
            told(checkpointer, good(), 1),
            worlds.outcome(lambda: checkpointer.load(state)),
            worlds.outcome(lambda: checkpointer.load(good())),
            told(checkpointer, good(), 2),
        ]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_state_that_is_none_on_one_rank_fails_on_all(pool, tmp_path, bad):
    for results in pool.run(save_and_load_wrong_state, 2, str(tmp_path), bad):
        assert [kind for kind, _ in results] == ["ConfigError", "ok", "ConfigError", "ok", "ok"]
        for _, message in (results[0], results[2]):
            assert "must be a TrainState or a dict" in message
            assert f"rank {bad}" in message
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [1, 2]


class Interrupted:
    """Somebody presses Ctrl-C while its state is asked for."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def interrupt_one(path: str) -> tuple[str, Outcome]:
    how = ""
    with Checkpointer(path, config=worlds.config(timeout_seconds=10.0)) as checkpointer:
        state = {"object": Interrupted()} if dist.get_rank() == 1 else good()
        try:
            how = worlds.outcome(lambda: checkpointer.save(state, step=1).result(30))[1]
        except KeyboardInterrupt:
            how = "interrupted"
        return how, told(checkpointer, good(), 2)


def test_an_interrupt_of_one_rank_is_told_to_the_others(pool, tmp_path):
    (first, after_first), (second, after_second) = pool.run(interrupt_one, 2, str(tmp_path))
    assert "KeyboardInterrupt" in first
    assert "rank 1" in first
    assert second == "interrupted"
    assert after_first == after_second == ("ok", "")


class Slow:
    """State of rank 1 that is ready once rank 0 has given the save up."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            store().wait(["given up"])
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def save_slowly(path: str) -> Outcome:
    # Rank 1's own patience is longer, so that its writer does finish.
    config = worlds.config(timeout_seconds=1.5 if dist.get_rank() == 0 else 30.0)
    with Checkpointer(path, config=config) as checkpointer:
        checkpointer.load(good())
        result = told(checkpointer, {**good(), "slow": Slow()}, 1)
        if dist.get_rank() == 0:
            store().set("given up", "")
        dist.barrier()
    return result


def test_a_save_that_was_reported_as_failed_is_never_completed(pool, tmp_path):
    for kind, message in pool.run(save_slowly, 2, str(tmp_path), timeout_seconds=25):
        assert kind == "SaveFailed"
        assert "rank(s) 1 did not finish the save in time" in message
    step = tmp_path / "step-00000001"
    assert list(step.glob("rank-00001.*.json")), "the late rank did write its part"
    assert not list(step.glob("rank-00000.*.json"))
    with Checkpointer(tmp_path, config=worlds.config()) as checkpointer:
        assert checkpointer.load(good()) is None
        assert checkpointer.latest() is None


def start_twice(path: str) -> list[Outcome]:
    with Checkpointer(path, config=worlds.config(timeout_seconds=10.0)) as checkpointer:
        pattern = "*/epochs/.*.json.*" if dist.get_rank() == 0 else "nothing"
        with failing("open", pattern, errno.ESTALE):
            first = worlds.outcome(lambda: checkpointer.load(good()))
        return [first, worlds.outcome(lambda: checkpointer.load(good())), told(checkpointer, good(), 1)]


def test_a_start_that_failed_on_rank_0_can_be_repeated_by_all(pool, tmp_path):
    for results in pool.run(start_twice, 2, str(tmp_path)):
        assert [kind for kind, _ in results] == ["StorageTransient", "ok", "ok"]


def wait_for_rank_0_with_a_signal(path: str) -> float:
    """How long after the signal rank 1's handler ran, while it waited for rank 0 in `save`."""
    rank = dist.get_rank()
    handled: list[float] = []

    def handle(*_: object) -> None:
        handled.append(time.monotonic())

    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.load(good())
        dist.barrier()
        if rank == 0:
            store().wait(["handler may have run"])
            checkpointer.save(good(), step=1).result(30)
            return 0.0
        before = signal.signal(signal.SIGUSR2, handle)
        sent = time.monotonic() + 0.3
        shared = store().clone()
        alarm = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
        # Rank 0 comes long after the signal, whether it was handled or not.
        release = threading.Timer(3.0, shared.set, ("handler may have run", ""))
        try:
            alarm.start()
            release.start()
            checkpointer.save(good(), step=1).result(30)
        finally:
            alarm.join()
            release.join()
            signal.signal(signal.SIGUSR2, before)
        return handled[0] - sent


def test_a_signal_is_handled_while_a_rank_waits_for_rank_0(pool, tmp_path):
    _, delay = pool.run(wait_for_rank_0_with_a_signal, 2, str(tmp_path))
    assert delay < 1.5


class Refusing:
    """State that one rank does not take back."""

    def __init__(self) -> None:
        self.refuses = False

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.refuses:
            raise RuntimeError("not today")


def load_refused_by_one(path: str) -> list[Outcome]:
    picky = Refusing()
    state = {**good(), "picky": picky}
    with Checkpointer(path, config=worlds.config(timeout_seconds=10.0)) as checkpointer:
        results = [told(checkpointer, state, 1)]
        picky.refuses = dist.get_rank() == 1
        results.append(worlds.outcome(lambda: checkpointer.load(state)))
        results.append(told(checkpointer, state, 2))
        picky.refuses = False
        results.append(worlds.outcome(lambda: checkpointer.load(state)))
        results.append(told(checkpointer, state, 2))
    return results


def test_a_mixture_on_one_rank_is_saved_by_none(pool, tmp_path: Path):
    for results in pool.run(load_refused_by_one, 2, str(tmp_path)):
        assert [kind for kind, _ in results] == ["ok", "LoadError", "SaveFailed", "ok", "ok"]
        for _, message in results[1:3]:
            assert "mixture" in message
        assert "rank 1" in results[1][1]
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [1, 2]
