"""Hold a result file to the ratios that are needed: exit code 1 and the rows that miss.

python benchmarks/check.py benchmarks/results/2026-11-28.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks.results import QUICK_TOLERANCE, Verdict, failed_scripts, shown_value, verdicts

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("result", type=Path)
    options = parser.parse_args(arguments)
    document = json.loads(options.result.read_text())
    found = verdicts(document)
    failed = failed_scripts(document)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(found))
    if document["quick"]:
        console.print(f"A quick run: limits are {QUICK_TOLERANCE:g} times as wide.")
    for line in failed:
        console.print(f"failed: {line}", markup=False)
    missing = [verdict for verdict in found if not verdict.holds]
    for verdict in missing:
        console.print(
            f"{verdict.script}: {verdict.target.name} is {shown_value(verdict.ratio)}, "
            f"the limit is {shown_value(verdict.limit)}",
            markup=False,
        )
    return 1 if failed or missing else 0


def _table(found: Sequence[Verdict]) -> Table:
    table = Table("script", "ratio", "of", "over", "value", "needed", "aim", "reached", "bound by")
    for verdict in found:
        target = verdict.target
        sign = "≥" if target.higher_is_better else "≤"
        table.add_row(
            verdict.script,
            target.name,
            " ".join(target.above),
            " ".join(target.below or ()),
            shown_value(verdict.ratio),
            f"{sign} {target.needed:.3g}",
            "" if target.aim is None else f"{target.aim:.3g}",
            {True: "yes", False: "no", None: "?"}[verdict.is_met],
            verdict.reason,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
