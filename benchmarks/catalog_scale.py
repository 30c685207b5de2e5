"""How long it takes to list 10,000 checkpoints, and how long the command line takes to start.

    python benchmarks/catalog_scale.py --json out.json

Checkpoints of 8 ranks and 48 tensors, of which what a listing reads is there: manifests here, `.metadata` for
stock DCP, which has no list and so unpickles each. `dcp-ckpt` is timed as a whole process, from its start to
its end; of the process that unpickles only the unpickling counts. NOTES.md says how each number is defined.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Run as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Samples
from benchmarks.ratios import METADATA, OURS
from benchmarks.scale_report import Options, parse_options, repeated, report, timed_result
from benchmarks.stock_planning import stock_saves
from dcp_ckpt.testing import many_checkpoints

__all__ = ["main"]

NUM_CHECKPOINTS = 10_000
NUM_UNPICKLED, QUICK_UNPICKLED = 1_000, 200
WORLD_SIZE, NUM_TENSORS = 8, 48
TIMEOUT_SECONDS = 300

UNPICKLE_ALL = """
import pathlib, pickle, sys, time
import torch.distributed.checkpoint
paths = [pathlib.Path(sys.argv[1], name, ".metadata") for name in sys.argv[2:]]
start = time.perf_counter()
for path in paths:
    with path.open("rb") as file:
        metadata = pickle.load(file)
    assert metadata.state_dict_metadata
print(time.perf_counter() - start)
"""
IMPORTED = """
import runpy, sys
sys.argv[0] = "dcp-ckpt"
try:
    runpy.run_module("dcp_ckpt", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__.splitlines()[0], arguments=arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    samples = Samples()
    num_unpickled = QUICK_UNPICKLED if options.quick else NUM_UNPICKLED
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        many, few = Path(place, "many"), Path(place, "few")
        steps = range(1, NUM_CHECKPOINTS + 1)
        many_checkpoints.write_manifests(many, steps=steps, world_size=WORLD_SIZE)
        many_checkpoints.write_manifests(few, steps=range(1, 4), world_size=WORLD_SIZE)
        measure_lists(samples, options, many, few)
        measure_unpickling(samples, options, many, Path(place), num_unpickled)
    report(
        samples,
        options,
        notes={
            ("list_10000", METADATA): f"measured on {num_unpickled} checkpoints, and linear from there on"
        },
        settings={"world_size": WORLD_SIZE, "num_tensors": NUM_TENSORS, "num_unpickled": num_unpickled},
    )


def measure_lists(samples: Samples, options: Options, many: Path, few: Path) -> None:
    """The command line, in one process after the other."""
    run([sys.executable, "-c", IMPORTED, "list", str(few)])
    repeated(samples, "cli_help", OURS, options.rounds, lambda: timed_result(lambda: command("--help"))[0])
    repeated(samples, "cli_list", OURS, options.rounds, lambda: listed(few, 3))
    repeated(samples, "list_10000", OURS, options.rounds, lambda: listed(many, NUM_CHECKPOINTS))


def listed(path: Path, number: int) -> float:
    """Seconds of a listing, which has to be right."""
    seconds, text = timed_result(lambda: command("list", str(path), "--json"))
    found = json.loads(text)["checkpoints"]
    steps = range(1, number + 1)
    assert [(one["step"], one["metrics"]["loss"]) for one in found] == [(step, step) for step in steps]
    assert all(one["bytes"] == WORLD_SIZE << 27 for one in found)
    return seconds


def measure_unpickling(
    samples: Samples, options: Options, run_directory: Path, place: Path, number: int
) -> None:
    """Unpickle the `.metadata` of some of the checkpoints: equal ones, in the page cache."""
    with stock_saves(place / "stock", world_size=WORLD_SIZE, num_tensors=NUM_TENSORS) as saves:
        (place / "stock").mkdir()
        saves.coordinator_seconds()
    names = [f"step-{step:08}" for step in range(1, number + 1)]
    for name in names:
        shutil.copy(place / "stock" / ".metadata", run_directory / name)

    def unpickled() -> float:
        text = run([sys.executable, "-c", UNPICKLE_ALL, str(run_directory), *names])
        return float(text) * NUM_CHECKPOINTS / number

    repeated(samples, "list_10000", METADATA, options.rounds, unpickled)


def command(*arguments: str) -> str:
    """Run `dcp-ckpt` as it is installed; what it prints."""
    return run([str(Path(sys.executable).with_name("dcp-ckpt")), *arguments])


def run(arguments: Sequence[str]) -> str:
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_SECONDS, check=True, env=os.environ
    )
    return done.stdout


if __name__ == "__main__":
    main()
