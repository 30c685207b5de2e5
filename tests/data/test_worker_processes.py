"""Data-loading processes let stop signals pass, and leave with their trainer however it ends."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its __all__

from dcp_ckpt.data import ElasticLoader, ElasticSampler
from tests.data.datasets import Collecting, as_list
from tests.eventually import eventually

ROOT = Path(__file__).resolve().parents[2]

LOADERS = """
import os, signal, sys
from torch.utils.data import DataLoader
from dcp_ckpt import ignore_stop_signals
from dcp_ckpt.data import ElasticLoader, ElasticSampler
from tests.data.datasets import Heavy, Numbers

def elastic(dataset, context):
    sampler = ElasticSampler(len(dataset), 2, 0, 1, seed=0)
    settings = {"num_workers": 1, "prefetch_factor": 4, "collate_fn": list}
    return ElasticLoader(dataset, sampler, multiprocessing_context=context, **settings)

def plain(dataset):
    settings = {"num_workers": 1, "worker_init_fn": ignore_stop_signals, "collate_fn": list}
    return DataLoader(dataset, batch_size=2, **settings)

if __name__ == "__main__":
    dataset = Heavy() if "heavy" in sys.argv else Numbers()
    loaders = [elastic(dataset, "fork"), plain(dataset)]
    if "spawn" in sys.argv:
        loaders.append(elastic(dataset, "spawn"))
    live = [iter(loader) for loader in loaders]
    for batches in live:
        next(batches)
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    print(*children, flush=True)
    if "signals" in sys.argv:
        for child in children:
            os.system(f"kill -TERM {child}; kill -INT {child}")  # as torchrun does, which is not the trainer
        for batches in live:
            [next(batches) for _ in range(10)]
        print("still there", flush=True)
    if "wait" in sys.argv:
        signal.pause()
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "loaders.py"
    path.write_text(LOADERS)
    return [sys.executable, str(path)]


def start(program: list[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program, *arguments], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)}
    )


def is_running(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_they_outlast_the_signals_of_a_launcher_and_leave_at_the_end_of_their_trainer(program):
    with start(program, "spawn", "signals") as trainer:
        try:
            # Iterations are under way when it ends, so the workers are told by SIGTERM as well.
            printed, _ = trainer.communicate(timeout=60)
        finally:
            trainer.kill()
    children, last = printed.splitlines()
    assert last == "still there"
    assert trainer.returncode == 0
    assert len(children.split()) >= 3
    assert eventually(lambda: not any(map(is_running, children.split())), timeout_seconds=10)


def test_they_leave_when_their_trainer_is_killed_while_they_wait_for_it(program):
    with start(program, "heavy", "wait") as trainer:
        try:
            assert trainer.stdout is not None
            children = trainer.stdout.readline().split()
            assert len(children) == 2
            assert all(map(is_running, children))
        finally:
            trainer.send_signal(signal.SIGKILL)
    assert eventually(lambda: not any(map(is_running, children)), timeout_seconds=20)


class Cycle:
    """Garbage from the start."""

    def __init__(self, what: object) -> None:
        self.what, self.itself = what, self


def test_they_do_not_destroy_what_the_trainer_has_left_to_its_garbage_collector() -> None:
    """A store or process group of torch waits for its threads, which a forked process does not have."""
    sampler = ElasticSampler(4, 2, 0, 1, seed=0)
    gc.collect()
    gc.disable()
    try:
        Cycle(TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False))
        dataset = Collecting(4)
        settings: dict[str, Any] = {"num_workers": 1, "collate_fn": as_list}
        with ElasticLoader(
            dataset, sampler, multiprocessing_context="fork", timeout_seconds=60, **settings
        ) as loader:
            assert sorted(chain(*loader)) == [0, 1, 2, 3]
    finally:
        gc.enable()
        gc.collect()
