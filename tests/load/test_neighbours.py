"""Ranks that read for each other: everything arrives, and whoever ends, fails or stands still is named."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its __all__

from dcp_ckpt.coordination import Channel, StoreChannel
from dcp_ckpt.errors import CheckpointError, CoordinationError
from dcp_ckpt.load import meeting
from dcp_ckpt.load.meeting import meet, stay_alone
from dcp_ckpt.load.neighbours import Neighbours, Slots
from dcp_ckpt.load.ranges import Read
from dcp_ckpt.load.replicas import shares_of

RANKS = (0, 1, 2)
SLOT_BYTES = 5000
NUM_READS = 40
"""Of each rank: many times its slots."""
make_slots = partial(Slots, 2, SLOT_BYTES)


@pytest.fixture
def channels() -> Iterator[list[Channel]]:
    """Three ranks of one host."""
    timeout = timedelta(seconds=20)
    hosted = TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
    stores = [hosted, *(TCPStore("127.0.0.1", hosted.port, None, False, timeout, False) for _ in RANKS[1:])]
    ranks = [
        StoreChannel(store, rank, len(RANKS), host_ranks=RANKS, close_seconds=2.0)
        for rank, store in enumerate(stores)
    ]
    yield list(ranks)
    for channel in reversed(ranks):
        channel.close()


def at_once(channels: list[Channel], act: Callable[[Channel], object]) -> list[object]:
    """What each rank returns, or the CheckpointError that it raises."""

    def caught(channel: Channel) -> object:
        try:
            return act(channel)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(len(channels)) as threads:
        return list(threads.map(caught, channels))


def content(rank: int, number: int) -> bytes:
    return bytes([rank * NUM_READS + number]) * (SLOT_BYTES - number)


def exchange(
    neighbours: Neighbours, *, before_show: Callable[[int], None] = lambda number: None
) -> dict[tuple[int, int], bytes]:
    """Show all reads of this rank and take those of the others."""
    own = neighbours.ranks[neighbours.index]
    taken: dict[tuple[int, int], bytes] = {}
    neighbours.start(
        dict.fromkeys(neighbours.ranks, NUM_READS),
        lambda number, data: taken.update({(data[0] // NUM_READS, number): bytes(data)}),
    )
    try:
        for number in range(NUM_READS):
            data = content(own, number)
            slot, memory = neighbours.borrow(len(data))
            memory[:] = data
            before_show(number)
            neighbours.show(slot, number, len(data))
            neighbours.give_back(slot)
        neighbours.finish()
    except BaseException as error:
        neighbours.fail(error)
        raise
    return taken


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_memories() -> int:
    """Shared memories of loads that this process holds by a descriptor."""
    gc.collect()
    with os.scandir("/proc/self/fd") as entries:
        return sum(
            "memfd:dcp_ckpt-load" in os.readlink(entry.path) for entry in entries if entry.is_symlink()
        )


def test_everything_shown_reaches_everyone(channels: list[Channel]) -> None:
    before = open_descriptors()

    def act(channel: Channel) -> dict[tuple[int, int], bytes]:
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=10)
        assert neighbours is not None
        with neighbours:
            assert neighbours.ranks == RANKS
            return exchange(neighbours)

    for rank, taken in enumerate(at_once(channels, act)):
        assert taken == {
            (other, number): content(other, number)
            for other in RANKS
            if other != rank
            for number in range(NUM_READS)
        }
    assert open_descriptors() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dcp_ckpt-from")]


def test_only_ranks_that_want_the_same_meet(channels: list[Channel]) -> None:
    def act(channel: Channel) -> tuple[int, ...]:
        wants = "same" if channel.rank != 1 else "other"
        neighbours = meet(channel, "a", wants, make_slots, timeout_seconds=10)
        if neighbours is None:
            return ()
        with neighbours:
            return neighbours.ranks

    assert at_once(channels, act) == [(0, 2), (), (0, 2)]


def test_a_rank_that_stays_alone_holds_nobody_up(channels: list[Channel]) -> None:
    def act(channel: Channel) -> tuple[int, ...]:
        if channel.rank == 0:
            stay_alone(channel, "a")
            return ()
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=10)
        assert neighbours is not None
        with neighbours:
            return neighbours.ranks

    assert at_once(channels, act) == [(), (1, 2), (1, 2)]


def test_a_rank_that_does_not_come_is_named(channels: list[Channel]) -> None:
    def act(channel: Channel) -> object:
        return None if channel.rank == 1 else meet(channel, "a", "same", make_slots, timeout_seconds=0.5)

    first, _, last = at_once(channels, act)
    for error in (first, last):
        assert isinstance(error, CoordinationError)
        assert "rank(s) 1 did not begin to read within" in str(error)


def test_a_rank_that_fails_ends_the_load_of_all_at_once(channels: list[Channel]) -> None:
    started = time.monotonic()

    def act(channel: Channel) -> object:
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=60)
        assert neighbours is not None

        def fail(number: int) -> None:
            if channel.rank == 1 and number == 7:
                raise CheckpointError("the disk burns")

        with neighbours:
            return exchange(neighbours, before_show=fail)

    first, own, last = at_once(channels, act)
    assert "the disk burns" in str(own)
    for error in (first, last):
        assert isinstance(error, CoordinationError)
        assert "has ended or failed while it read together" in str(error)
    assert time.monotonic() - started < 30, "nobody waits for a deadline"


def test_a_copy_that_fails_on_a_thread_fails_the_load(channels: list[Channel]) -> None:
    def act(channel: Channel) -> None:
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=60)
        assert neighbours is not None

        def take(number: int, data: memoryview) -> None:
            if channel.rank == 2 and number == 3:
                raise CheckpointError("no device")

        with neighbours:
            neighbours.start({0: 5, 1: 0, 2: 0}, take)
            try:
                for number in range(5 if channel.rank == 0 else 0):
                    slot, _ = neighbours.borrow(1)
                    neighbours.show(slot, number, 1)
                    neighbours.give_back(slot)
                neighbours.finish()
            except BaseException as error:
                neighbours.fail(error)
                raise

    *_, last = at_once(channels, act)
    assert "no device" in str(last)


def test_what_failed_here_is_told_rather_than_what_came_of_it(channels: list[Channel]) -> None:
    """Its own failure hangs up, and whoever shows something then finds the others gone."""
    has_hung_up = threading.Event()

    def act(channel: Channel) -> object:
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=60)
        assert neighbours is not None

        def take(number: int, data: memoryview) -> None:
            raise CheckpointError("no memory")

        def show_late() -> None:
            slot, _ = neighbours.borrow(1)
            assert has_hung_up.wait(30)
            neighbours.show(slot, 0, 1)

        with neighbours:
            if channel.rank == 2:
                neighbours.start({0: 1, 1: 1, 2: 1}, take)
                show_late()
            return exchange(neighbours)

    real = Neighbours.fail

    def fail(self: Neighbours, error: BaseException) -> None:
        real(self, error)
        if self.index == 2:
            has_hung_up.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Neighbours, "fail", fail)
        *_, last = at_once(channels, act)
    assert "no memory" in str(last)


@pytest.mark.parametrize("late", [1, 2])
def test_a_rank_that_ends_while_they_meet_ends_the_load_of_all_at_once(
    channels: list[Channel], monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    """Also that of a rank which waits only for one that is refused by the ended one."""
    started = time.monotonic()
    has_ended = threading.Event()
    real_connect, real_greet = meeting._connect, meeting._greet

    def connect(rank: int, *arguments: Any) -> Any:
        assert rank != late or has_ended.wait(30)
        return real_connect(rank, *arguments)

    def greet(connection: socket.socket, rank: int, slots: Slots) -> None:
        if rank == 0:
            raise BrokenPipeError
        real_greet(connection, rank, slots)

    def act(channel: Channel) -> object:
        try:
            return meet(channel, "a", "same", make_slots, timeout_seconds=60)
        finally:
            if channel.rank == 0:
                has_ended.set()

    monkeypatch.setattr(meeting, "_connect", connect)
    monkeypatch.setattr(meeting, "_greet", greet)
    assert {type(error) for error in at_once(channels, act)} == {CoordinationError}
    assert time.monotonic() - started < 30, "nobody waits for a deadline"
    assert open_memories() == 0, "what came with a greeting is closed"


def test_a_rank_without_memory_to_share_reads_alone_and_holds_nobody_up(channels: list[Channel]) -> None:
    def too_large(**settings: Any) -> Slots:
        return Slots(1, 1 << 62)  # no file may be as large

    def act(channel: Channel) -> tuple[int, ...]:
        make = too_large if channel.rank == 0 else make_slots
        neighbours = meet(channel, "a", "same", make, timeout_seconds=60)
        if neighbours is None:
            return ()
        with neighbours:
            return neighbours.ranks

    assert at_once(channels, act) == [(), (1, 2), (1, 2)]
    assert open_memories() == 0


def test_a_rank_that_stands_still_is_named(channels: list[Channel]) -> None:
    may_go = threading.Event()

    def act(channel: Channel) -> object:
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=1.0 if channel.rank else 60.0)
        assert neighbours is not None
        with neighbours:
            if channel.rank == 0:  # takes nothing, and shows nothing
                may_go.wait(30)
                return None
            try:
                return exchange(neighbours)
            finally:
                may_go.set()

    _, *others = at_once(channels, act)
    for error in others:
        assert isinstance(error, CoordinationError)
    assert any("rank(s) 0 did not go on with the load for 1 s" in str(error) for error in others), others


def test_strangers_at_the_door_are_not_let_in(channels: list[Channel], monkeypatch) -> None:
    """Abstract names are for all users of the host to see."""
    called = threading.Event()
    real = socket.socket.accept

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        found = real(self)
        called.set()
        return found

    monkeypatch.setattr(socket.socket, "accept", accept)
    monkeypatch.setattr("dcp_ckpt.load.meeting.os.geteuid", lambda: os.getuid() + 1)

    def act(channel: Channel) -> object:
        neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=1.0)
        assert neighbours is not None
        with neighbours:
            return neighbours.ranks

    for error in at_once(channels, act):
        assert isinstance(error, CoordinationError)
    assert called.is_set()


_KILLED = """
import os, signal, sys
from datetime import timedelta
from functools import partial
from torch.distributed import TCPStore
from dcp_ckpt.coordination import StoreChannel
from dcp_ckpt.load.meeting import meet
from dcp_ckpt.load.neighbours import Slots
store = TCPStore("127.0.0.1", int(sys.argv[1]), None, False, timedelta(seconds=20), False)
channel = StoreChannel(store, 1, 2, host_ranks=(0, 1), close_seconds=1.0)
neighbours = meet(channel, "a", "same", partial(Slots, 2, 5000), timeout_seconds=60)
neighbours.start({0: 40, 1: 40}, lambda number, data: os.kill(os.getpid(), signal.SIGKILL))
signal.pause()
"""


def test_a_rank_that_is_killed_is_noticed_at_once() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    channel = StoreChannel(store, 0, 2, host_ranks=(0, 1), close_seconds=0.1)
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(store.port)]) as other:
        try:
            neighbours = meet(channel, "a", "same", make_slots, timeout_seconds=60)
            assert neighbours is not None
            started = time.monotonic()
            with neighbours, pytest.raises(CoordinationError, match="rank 1 has ended or failed"):
                exchange(neighbours)
            assert time.monotonic() - started < 20
        finally:
            other.kill()
            channel.close()
    assert other.returncode == -signal.SIGKILL


@pytest.mark.parametrize("sizes", [[], [1], [4] * 16, [4, 4, 1, 1, 1, 9, 2], [1, 1, 100, 1]])
@pytest.mark.parametrize("num_members", [1, 2, 3, 8])
def test_shares_are_runs_of_about_the_same_size(sizes: list[int], num_members: int) -> None:
    reads = [Read(rank=0, file=0, start=0, stop=size, num_bytes=size, pieces=()) for size in sizes]
    shares = shares_of(reads, num_members)
    assert len(shares) == num_members
    assert [number for share in shares for number in share] == list(range(len(reads)))
    fair = sum(sizes) / num_members
    assert all(sum(sizes[number] for number in share) <= fair + max(sizes, default=0) for share in shares)
