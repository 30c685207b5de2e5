"""The channel and one verdict for all ranks: two ranks as threads over a real store."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its __all__

from dcp_ckpt import errors
from dcp_ckpt.coordination import (
    MISSING,
    Channel,
    Failures,
    SoloChannel,
    StoreChannel,
    agree,
    as_checkpoint_error,
    broadcast,
    error_fields,
    error_from_fields,
    failures_from,
    first_failures,
    reduce,
)
from dcp_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    LoadError,
    SaveFailed,
    StorageError,
    StorageFull,
)

Result = TypeVar("Result")
WAIT = 20.0


@pytest.fixture
def channels() -> Iterator[list[StoreChannel]]:
    """Two ranks of one world."""
    timeout = timedelta(seconds=WAIT)
    hosted = TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
    joined = TCPStore("127.0.0.1", hosted.port, None, False, timeout, wait_for_workers=False)
    ranks = [
        StoreChannel(store, rank, 2, host_ranks=(0, 1), close_seconds=2.0)
        for rank, store in enumerate((hosted, joined))
    ]
    yield ranks
    for channel in reversed(ranks):
        channel.close()


def on_all(channels: list[StoreChannel], act: Callable[[StoreChannel], Result]) -> list[Result]:
    """What every rank returns, or the error it raises, as a result."""
    with ThreadPoolExecutor(len(channels)) as threads:
        return list(threads.map(act, channels))


def error_of(act: Callable[[], Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        act()
    return caught.value


def refuse(rank: int) -> None:
    raise StorageFull(f"rank {rank} has no space", path="/somewhere", errno=28)


def test_messages_go_from_rank_to_rank_and_can_be_forgotten(channels):
    first, second = channels
    first.put("key", {"list": [1, None, "x"]})
    assert second.get("key", timeout_seconds=WAIT) == {"list": [1, None, "x"]}
    assert second.get_many(["key", "absent"], timeout_seconds=0.01) == [{"list": [1, None, "x"]}, MISSING]
    first.forget(["key"])
    with pytest.raises(TimeoutError, match="key"):
        second.get("key", timeout_seconds=0.01)


def test_a_clone_is_the_same_channel(channels):
    first, second = channels
    clone = second.clone()
    clone.put("key", 1)
    clone.close()
    assert (clone.rank, clone.world_size) == (1, 2)
    assert first.get("key", timeout_seconds=WAIT) == 1


def test_a_closed_channel_refuses(channels):
    on_all(channels, lambda channel: channel.close())
    for channel in channels:
        with pytest.raises(CoordinationError, match="closed"):
            channel.put("key", 1)


def test_a_signal_handler_runs_while_a_rank_waits(channels):
    """The wait is in C++; it has to come back now and then for Python to see the signal."""
    started = time.monotonic()
    handled: list[float] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: handled.append(time.monotonic() - started))
    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR2))
    try:
        alarm.start()
        with pytest.raises(TimeoutError):
            channels[1].get("absent", timeout_seconds=2.5)
    finally:
        alarm.join()
        signal.signal(signal.SIGUSR2, before)
    assert time.monotonic() - started >= 2.4
    assert handled
    assert handled[0] < 1.5


def test_what_rank_0_decides_all_ranks_get(channels):
    def ask(channel: Channel) -> dict[str, int]:
        return broadcast(channel, "tag", lambda: {"rank": channel.rank}, timeout_seconds=WAIT)

    assert on_all(channels, ask) == [{"rank": 0}] * 2


def test_what_rank_0_raises_all_ranks_get(channels):
    def ask(channel: Channel) -> CheckpointError:
        return error_of(lambda: broadcast(channel, "tag", lambda: refuse(0), timeout_seconds=WAIT))

    for error in on_all(channels, ask):
        assert isinstance(error, StorageFull)
        assert (error.message, error.rank, error.errno) == ("rank 0 has no space", 0, 28)


def test_a_rank_0_that_does_not_answer_is_named(channels):
    error = error_of(lambda: broadcast(channels[1], "tag", lambda: 1, timeout_seconds=0.05))
    assert isinstance(error, CoordinationError)
    assert "rank 0 did not answer within" in str(error)


def test_rank_0_combines_what_all_ranks_say_and_all_get_only_that(channels):
    def tell(channel: Channel) -> int:
        return reduce(channel, "tag", {"number": channel.rank + 1}, _sum, timeout_seconds=WAIT)

    assert on_all(channels, tell) == [3, 3]
    assert channels[1].get("tag/all", timeout_seconds=WAIT) == {"result": 3}


def _sum(messages: list[dict[str, int]]) -> int:
    return sum(message["number"] for message in messages)


def test_a_rank_that_does_not_answer_is_named(channels):
    error = error_of(lambda: reduce(channels[0], "tag", 1, sum, timeout_seconds=0.05))
    assert "rank(s) 1 did not answer within" in str(error)


def test_a_failure_of_one_rank_is_told_to_all_and_the_next_call_meets_no_old_message(channels):
    def act(channel: Channel, tag: str, bad: int) -> tuple[str | None, Failures]:
        return agree(
            channel,
            tag,
            lambda: refuse(channel.rank) if channel.rank == bad else f"done by {channel.rank}",
            timeout_seconds=WAIT,
        )

    results = on_all(channels, lambda channel: act(channel, "first", 1))
    assert [result for result, _ in results] == ["done by 0", None]
    for _, failures in results:
        assert failures
        assert [(type(failure), failure.rank) for failure in failures.errors] == [(StorageFull, 1)]
        with pytest.raises(StorageFull, match="rank 1 has no space"):
            failures.raise_first()
    results = on_all(channels, lambda channel: act(channel, "second", -1))
    assert results == [("done by 0", Failures()), ("done by 1", Failures())]


def told_of(errors: Sequence[CheckpointError | None]) -> dict[str, Any]:
    return first_failures([None if error is None else error_fields(error) for error in errors])


def test_the_first_failure_says_how_many_there_are():
    Failures().raise_first()
    failures = failures_from(told_of([None, SaveFailed("a"), StorageFull("b"), SaveFailed("c")]))
    with pytest.raises(SaveFailed, match=r"^a \(and 2 more ranks failed\)"):
        failures.raise_first()
    failures = failures_from(told_of([SaveFailed("a"), StorageFull("b"), None]))
    with pytest.raises(StorageFull, match=r"^b \(and 1 more ranks failed\)"):
        failures.raise_first(rather=StorageError)
    with pytest.raises(SaveFailed, match=r"^d$"):
        failures_from(told_of([SaveFailed("d")])).raise_first(rather=StorageError)


def test_why_is_raised_rather_than_who():
    told = told_of([CoordinationError("rank 1 has ended"), StorageFull("no space"), None])
    with pytest.raises(StorageFull, match=r"^no space \(and 1 more ranks failed\)"):
        failures_from(told).raise_first(rather=LoadError)
    with pytest.raises(CoordinationError, match="has ended"):
        failures_from(told_of([None, CoordinationError("rank 0 has ended")])).raise_first(rather=LoadError)


def test_what_is_told_of_failures_does_not_grow_with_the_ranks():
    few, many = (
        told_of([SaveFailed("a", rank=1), StorageFull("b", rank=2)] * number) for number in (1, 1000)
    )
    assert many == {**few, "num_ranks": 2000}


def test_what_is_not_ours_is_wrapped_and_keeps_its_rank():
    wrapped = as_checkpoint_error(KeyboardInterrupt(), rank=3)
    assert (type(wrapped), wrapped.rank) == (CheckpointError, 3)
    assert "KeyboardInterrupt" in wrapped.message
    own = SaveFailed("mine", rank=1)
    assert as_checkpoint_error(own, rank=3) is own
    assert own.rank == 1


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_crosses_ranks_as_it_is(name):
    kind = getattr(errors, name)
    error = kind("what", rank=1, step=2, phase="write", path="/a", errno=5)
    again = error_from_fields(error_fields(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_a_single_process_is_a_world_of_its_own():
    channel = SoloChannel()
    assert reduce(channel, "tag", "me", "".join, timeout_seconds=0.1) == "me"
    assert broadcast(channel, "other", lambda: 5, timeout_seconds=0.1) == 5
    assert channel.get_many(["tag/0", "absent"], timeout_seconds=0.1) == ["me", MISSING]
    channel.forget(["tag/0", "absent"])
    with pytest.raises(TimeoutError):
        channel.get("tag/0", timeout_seconds=0.1)
    assert channel.clone() is channel
