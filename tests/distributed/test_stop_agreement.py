"""All ranks stop at the same call, whoever asks and whenever; until then nothing is sent."""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import CheckpointConfig, Checkpointer, EverySteps
from dcp_ckpt.coordination import SoloChannel, connect
from dcp_ckpt.errors import Fenced
from dcp_ckpt.stopping import agreement as agreement_module
from dcp_ckpt.stopping.agreement import StopAgreement
from tests.distributed import worlds

LAST_CALL = 400


def stop_call(agreement: StopAgreement, *, ask_at: int | None, jitter: random.Random) -> int | None:
    """The first call that says stop; this rank asks right before its call number `ask_at`."""
    for call in range(1, LAST_CALL + 1):
        if call == ask_at:
            agreement.ask("SIGTERM", grace_seconds=10.0)
        if agreement.look() is not None:
            assert agreement.agreed is not None
            return call
        # Ranks drift apart as far as their collectives let them: here by tens of calls.
        for _ in range(jitter.randrange(200)):
            pass
        if call % 40 == 0:
            dist.barrier()
    return None


def agree_on_a_call(askers: dict[int, int], seed: int) -> tuple[int | None, str | None]:
    channel = connect(None, timeout_seconds=30.0)
    try:
        rank = dist.get_rank()
        with StopAgreement(channel, timeout_seconds=20.0) as agreement:
            found = stop_call(agreement, ask_at=askers.get(rank), jitter=random.Random(seed * 10 + rank))
            return found, None if agreement.agreed is None else agreement.agreed.reason
    finally:
        channel.close()


@pytest.mark.parametrize("askers", [{0: 1}, {2: 37}, {1: 100, 3: 102}, {0: 60, 1: 60, 2: 60, 3: 60}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_stop_at_the_same_call(pool, askers, seed):
    results = pool.run(agree_on_a_call, 4, askers, seed)
    assert len(set(results)) == 1, results
    call, reason = results[0]
    assert call is not None
    assert min(askers.values()) <= call
    assert reason == "SIGTERM"


def test_nobody_stops_when_nobody_asks(pool):
    assert pool.run(agree_on_a_call, 3, {}, 1) == [(None, None)] * 3


def ask_at_the_last_call(seed: int) -> bool:
    """One rank asks when others may have closed already; nobody may hang."""
    channel = connect(None, timeout_seconds=30.0)
    try:
        agreement = StopAgreement(channel, timeout_seconds=20.0)
        calls = 30
        rank = dist.get_rank()
        for call in range(1, calls + 1):
            if rank == seed % dist.get_world_size() and call == calls:
                agreement.ask("SIGTERM", grace_seconds=10.0)
            agreement.look()
        started = time.monotonic()
        agreement.close()
        agreement.close()
        return time.monotonic() - started < 10.0
    finally:
        channel.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_wish_that_comes_too_late_holds_nobody_up(pool, seed):
    assert pool.run(ask_at_the_last_call, 3, seed) == [True] * 3


class Counting:
    """A channel that counts what is sent and asked through it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.num_messages = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("put", "get", "get_many"):
            self.num_messages += 1
        return getattr(self._inner, name)


def agree_after_a_late_start(late: int) -> int | None:
    """One rank is silent for longer than a round takes."""
    channel = connect(None, timeout_seconds=60.0)
    try:
        if dist.get_rank() == late:
            # Longer than the round that the others begin; they are held meanwhile.
            threading.Event().wait(agreement_module._ANSWER_SECONDS + 1.0)
        with StopAgreement(channel, timeout_seconds=40.0) as agreement:
            asks = 1 if dist.get_rank() == 1 - late else None
            return stop_call(agreement, ask_at=asks, jitter=random.Random(0))
    finally:
        channel.close()


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_answers_late_stops_with_the_others(pool, late):
    first, second = pool.run(agree_after_a_late_start, 2, late)
    assert first == second
    assert first is not None


def count_messages() -> int:
    channel = connect(None, timeout_seconds=30.0)
    counting = Counting(channel)
    try:
        with StopAgreement(counting, timeout_seconds=20.0) as agreement:
            for _ in range(1000):
                agreement.look()
            return counting.num_messages
    finally:
        channel.close()


def test_a_call_sends_nothing_while_nobody_asks(pool):
    assert pool.run(count_messages, 2) == [0, 0]


def test_one_process_stops_at_its_next_call():
    agreement = StopAgreement(SoloChannel(), timeout_seconds=1.0)
    assert agreement.look() is None
    agreement.ask("time limit", grace_seconds=5.0)
    agreement.ask("SIGTERM", grace_seconds=5.0)
    stop = agreement.look()
    assert stop is not None
    assert (stop.reason, stop.rank) == ("time limit", 0)
    agreement.close()


def threads_left() -> list[str]:
    """Those that do not end by themselves; a connection's thread does so soon after it was told."""
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("dcp_ckpt")]
    for thread in ours:
        thread.join(5.0)
    return sorted(thread.name for thread in ours if thread.is_alive())


def train_until_stopped(path: str, signalled: int, policy: bool) -> dict[str, Any]:
    state = {"weight": torch.zeros(64), "step": 0}
    settings: dict[str, Any] = {"save_when": EverySteps(1000)} if policy else {}
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(path, config=worlds.config(**settings)) as checkpointer:
        checkpointer.load(state)
        for step in range(1, 2000):
            dist.all_reduce(state["weight"])
            state["step"] = step
            if step == 20 and dist.get_rank() == signalled:
                signal.raise_signal(signal.SIGTERM)
            if policy and checkpointer.should_save(step):
                checkpointer.save(state, step=step)
            if checkpointer.should_stop():
                if not policy:
                    checkpointer.save(state, step=step)
                break
        answers = [checkpointer.should_stop() for _ in range(3)]
    return {
        "step": step,
        "reason": checkpointer.stop_reason,
        "answers": answers,
        "given back": signal.getsignal(signal.SIGTERM) is before,
        "threads": threads_left(),
    }


@pytest.mark.parametrize("signalled", [0, 2])
@pytest.mark.parametrize("policy", [True, False], ids=["should_save", "own rule"])
def test_a_signal_to_one_rank_gives_one_final_save(pool, tmp_path, signalled, policy):
    results = pool.run(train_until_stopped, 3, str(tmp_path), signalled, policy)
    assert len({str(result) for result in results}) == 1, results
    step = results[0]["step"]
    assert 20 <= step < 1000
    assert results[0] == {
        "step": step,
        "reason": "SIGTERM",
        "answers": [True] * 3,
        "given back": True,
        "threads": [],
    }
    with Checkpointer(tmp_path) as checkpointer:
        assert [info.step for info in checkpointer.checkpoints()] == [step]


def train_with_a_limit(path: str) -> tuple[int, str | None, list[int]]:
    state = {"weight": torch.zeros(64), "step": 0}
    config = worlds.config(save_when=EverySteps(10_000_000), stop_after_seconds=0.5)
    with Checkpointer(path, config=config) as checkpointer:
        step = 0
        saves = []
        while True:
            step += 1
            dist.all_reduce(state["weight"])
            state["step"] = step
            if checkpointer.should_save(step):
                saves.append(step)
                checkpointer.save(state, step=step)
            if checkpointer.should_stop():
                return step, checkpointer.stop_reason, saves


def test_a_wall_clock_limit_gives_one_final_save(pool, tmp_path):
    results = pool.run(train_with_a_limit, 2, str(tmp_path))
    step = results[0][0]
    assert results == [(step, "time limit", [step])] * 2


def test_whoever_never_asks_to_stop_keeps_saving_and_keeps_its_signals(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    config = CheckpointConfig(save_when=EverySteps(2), stop_after_seconds=0.0, grace_seconds=0.0)
    with Checkpointer(tmp_path, config=config) as checkpointer:
        assert [step for step in range(1, 7) if checkpointer.should_save(step)] == [2, 4, 6]
        assert signal.getsignal(signal.SIGTERM) is before


def test_the_final_save_comes_once_and_the_policy_goes_on_after_it(tmp_path):
    config = CheckpointConfig(save_when=EverySteps(10), stop_after_seconds=0.0, grace_seconds=0.0)
    with Checkpointer(tmp_path, config=config) as checkpointer:
        assert not checkpointer.should_save(1)
        assert not checkpointer.should_stop(), "the answer of the should_save before"
        assert checkpointer.should_save(2), "the final save"
        assert checkpointer.should_stop()
        assert [step for step in range(3, 31) if checkpointer.should_save(step)] == [10, 20, 30]


def test_the_final_decision_about_a_step_stays(tmp_path):
    """Asked once more for the same step, after an evaluation that was broken off."""
    config = CheckpointConfig(save_when=EverySteps(10), stop_after_seconds=0.0, grace_seconds=0.0)
    with Checkpointer(tmp_path, config=config) as checkpointer:
        assert not checkpointer.should_stop() or checkpointer.should_stop()
        assert [checkpointer.should_save(2) for _ in range(3)] == [True] * 3
        assert not checkpointer.should_save(3)


def test_who_is_fenced_is_told_to_stop_and_saves_no_more(tmp_path):
    state = {"weight": torch.zeros(8)}
    config = CheckpointConfig(save_when=EverySteps(5), recover_wait_seconds=0.0, grace_seconds=0.0)
    with Checkpointer(tmp_path, config=config) as old:
        old.save(state, step=1).result(30)
        assert not old.should_stop()
        with Checkpointer(tmp_path, config=config) as new:
            new.load(state)
            handle = old.save(state, step=2)
            handle.wait_done(30)
            assert handle.outcome == "unknown"
            assert not old.should_save(3)
            assert old.should_stop()
            assert old.stop_reason == "taken over"
            new.save(state, step=2).result(30)
        handle.mark_failure_seen()


def test_who_is_fenced_writes_nothing_any_more(tmp_path):
    state = {"weight": torch.zeros(8)}
    config = CheckpointConfig(recover_wait_seconds=0.0, grace_seconds=0.0)
    with Checkpointer(tmp_path, config=config) as old:
        old.save(state, step=1).result(30)
        with Checkpointer(tmp_path, config=config) as new:
            new.load(state)
            first = old.save(state, step=2)
            assert first.wait_done(30)
            before = sorted(path.name for path in tmp_path.rglob("*"))
            second = old.save(state, step=3)
            assert second.wait_done(30)
            assert isinstance(second.error, Fenced)
            assert sorted(path.name for path in tmp_path.rglob("*")) == before
        second.mark_failure_seen()
