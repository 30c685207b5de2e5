"""Trainers and writers are killed at chosen system calls and at random times; then the run goes on."""

from __future__ import annotations

import contextlib
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt.testing.killpoints import KillPoint
from tests.crash.run_files import committed_steps, debris, require_all_verify
from tests.crash.starts import LAST_STEP, Start, expected, require_exact_resume, wait_until

STEP = "*/run/step-00000003"
OLD = "*/run/step-00000001"
TRASH = "*/run/trash/step-00000001.*"

# What a writer does to make its part of step 3 durable, in order.
WRITING: list[dict[str, Any]] = [
    {"call": "mkdir", "path": STEP},
    {"call": "mkdir", "path": STEP, "after": True},
    {"call": "open", "path": f"{STEP}/__*.distcp", "after": True},
    {"call": "pwrite", "path": f"{STEP}/__*.distcp"},
    {"call": "pwrite", "path": f"{STEP}/__*.distcp", "after": True},
    {"call": "fsync", "path": f"{STEP}/__*.distcp"},
    {"call": "fsync", "path": f"{STEP}/__*.distcp", "after": True},
    {"call": "open", "path": f"{STEP}/.rank-*.tmp", "after": True},
    {"call": "fsync", "path": f"{STEP}/.rank-*.tmp", "after": True},
    {"call": "link", "path": f"{STEP}/rank-*.json"},
    {"call": "link", "path": f"{STEP}/rank-*.json", "after": True},
    {"call": "unlink", "path": f"{STEP}/.rank-*.tmp", "after": True},
]
# What rank 0's trainer does to commit it and to remove step 1.
COMMITTING: list[dict[str, Any]] = [
    {"call": "open", "path": f"{STEP}/.manifest.json.*.tmp", "after": True},
    {"call": "fsync", "path": f"{STEP}/.manifest.json.*.tmp", "after": True},
    {"call": "link", "path": f"{STEP}/manifest.json"},
    {"call": "link", "path": f"{STEP}/manifest.json", "after": True},
    {"call": "unlink", "path": f"{STEP}/.manifest.json.*.tmp", "after": True},
    {"call": "open", "path": f"{STEP}/..metadata.*.tmp", "after": True},
    {"call": "replace", "path": f"{STEP}/.metadata"},
    {"call": "replace", "path": f"{STEP}/.metadata", "after": True},
    {"call": "unlink", "path": f"{OLD}/.metadata", "after": True},
    {"call": "unlink", "path": f"{OLD}/manifest.json"},
    {"call": "unlink", "path": f"{OLD}/manifest.json", "after": True},
    {"call": "rename", "path": TRASH},
    {"call": "rename", "path": TRASH, "after": True},
    {"call": "unlink", "path": f"{TRASH}/__*.distcp", "after": True},
    {"call": "unlink", "path": f"{TRASH}/rank-*.json", "after": True},
    {"call": "rmdir", "path": TRASH},
    {"call": "rmdir", "path": TRASH, "after": True},
]
QUICK = [
    (1, KillPoint(role="writer", action="kill_all", number=2, **WRITING[3])),
    (1, KillPoint(role="trainer", **COMMITTING[10])),
    (2, KillPoint(role="trainer", action="kill_all", **COMMITTING[2])),
]
ONE_RANK = [
    *(KillPoint(role="writer", action="kill_all", **moment) for moment in WRITING),
    *(KillPoint(role="writer", action="kill_trainers", **moment) for moment in WRITING[::2]),
    *(KillPoint(role="trainer", **moment) for moment in COMMITTING),
]
TWO_RANKS = [
    *(KillPoint(role="writer", rank=1, action="kill_all", **moment) for moment in WRITING[2::3]),
    *(KillPoint(role="trainer", action="kill_all", **moment) for moment in COMMITTING[1::4]),
]
# What a start does before it trains; killed there, the one after it finds yet another crash.
STARTING = [
    KillPoint(role="trainer", call="link", path="*/run/run.json"),
    KillPoint(role="trainer", call="link", path="*/run/epochs/*.json"),
    KillPoint(role="trainer", call="link", path="*/run/epochs/*.json", after=True),
]
RECOVERING = [
    KillPoint(role="trainer", call="link", path=f"{STEP}/manifest.json"),
    KillPoint(role="trainer", call="link", path=f"{STEP}/manifest.json", after=True),
    KillPoint(role="trainer", call="replace", path=f"{STEP}/.metadata"),
    KillPoint(role="trainer", call="link", path="*/run/epochs/*.resumed.json", after=True),
]


def die_and_come_back(directory: Path, world_size: int, point: KillPoint) -> int:
    with Start(directory, "killed", world_size=world_size, points=[point]) as start:
        assert -9 in start.wait(), f"nothing was killed\n{start.output()}"
        start.require_gone()
        return require_exact_resume(directory, start)


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "point"), QUICK, ids=str)
def test_a_killed_run_goes_on_exactly(tmp_path: Path, world_size: int, point: KillPoint) -> None:
    die_and_come_back(tmp_path, world_size, point)


@pytest.mark.crash
@pytest.mark.parametrize("point", ONE_RANK, ids=str)
def test_one_rank_goes_on_exactly_after_any_kill(tmp_path: Path, point: KillPoint) -> None:
    resumed = die_and_come_back(tmp_path, 1, point)
    if point.action == "kill_trainers":
        assert resumed == 3, "what the writer finished after its trainer's death was not committed"


@pytest.mark.crash
@pytest.mark.parametrize("point", TWO_RANKS, ids=str)
def test_two_ranks_go_on_exactly_after_any_kill(tmp_path: Path, point: KillPoint) -> None:
    die_and_come_back(tmp_path, 2, point)


@pytest.mark.crash
@pytest.mark.parametrize("point", STARTING, ids=str)
def test_a_start_may_die_before_it_trains(tmp_path: Path, point: KillPoint) -> None:
    with Start(tmp_path, "killed", points=[point]) as start:
        assert start.wait() == [-9], start.output()
        start.require_gone()
        assert require_exact_resume(tmp_path, start) == 0


@pytest.mark.crash
@pytest.mark.parametrize("point", RECOVERING, ids=str)
def test_a_recovery_may_die_too(tmp_path: Path, point: KillPoint) -> None:
    first = KillPoint(role="trainer", call="link", path=f"{STEP}/manifest.json")
    with Start(tmp_path, "killed", points=[first]) as start:
        assert start.wait() == [-9], start.output()
        start.require_gone()
    with Start(tmp_path, "recovering", points=[point]) as start:
        assert start.wait() == [-9], start.output()
        start.require_gone()
        assert require_exact_resume(tmp_path, start) == 3


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(6))
def test_everything_may_die_at_any_time(tmp_path: Path, seed: int) -> None:
    world_size = 1 + seed % 2
    with Start(tmp_path, "killed", world_size=world_size) as start:
        wait_until(lambda: bool(start.events("resume")), 60.0, start)
        # The moment itself is what is tested; nothing waits for it to be a certain one.
        with contextlib.suppress(subprocess.TimeoutExpired):
            start.trainer().wait(random.Random(seed).uniform(0.0, 0.8))
        for member in start.book.members("trainer" if seed % 4 < 2 else None):
            member.kill()
        start.wait()
        start.require_gone()
        require_exact_resume(tmp_path, start)


def require_writer_death_is_reported(directory: Path, world_size: int, point: KillPoint) -> None:
    with Start(directory, "run", world_size=world_size, points=[point]) as start:
        start.succeed()
        for rank in range(world_size):
            outcomes = {event["step"]: event for event in start.events("save", rank)}
            assert [step for step in outcomes if outcomes[step]["outcome"] == "failed"] == [3]
            message = outcomes[3]["error"]
            assert "was killed by signal 9" in message
            assert f"rank {point.rank}, step 3" in message
            digests = [event["digest"] for event in start.events("step", rank)]
            assert digests == expected(world_size)[rank][1:]
        # The writer that died, and its successor.
        assert len(start.book.members("writer")) == world_size + 1
        require_all_verify(start.run)
        assert committed_steps(start.run) == [LAST_STEP - 1, LAST_STEP]
        assert debris(start.run) == []


@pytest.mark.distributed
def test_a_dead_writer_fails_one_save_on_all_ranks(tmp_path: Path) -> None:
    point = KillPoint(role="writer", rank=1, call="fsync", path=f"{STEP}/__*.distcp")
    require_writer_death_is_reported(tmp_path, 2, point)


@pytest.mark.crash
@pytest.mark.parametrize("point", [KillPoint(role="writer", **moment) for moment in WRITING], ids=str)
def test_a_writer_may_die_anywhere(tmp_path: Path, point: KillPoint) -> None:
    require_writer_death_is_reported(tmp_path, 1, point)
