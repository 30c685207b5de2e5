"""Run all benchmarks and write what they found to one file: `make bench`, `make bench-full`.

    python benchmarks/suite.py --quick

Each script runs by itself, one after the other; nothing else should run on the machine. A script that fails
is named, and the others go on. `--only` adds to a result file of the same day and kind, or replaces in it.
Exit code 1 if a script failed or a ratio is worse than it may be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import check, readme

__all__ = ["SCRIPTS", "Script", "main", "merged"]

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_SHOWN_CHARACTERS = 800


@dataclass(frozen=True, kw_only=True)
class Script:
    """One benchmark.

    Args:
        ranks: started by torchrun with so many; 0: a plain process, which may start ranks itself.
        quick, full: arguments beside `--json`.
        deadline_seconds: of a full run.
    """

    name: str
    ranks: int = 0
    quick: Sequence[str] = ("--quick",)
    full: Sequence[str] = ()
    deadline_seconds: float = 1800.0


_RANKED_QUICK = ("--size-gib", "0.25", "--rounds", "3")
_RANKED_FULL = ("--size-gib", "1", "--rounds", "7")

SCRIPTS = (
    # What does not depend on the size would be most of a small one, as in `incremental`.
    Script(name="save_latency", ranks=8, quick=("--size-gib", "1", "--rounds", "3"), full=_RANKED_FULL),
    Script(name="load_reshard", ranks=8, quick=_RANKED_QUICK, full=_RANKED_FULL),
    Script(name="training_tax", ranks=8, quick=_RANKED_QUICK, full=_RANKED_FULL),
    Script(name="incremental", ranks=8, quick=("--size-gib", "1", "--rounds", "3"), full=_RANKED_FULL),
    # Its ratio is near its bound, and what scatters is the disk.
    Script(
        name="digests",
        ranks=8,
        quick=("--size-gib", "0.5", "--rounds", "5"),
        full=("--size-gib", "1", "--rounds", "15"),
    ),
    Script(name="memory"),
    Script(name="s3"),
    Script(name="planning_scale"),
    Script(name="catalog_scale"),
    Script(name="random_access"),
    Script(name="gpu"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this script; repeatable")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<date>.json")
    parser.add_argument("--readme", action="store_true", help="put table and plot into README.md")
    options = parser.parse_args(arguments)
    unknown = set(options.only) - {script.name for script in SCRIPTS}
    if unknown:
        parser.error(f"no such script: {', '.join(sorted(unknown))}")
    chosen = [script for script in SCRIPTS if not options.only or script.name in options.only]
    day = datetime.now(UTC).date().isoformat()
    out = options.out or RESULTS / (f"{day}-quick.json" if options.quick else f"{day}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(out.read_text())["scripts"] if options.only and out.exists() else {}
    found = run_all(chosen, quick=options.quick)
    document = {"quick": options.quick, "scripts": merged(known, found)}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten: {out}")
    if options.readme:
        readme.update(out)
    return check.main([str(out)])


def merged(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The newest of each script, in the order of the scripts."""
    newest = {**known, **found}
    return {script.name: newest[script.name] for script in SCRIPTS if script.name in newest}


def run_all(scripts: Sequence[Script], *, quick: bool) -> dict[str, Any]:
    """Run the scripts; what each found, by name, with when and what was measured."""
    found: dict[str, Any] = {}
    for script in scripts:
        print(f"== {script.name}", flush=True)
        started = time.monotonic()
        at = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit()}
        found[script.name] = at | run(script, quick=quick)
        print(f"== {script.name}: {time.monotonic() - started:.0f} s", flush=True)
    return found


def run(script: Script, *, quick: bool) -> dict[str, Any]:
    """What one script found, or why it found nothing."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "result.json"
        command = [sys.executable]
        if script.ranks:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(script.ranks)]
        command += [str(HERE / f"{script.name}.py"), *(script.quick if quick else script.full)]
        try:
            done = subprocess.run(
                [*command, "--json", str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
                timeout=script.deadline_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {script.deadline_seconds:.0f} s"}
        if done.returncode or not out.exists():
            print(done.stderr[-_SHOWN_CHARACTERS:], file=sys.stderr)
            return {"failed": f"exit code {done.returncode}: ...{done.stderr[-_SHOWN_CHARACTERS:]}"}
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
