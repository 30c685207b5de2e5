"""What checkpointing weighs: proportional set sizes of all ranks and writers before, during and after saves.

    python benchmarks/memory.py --json out.json

Starts one torchrun of `memory_ranks.py` for each system and kind of state, and samples its processes.
NOTES.md says how each number is defined.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.jobs import Answers, Handler, run_job
from benchmarks.machine import describe
from benchmarks.measure import Samples
from benchmarks.pss import Peak, Sampler
from benchmarks.ratios import MEMORY_TARGETS, OURS, PROCESS, THREAD, WITHOUT
from benchmarks.report import make_rows, print_table, result
from dcp_ckpt.testing import s3_server

__all__ = ["allowed_for_loading", "allowed_for_saving", "main"]

MIB = 1 << 20
STATE_OVERHEAD = 1.02
WRITER_MIB = {"sharded": 16, "replicated": 16, "S3": 40}
READ_BUFFERS_MIB = 16
SHARED_SLOTS_MIB = 8
_JOB_SECONDS = 300.0
_BUCKET = "checkpoints"
_RANKS_PROGRAM = Path(__file__).with_name("memory_ranks.py")

S3 = "S3"
"""A sharded state that is saved to an object store."""
QUICK_JOBS = ((OURS, "sharded"), (THREAD, "sharded"), (WITHOUT, "sharded"), (OURS, "replicated"), (OURS, S3))
JOBS = (*QUICK_JOBS, (PROCESS, "sharded"), (THREAD, "replicated"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags; see `--help`. `size_mib` is that of the state over all ranks, or of each replica."""

    num_ranks: int
    size_mib: int
    rounds: int
    quick: bool
    directory: Path
    json: Path | None


@dataclass(kw_only=True)
class Weights:
    """What one job weighed.

    Args of the attributes:
        peaks: by phase.
        sizes: of staging memory and state over all ranks, in bytes, and the number of writers.
        problem: why there is no number, or "".
    """

    peaks: dict[str, Peak] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


class Scale:
    """What the ranks of a job ask of this process."""

    def __init__(self) -> None:
        self.weights = Weights()
        self._sampler: Sampler | None = None
        self.handlers: dict[str, Handler] = {
            "begin": self._begin,
            "end": self._end,
            "sizes": self._take_sizes,
            "failed": self._fail,
        }

    def _begin(self, ranks: Sequence[int], writers: Sequence[int]) -> None:
        self._sampler = Sampler(ranks, writers)

    def _end(self, phase: str) -> None:
        assert self._sampler is not None, "a phase has begun"
        self.weights.peaks[phase] = self._sampler.stop()

    def _take_sizes(self, sizes: Mapping[str, float]) -> None:
        self.weights.sizes = sizes

    def _fail(self, reason: str) -> None:
        self.weights.problem = reason


def main() -> None:
    options = parse_options()
    samples = Samples()
    directory = options.directory.resolve() / "memory"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        for number in range(1, options.rounds + 1):
            for system, kind in QUICK_JOBS if options.quick else JOBS:
                print(f"memory: {system}, {kind}, round {number} of {options.rounds}", flush=True)
                add(samples, system, kind, weigh(options, directory, system, kind), options.num_ranks)
        report(samples, options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 ranks, 256 MiB and 1 round, for a minute")
    parser.add_argument("--ranks", type=int, help="(default: 8)")
    parser.add_argument("--size-mib", type=int, help="of the sharded state; replicas: a quarter (1024)")
    parser.add_argument("--rounds", type=int, help="jobs of each system (default: 3)")
    parser.add_argument("--dir", type=Path, default=Path("bench-run"), help="where to write (./bench-run)")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    return Options(
        num_ranks=given.ranks or (4 if given.quick else 8),
        size_mib=given.size_mib or (256 if given.quick else 1024),
        rounds=given.rounds or (1 if given.quick else 3),
        quick=given.quick,
        directory=given.dir,
        json=given.json,
    )


def weigh(options: Options, directory: Path, system: str, kind: str) -> Weights:
    """Run one job."""
    scale = Scale()
    place = directory / "job"
    place.mkdir()
    state_bytes = options.size_mib * MIB // (4 if kind == "replicated" else 1)
    with ExitStack() as stack:
        answers = stack.enter_context(Answers(scale.handlers))
        place_arguments, environment = [], {}
        if kind == S3:
            server = stack.enter_context(s3_server.S3Server())
            server.make_bucket(_BUCKET)
            place_arguments, environment = ["--url", f"s3://{_BUCKET}/run"], server.environment()
        run_job(
            _RANKS_PROGRAM,
            [
                *("--system", system, "--kind", "replicated" if kind == "replicated" else "sharded"),
                *("--state-bytes", str(state_bytes), "--dir", str(place)),
                *("--control", answers.address, *place_arguments),
            ],
            environment=environment,
            num_ranks=options.num_ranks,
            deadline_seconds=_JOB_SECONDS,
        )
    shutil.rmtree(place, ignore_errors=True)
    return scale.weights


def add(samples: Samples, system: str, kind: str, weights: Weights, num_ranks: int) -> None:
    """The rows of one job."""
    if weights.problem:
        samples.fail(f"memory_saving_{kind}", system, weights.problem)
        return
    found = {phase: peak.pss_bytes for phase, peak in weights.peaks.items()}
    level = found["training"]
    more = {phase: found[phase] - level for phase in ("idle", "saving", "kept")}
    more["loading"] = found["loading"] - found["resting"]
    for phase, num_bytes in {"training": level, **more}.items():
        samples.add(f"memory_{phase}_{kind}", system, num_bytes / MIB)
    if system == OURS:
        unique = weights.sizes["state_bytes"] / (num_ranks if kind == "replicated" else 1)
        allowed = allowed_for_saving(unique, round(weights.sizes["writers"]), writer_mib=WRITER_MIB[kind])
        samples.add(f"memory_save_over_allowed_{kind}", OURS, more["saving"] / allowed)
        heaviest = max(peak.writer_bytes for peak in weights.peaks.values())
        samples.add(f"memory_writer_{kind}", OURS, heaviest / weights.sizes["writers"] / MIB)
        allowed = allowed_for_loading(num_ranks, shared=kind == "replicated")
        samples.add(f"memory_load_over_allowed_{kind}", OURS, more["loading"] / allowed)


def allowed_for_saving(unique_bytes: float, num_writers: int, *, writer_mib: int) -> float:
    """How much more all processes of a host may weigh during a save, in bytes."""
    return STATE_OVERHEAD * unique_bytes + num_writers * writer_mib * MIB


def allowed_for_loading(num_ranks: int, *, shared: bool) -> float:
    """How much more they may weigh during a load, beside the tensors, in bytes.

    Args:
        shared: they read replicas together.
    """
    return num_ranks * (READ_BUFFERS_MIB + (SHARED_SLOTS_MIB if shared else 0)) * MIB


def report(samples: Samples, options: Options, directory: Path) -> None:
    """Print the tables and write the JSON."""
    rows = make_rows(samples, {})
    machine = {
        **describe(directory, {}, 0),
        "world_size": options.num_ranks,
        "size_mib": options.size_mib,
        "rounds": options.rounds,
    }
    print_table(rows, samples, {}, MEMORY_TARGETS)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result(machine, rows, samples, MEMORY_TARGETS), indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
