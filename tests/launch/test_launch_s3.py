"""The driver on S3: killed in an upload, resumed on fewer ranks, on a good and on a bad network."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dcp_ckpt
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.proxy_faults import (
    SLOW_DOWN,
    Arrival,
    Decide,
    Fault,
    Hang,
    Link,
    LoseAnswer,
    Reset,
    no_faults,
)
from dcp_ckpt.testing.s3_operations import S3Operation
from launch.demo import await_end, kill_all, largest_difference

pytestmark = pytest.mark.distributed

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
SMALL = ("--model-size", "tiny", "--eval-every", "1000", "--eval-iters", "1", "--save-every", "2")
LAST_STEP = 8
KILLED_STEP = 6
TIMEOUT_SECONDS = 110
BAND = 1e-4  # only the order of float32 sums differs with the number of ranks


class KillAt:
    """Lets everything pass by `others`, but holds back one data file of the step, and says so."""

    def __init__(self, step: int, others: Decide) -> None:
        self.reached = threading.Event()
        self._directory = f"/step-{step:08}/"
        self._others = others

    def __call__(self, arrival: Arrival) -> Fault | None:
        if self._directory in arrival.path and "/__2_0." in arrival.path:
            self.reached.set()
            return Hang()
        return self._others(arrival)


def bad_network(arrival: Arrival) -> Fault | None:
    """Every ninth request suffers, each time from something else; leases and all."""
    troubles: Sequence[Fault] = (
        Reset(),
        LoseAnswer(),
        SLOW_DOWN,
        Reset(after_body_bytes=1000),
        LoseAnswer(after_body_bytes=10),
    )
    return troubles[arrival.number // 9 % len(troubles)] if arrival.number % 9 == 0 else None


@contextmanager
def training(
    log: Path, run_dir: str, num_ranks: int, endpoint_url: str, *flags: str
) -> Iterator[subprocess.Popen[bytes]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(num_ranks), str(TRAIN), "--run-dir", run_dir, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL": endpoint_url}
    with log.with_suffix(".txt").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--steps", str(LAST_STEP), "--log-json", str(log), *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_everything(process)


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """As when a machine dies: trainers and writers."""
    writers = kill_all(process)
    for writer in writers:
        os.kill(writer, 9)
    await_end(writers)


def train(log: Path, run_dir: str, num_ranks: int, endpoint_url: str, *flags: str) -> list[dict[str, Any]]:
    with training(log, run_dir, num_ranks, endpoint_url, *flags) as process:
        code = process.wait(TIMEOUT_SECONDS)
    assert code == 0, log.with_suffix(".txt").read_text()[-4000:]
    return events(log)


def events(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("network", "link"),
    [
        pytest.param(no_faults, Link(), id="good"),
        pytest.param(
            bad_network,
            Link(latency_up_seconds=0.02, latency_down_seconds=0.02),
            id="bad",
        ),
    ],
)
@pytest.mark.crash
@pytest.mark.timeout(400)
def test_killed_in_an_upload_and_resumed_on_two_ranks(
    tmp_path: Path, s3_prefix: str, s3_environment: dict[str, str], network: Decide, link: Link
) -> None:
    reference = train(tmp_path / "reference.jsonl", str(tmp_path / "runs"), 1, "", "--save-strategy", "no")
    kill = KillAt(KILLED_STEP, network)
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"], decide=kill, link=link) as proxy:
        killed_log, resumed_log = tmp_path / "killed.jsonl", tmp_path / "resumed.jsonl"
        with training(killed_log, s3_prefix, 4, proxy.endpoint_url) as process:
            reached = kill.reached.wait(TIMEOUT_SECONDS)
            assert reached, killed_log.with_suffix(".txt").read_text()[-4000:]
            kill_everything(process)
        run = f"{s3_prefix}/run-001"
        reported = [event["step"] for event in events(killed_log) if event["event"] == "save"]
        committed = require_nothing_truncated(run)
        assert KILLED_STEP not in committed
        assert set(reported) <= {2, *committed}, "retention keeps two"

        proxy.set_faults(network, link=link)
        resumed = train(resumed_log, s3_prefix, 2, proxy.endpoint_url, "--resume", "must")
    (resume,) = [event for event in resumed if event["event"] == "resume"]
    assert (resume["from_world"], resume["to_world"]) == (4, 2)
    assert max((*committed, *reported)) <= resume["step"] < KILLED_STEP, "what was whole may be committed now"
    chain = events(killed_log) + resumed
    samples = {event["step"]: event["samples"] for event in reference if event["event"] == "step"}
    done = [(event["step"], event["samples"]) for event in chain if event["event"] == "step"]
    assert dict(done) == samples
    assert all(samples[step] == digest for step, digest in done)
    assert largest_difference(reference, chain)[0] <= BAND
    assert LAST_STEP in require_nothing_truncated(run)
    assert unfinished_uploads(run) == []


class SeenUploads:
    """Says when the data files of all ranks of one step are on their way."""

    def __init__(self, step: int, num_ranks: int) -> None:
        self.reached = threading.Event()
        self._directory = f"/step-{step:08}/"
        self._num_ranks = num_ranks
        self._seen: set[str] = set()

    def __call__(self, arrival: Arrival) -> None:
        if self._directory in arrival.path and arrival.path.endswith(".distcp"):
            self._seen.add(arrival.path)
            if len(self._seen) == self._num_ranks:
                self.reached.set()


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_writers_finish_their_uploads_without_trainers_and_the_next_start_commits(
    tmp_path: Path, s3_prefix: str, s3_environment: dict[str, str]
) -> None:
    uploads = SeenUploads(KILLED_STEP, 4)
    slow = Link(bytes_per_second=300_000)
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"], decide=uploads, link=slow) as proxy:
        log = tmp_path / "killed.jsonl"
        with training(log, s3_prefix, 4, proxy.endpoint_url) as process:
            assert uploads.reached.wait(TIMEOUT_SECONDS), log.with_suffix(".txt").read_text()[-4000:]
            writers = kill_all(process)
        resumed = train(tmp_path / "resumed.jsonl", s3_prefix, 2, proxy.endpoint_url, "--resume", "must")
        await_end(writers)
    assert resumed[0] == {"event": "resume", "step": KILLED_STEP, "from_world": 4, "to_world": 2}
    assert LAST_STEP in require_nothing_truncated(f"{s3_prefix}/run-001")


def require_nothing_truncated(run: str) -> list[int]:
    """Everything visible is whole, and what is committed verifies; gives the committed steps."""
    report = dcp_ckpt.verify(run)
    assert report.ok, "\n".join(map(str, report.problems))
    storage = open_storage(run)
    try:
        sizes = {info.key: info.size_bytes for info in storage.list("") if info.key.endswith(".distcp")}
    finally:
        storage.close()
    by_rank: dict[tuple[str, int], set[int]] = {}
    for key, size in sizes.items():
        by_rank.setdefault((key.rpartition("/__")[2].partition("_")[0], key.count("e0001")), set()).add(size)
    # Only rank 0's file, which holds the values, differs from save to save.
    assert all(len(found) == 1 for (rank, _), found in by_rank.items() if rank != "0"), by_rank
    return sorted(
        int(checked.directory.partition("-")[2].partition(".")[0]) for checked in report.checkpoints
    )


def unfinished_uploads(run: str) -> list[str]:
    storage = open_storage(run)
    try:
        return storage.abort_uploads("", lambda key: True)
    finally:
        storage.close()


def test_the_bad_network_strikes_with_everything() -> None:
    arrivals = (
        Arrival(number=n, kind_number=n, method="GET", path="", query="", kind=S3Operation.GET)
        for n in range(1, 100)
    )
    assert len(set(filter(None, map(bad_network, itertools.islice(arrivals, 99))))) == 5
