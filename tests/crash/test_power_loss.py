"""The power fails at any moment and takes what was not synced: nothing that was told is lost.

Each operation runs once on a real file system and is recorded; then every moment of it is looked at with
several kinds of loss. The trees to start from are made in memory where that can be.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.interposition import SystemCall, watched_calls
from dcp_ckpt.testing.power_loss import DiskRecording, recorded
from dcp_ckpt.testing.volatile_disk import NUM_EXTREMES
from tests.crash.next_start import require_next_start
from tests.crash.owner import Fact
from tests.crash.situations import SITUATIONS

RUN = "run"
NUM_SAMPLES = 30
SEEDS_OF_ALL = range(NUM_EXTREMES + 6)

See = Callable[[SystemCall], None]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One operation and what was told before it began."""

    facts: list[Fact]
    recording: DiskRecording

    def require(self, target: Path, *, moment: int, seed: int) -> None:
        """Lose power at a moment, and start anew on what is left."""
        target.mkdir()
        try:
            self.recording.lose_power(target / "disk", moment=moment, seed=seed)
            told = [*self.facts, *self.recording.told(moment)]
            require_next_start(LocalStorage(target / "disk" / RUN), told, target / "seen")
        except BaseException as failure:
            failure.add_note(f"power lost at moment {moment} with seed {seed}")
            raise
        finally:
            shutil.rmtree(target)

    def require_always(self, target: Path, *, seeds: Iterable[int]) -> None:
        """The same at every moment, in no order: what is wrong is wrong at several in a row."""
        moments = list(range(self.recording.num_moments + 1))
        random.Random(0).shuffle(moments)
        for moment, seed in product(moments, seeds):
            self.require(target, moment=moment, seed=seed)


def record(
    directory: Path,
    name: str,
    *,
    see: See | None = None,
    hard_links: bool = True,
    without_syncs_of: str | None = None,
    goes_on: bool = False,
) -> Record:
    """Do one operation; with `goes_on` a save follows, whatever came of it."""
    situation = SITUATIONS[name]
    facts: list[Fact] = []
    root = directory / "disk"
    root.mkdir(parents=True)
    storage = LocalStorage(root / RUN, calls=watched_calls(hard_links=hard_links))
    owner = situation.prepare(storage, facts.append)
    with recorded(root, see=see, without_syncs_of=without_syncs_of) as recording:
        if owner is not None:
            owner.tell = recording.tell
        with suppress(CheckpointError):
            lives = situation.act(storage, owner, recording.tell)
            owner = lives or owner
            if goes_on and owner is not None:
                owner.save_next()
    if owner is not None:
        owner.die()
    return Record(facts=facts, recording=recording)


@pytest.mark.parametrize("name", SITUATIONS)
def test_power_may_fail_at_a_sample_of_moments(fast: Path, name: str) -> None:
    done = record(fast, name)
    last = done.recording.num_moments
    assert last > 30, "nothing was recorded"
    rng = random.Random(name)
    for number in range(NUM_SAMPLES):
        seed = number if number < NUM_EXTREMES else rng.randrange(1000)
        done.require(fast / "loss", moment=rng.randint(0, last), seed=seed)
    for seed in range(NUM_EXTREMES):
        done.require(fast / "loss", moment=last, seed=seed)


@pytest.mark.crash
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hard_links", [True, False], ids=["link", "rename"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_power_may_fail_at_every_moment(fast: Path, name: str, hard_links: bool) -> None:
    done = record(fast, name, hard_links=hard_links)
    done.require_always(fast / "loss", seeds=SEEDS_OF_ALL)


UNSYNCED = {
    "data file": ("save", "*.distcp"),
    "fragment": ("save", "*/.rank-*.tmp"),
    "manifest": ("save", "*/.manifest.json.*.tmp"),
    "step directory": ("save", "*/step-00000003"),
    "run directory": ("save", f"*/{RUN}"),
    "epochs": ("first-save", "*/epochs"),
    "parent of the run": ("first-save", "*/disk"),
    "un-committed directory": ("retention", "*/step-00000001"),
    "marks": ("retention", "*/marks/*"),
    "recovered manifest": ("start", "*/.manifest.json.*.tmp"),
}


@pytest.mark.parametrize("what", UNSYNCED)
def test_a_missing_sync_is_found(fast: Path, what: str) -> None:
    """On a disk that answers that one sync and does not do it, the extremes alone break a promise."""
    name, pattern = UNSYNCED[what]
    done = record(fast, name, without_syncs_of=pattern)
    with pytest.raises((AssertionError, CheckpointError)):
        done.require_always(fast / "loss", seeds=range(NUM_EXTREMES))


class FailingSync:
    """The sync of one number fails, once, with an I/O error. Number 0 never comes."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.num_syncs = 0

    def __call__(self, call: SystemCall) -> None:
        if call.name != "fsync" or call.after:
            return
        self.num_syncs += 1
        if self.num_syncs == self._number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), call.paths[0])


def require_after_failed_sync(directory: Path, name: str, number: int, *, seeds: Iterable[int]) -> None:
    """The error is told once, the bytes are gone, another save follows, and the power fails in the end."""
    directory.mkdir()
    done = record(directory, name, see=FailingSync(number), goes_on=True)
    for seed in seeds:
        done.require(directory / "loss", moment=done.recording.num_moments, seed=seed)
    shutil.rmtree(directory)


def count_syncs(directory: Path, name: str) -> int:
    counting = FailingSync(0)
    record(directory, name, see=counting, goes_on=True)
    assert counting.num_syncs > 10, "nothing was watched"
    return counting.num_syncs


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_sync_that_fails_proves_nothing(fast: Path, name: str) -> None:
    numbers = range(1, count_syncs(fast, name) + 1)
    for number in random.Random(name).sample(numbers, 5):
        require_after_failed_sync(fast / str(number), name, number, seeds=(0, 1))


@pytest.mark.crash
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_sync_may_fail(fast: Path, name: str) -> None:
    for number in range(1, count_syncs(fast, name) + 1):
        require_after_failed_sync(fast / str(number), name, number, seeds=SEEDS_OF_ALL)
