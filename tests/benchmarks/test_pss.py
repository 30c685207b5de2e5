"""What ranks ask of the benchmark that started them, and what their processes weigh."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from benchmarks.jobs import Answers, Control
from benchmarks.memory import allowed_for_loading, allowed_for_saving
from benchmarks.pss import Sampler, tree_of
from benchmarks.ratios import ALL_LABELS, MEMORY_TARGETS, S3_TARGETS, UNITS

MIB = 1 << 20

# Maps the descriptor, touches all of it, and waits for the end of its input.
SHARER = """\
import mmap, sys
mapped = mmap.mmap(int(sys.argv[1]), 0)
total = sum(mapped[::4096])
print("ready", flush=True)
sys.stdin.read()
"""


def test_shared_memory_counts_once_and_not_as_the_writers() -> None:
    descriptor = os.memfd_create("shared")
    os.truncate(descriptor, 64 * MIB)
    with (
        mmap.mmap(descriptor, 64 * MIB) as mapped,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", SHARER, str(descriptor)],
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        mapped[:] = b"\x5a" * len(mapped)
        assert child.stdout.readline() == b"ready\n"
        assert child.pid in tree_of([os.getpid()])
        both = Sampler([os.getpid()], [child.pid]).stop()
        alone = Sampler([child.pid], []).stop()
        child.stdin.close()
    os.close(descriptor)
    assert both.num_samples >= 1
    assert both.writer_bytes < 32 * MIB < alone.pss_bytes < 64 * MIB
    assert alone.writer_bytes == 0
    assert both.pss_bytes > alone.pss_bytes + 32 * MIB


def test_ranks_are_answered_one_job_after_the_other() -> None:
    with Answers({"add": lambda first, second: first + second}) as answers:
        for _ in range(2):
            control = Control(answers.address)
            assert control.ask("add", 2, 3) == 5
            with pytest.raises(RuntimeError, match="TypeError"):
                control.ask("add", 2, "x")
            assert control.ask("add", 2, 4) == 6
            control.close()


def test_what_is_allowed() -> None:
    assert allowed_for_saving(100 * MIB, 4, writer_mib=16) == pytest.approx(166 * MIB)
    assert allowed_for_loading(8, shared=False) == 128 * MIB
    assert allowed_for_loading(8, shared=True) == 192 * MIB


def test_targets_are_of_metrics_that_are_described() -> None:
    for target in (*S3_TARGETS, *MEMORY_TARGETS):
        assert target.above[0] in ALL_LABELS
        assert all(metric in UNITS for metric, _ in target.also)
