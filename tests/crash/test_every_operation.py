"""A whole save, a retention pass, a recovery and a start meet a failure at every single operation.

At each system call of a local disk the process ends, or the call fails, or only its answer is lost.
At each operation of the storage protocol likewise, on a disk, in memory and on an object store. Then the next
start meets what is there. Failures that a process survives are followed by another save in the same epoch.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from dcp_ckpt.errors import CheckpointError, StorageError, StorageTransient
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.storage.objects.lease import LeaseTimes
from dcp_ckpt.storage.objects.opening import open_object_storage
from dcp_ckpt.testing.faults import FaultyStorage
from dcp_ckpt.testing.interposition import SystemCall, interposed, watched_calls
from tests.crash.next_start import require_next_start
from tests.crash.owner import Fact, Owner
from tests.crash.situations import SITUATIONS

OPERATIONS_MAX = 400
NUM_SAMPLES = 2
KINDS = ("local", "memory", "objects")

Ending = Literal["ends", "refused", "unanswered"]
ENDINGS: tuple[Ending, ...] = ("ends", "refused", "unanswered")


class ProcessEnded(BaseException):
    """No `Exception`: nobody lives on to handle it."""


@dataclass(kw_only=True)
class Failing:
    """What goes wrong, and when: operations count while it is armed.

    Args:
        number: of the operation, from 1. All later ones fail too where the process ends.
        goes_on: whoever survives the failure saves again; else it dies right after what it told.
    """

    ending: Ending
    number: int
    goes_on: bool
    armed: bool = False
    count: int = field(default=0, init=False)

    def strike(self) -> bool:
        """Whether this operation fails."""
        self.count += self.armed
        if self.ending == "ends":
            return self.armed and self.count >= self.number
        return self.armed and self.count == self.number

    def at_operation(self, _: int, operation: str, key: str) -> Exception | None:
        """As `FaultyStorage` asks."""
        if not self.strike():
            return None
        if self.ending == "ends":
            raise ProcessEnded
        kind = StorageError if self.ending == "refused" else StorageTransient
        return kind(f"{operation} fails on purpose", path=key)


@dataclass(kw_only=True)
class FailingCall(Failing):
    """The same at system calls below `root`, before or after they are made."""

    root: str
    after: bool

    def __call__(self, call: SystemCall) -> None:
        is_below = any(f"{path}/".startswith(f"{self.root}/") for path in call.paths)
        if call.after != self.after or not is_below or not self.strike():
            return
        if self.ending == "ends":
            raise ProcessEnded
        raise OSError(errno.EIO, os.strerror(errno.EIO), call.paths[-1])


def run_into(name: str, storage: Storage, failing: Failing, seen: Path, clean: Storage) -> None:
    """Prepare, act until the failure, save again where that can be, and start anew.

    Args:
        storage: where `failing` strikes.
        clean: the same place without failures.
    """
    situation, facts = SITUATIONS[name], list[Fact]()
    owner = situation.prepare(storage, facts.append)
    try:
        failing.armed = True
        with suppress(ProcessEnded, CheckpointError):
            owner = situation.act(storage, owner, facts.append) or owner
        failing.armed = failing.ending == "ends"
        if owner is not None and failing.goes_on:
            require_another_save(owner, facts)
    finally:
        failing.armed = False
        if owner is not None:
            owner.die()
    require_next_start(clean, facts, seen)


def require_another_save(owner: Owner, facts: list[Fact]) -> None:
    """The owner lives on: a step that failed can be saved, one without an answer is there or can be."""
    is_unknown = any(fact.kind == "unknown" for fact in facts)
    outcome = owner.save_next()
    assert outcome == "committed" or (is_unknown and outcome == "failed"), outcome


def numbers_of(count: Callable[[int], int], *, seed: str, every: bool) -> Iterator[int]:
    """Each operation's number and one more, or a sample of them.

    Args:
        count: runs without a failure that comes; tells how many operations there are.
    """
    last = count(OPERATIONS_MAX)
    assert 5 < last < OPERATIONS_MAX, "nothing was watched, or there is no end"
    numbers = range(1, last + 1)
    yield from numbers if every else random.Random(seed).sample(numbers, min(NUM_SAMPLES, last))


def ways_on(ending: Ending, number: int, *, every: bool) -> list[bool]:
    """Whether the process saves again after a failure: both ways, or one of them in a sample."""
    if ending == "ends":
        return [False]
    return [False, True] if every else [number % 2 == 0]


def cut_system_calls(directory: Path, name: str, ending: Ending, *, after: bool, every: bool) -> None:
    def run(number: int, goes_on: bool = False) -> int:
        place = directory / f"{number}{goes_on}"
        root = place / "run"
        failing = FailingCall(ending=ending, number=number, goes_on=goes_on, root=str(root), after=after)
        storage = LocalStorage(root, calls=watched_calls())
        try:
            with interposed(failing):
                run_into(name, storage, failing, place / "seen", LocalStorage(root))
        except BaseException as failure:
            failure.add_note(f"{ending} at system call {number}, {'after' if after else 'before'} it")
            raise
        shutil.rmtree(place)
        return failing.count

    for number in numbers_of(run, seed=f"{name}{ending}{after}", every=every):
        for goes_on in ways_on(ending, number, every=every):
            run(number, goes_on)


def cut_operations(
    directory: Path, name: str, kind: str, endings: Sequence[Ending], *, answer_lost: bool, every: bool
) -> None:
    def run(number: int, ending: Ending = "ends", goes_on: bool = False) -> int:
        place = directory / f"{ending}{number}{goes_on}"
        failing = Failing(ending=ending, number=number, goes_on=goes_on)
        try:
            with closing(open_kind(kind, place / "run")) as clean:
                storage = FaultyStorage(clean, failing.at_operation, answer_lost=answer_lost)
                run_into(name, storage, failing, place / "seen", clean)
                clean.delete([info.key for info in clean.list("")])
        except BaseException as failure:
            failure.add_note(f"{ending} at operation {number}, {'after' if answer_lost else 'before'} it")
            raise
        shutil.rmtree(place, ignore_errors=True)
        return failing.count

    for number in numbers_of(run, seed=f"{name}{kind}{answer_lost}", every=every):
        for ending in endings:
            for goes_on in ways_on(ending, number, every=every):
                run(number, ending, goes_on)


_PLACES = itertools.count()


def open_kind(kind: str, root: Path) -> Storage:
    if kind == "local":
        return LocalStorage(root)
    if kind == "memory":
        return MemoryStorage()
    # Nobody waits for the lease of a process that has ended.
    times = LeaseTimes(renew_seconds=60.0, expire_seconds=0.0)
    return open_object_storage(f"memory://every-operation/{next(_PLACES)}", lease_times=times)


AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


@AFTER
@pytest.mark.parametrize("ending", ["ends", "refused"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_sample_of_system_calls_may_fail(fast: Path, name: str, ending: Ending, after: bool) -> None:
    cut_system_calls(fast, name, ending, after=after, every=False)


@pytest.mark.crash
@pytest.mark.timeout(600)
@AFTER
@pytest.mark.parametrize("ending", ["ends", "refused"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_system_call_may_fail(fast: Path, name: str, ending: Ending, after: bool) -> None:
    cut_system_calls(fast, name, ending, after=after, every=True)


@AFTER
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_sample_of_operations_may_fail(fast: Path, name: str, kind: str, after: bool) -> None:
    cut_operations(fast, name, kind, ENDINGS, answer_lost=after, every=False)


@pytest.mark.crash
@pytest.mark.timeout(600)
@AFTER
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_operation_may_fail(fast: Path, name: str, kind: str, ending: Ending, after: bool) -> None:
    cut_operations(fast, name, kind, [ending], answer_lost=after, every=True)
