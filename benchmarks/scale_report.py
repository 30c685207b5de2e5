"""What the benchmarks of scale have in common: flags, rounds, and results as JSON and as a table.

They run in one process each. Pure but for printing and writing. Used by `planning_scale`, `catalog_scale` and
`random_access`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.machine import describe
from benchmarks.measure import Samples, median_and_mad
from benchmarks.ratios import SCALE_LABELS, SCALE_TARGETS, SCALE_UNITS, Target, compute_ratios, passes

__all__ = ["Options", "parse_options", "repeated", "report", "timed_result"]

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags.

    Args:
        quick: smaller sizes and fewer rounds, for a guard against regressions.
        rounds: that count.
    """

    quick: bool
    rounds: int
    directory: Path
    json: Path | None


def parse_options(description: str, *, arguments: Sequence[str] | None = None) -> Options:
    """The flags of a benchmark, from the command line unless `arguments` are given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="at most half a minute; ratios are rougher")
    parser.add_argument("--rounds", type=int, default=None, help="rounds that count (default: 7, quick 3)")
    parser.add_argument("--dir", type=Path, default=Path("bench-run"), help="where to write (./bench-run)")
    parser.add_argument("--json", type=Path, default=None, help="write the results there")
    given = parser.parse_args(arguments)
    rounds = given.rounds if given.rounds is not None else 3 if given.quick else 7
    if rounds < 1:
        parser.error("--rounds must be positive")
    return Options(quick=given.quick, rounds=rounds, directory=given.dir, json=given.json)


def timed_result(act: Callable[[], _Result]) -> tuple[float, _Result]:
    """Run `act`: its wall time in seconds, and what it returns."""
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def repeated(samples: Samples, metric: str, system: str, rounds: int, measure: Callable[[], float]) -> None:
    """Add `rounds` values after one that warms up and does not count."""
    measure()
    for _ in range(rounds):
        samples.add(metric, system, measure())


def report(
    samples: Samples,
    options: Options,
    *,
    notes: Mapping[tuple[str, str], str],
    settings: Mapping[str, object],
) -> dict[str, object]:
    """Print the numbers and the ratios that were measured, and write them where it was asked for.

    Args:
        notes: by metric and system, what a reader must know of a number.
        settings: sizes, for the description of the machine.

    Returns:
        What was written: machine, rows and ratios, as `save_latency.py` gives them.
    """
    rows = [_row(samples, metric, system, notes) for metric, system in samples.values]
    medians = samples.medians()
    targets = [target for target in SCALE_TARGETS if target.above in medians]
    ratios = compute_ratios(medians, targets)
    machine = {
        **describe(options.directory, {}, 0),
        "rounds": options.rounds,
        "quick": options.quick,
        **settings,
    }
    for row in rows:
        print(f"{row['label']:66} {row['system']:20} {_shown(row)}{'  *' if row['note'] else ''}")
    for (metric, system), note in notes.items():
        print(f"* {SCALE_LABELS[metric]}, {system}: {note}")
    for target in targets:
        print(_verdict(target, ratios[target.name], passes(target, medians)))
    found: dict[str, object] = {"machine": machine, "rows": rows, "ratios": ratios}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _row(
    samples: Samples, metric: str, system: str, notes: Mapping[tuple[str, str], str]
) -> dict[str, object]:
    values = samples.values[metric, system]
    median, mad = median_and_mad(values)
    return {
        "metric": metric,
        "system": system,
        "median": median,
        "mad": mad,
        "unit": SCALE_UNITS.get(metric, "s"),
        "label": SCALE_LABELS[metric],
        "values": values,
        "note": notes.get((metric, system), ""),
    }


def _shown(row: Mapping[str, object]) -> str:
    median, mad = row["median"], row["mad"]
    if row["unit"] == "bytes":
        return f"{median:14,.0f} bytes"
    return f"{median:12.5f} s ± {mad:.5f}"


def _verdict(target: Target, ratio: float | None, passed: bool | None) -> str:
    also = "".join(f" and {metric} <= {bound:g} s" for metric, bound in target.also)
    shown = "none" if ratio is None else f"{ratio:.6f}"
    aim = "" if target.aim is None else f", aim {target.aim:.6f}"
    word = {True: "yes", False: "NO", None: "?"}[passed]
    return f"{target.name:20} {shown}   needed {target.needed:.6f}{also}{aim}   {word}"
