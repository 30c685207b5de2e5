"""The results, as the JSON of the contract and as a table for people.

Pure but for printing. Used by the entry point on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Samples, median_and_mad
from benchmarks.ratios import (
    ALL_LABELS,
    FSSPEC_LOAD,
    FSSPEC_SAVE,
    FULL,
    MACHINE,
    OURS,
    PLAN_CACHED,
    PROCESS,
    SAFETENSORS,
    SHARED,
    SNAPSHOT,
    STOCK_LOAD,
    STOCK_SAVE,
    SUCCESSOR,
    TARGETS,
    THREAD,
    TORCH_SAVE,
    UNDIGESTED,
    UNITS,
    WITHOUT,
    Target,
    compute_ratios,
    passes,
)

__all__ = ["Row", "make_rows", "print_table", "result"]

_COLUMNS = (
    ((OURS,), OURS),
    ((STOCK_SAVE, STOCK_LOAD), "dcp.save / .load"),
    ((THREAD,), "async thread"),
    ((PLAN_CACHED,), "thread+ plan cache"),
    ((PROCESS,), "async process"),
    ((SHARED,), "process+shm"),
    ((SUCCESSOR,), "torch_ checkpointing"),
    ((SNAPSHOT,), SNAPSHOT),
    ((TORCH_SAVE,), TORCH_SAVE),
    ((SAFETENSORS,), SAFETENSORS),
    ((UNDIGESTED,), UNDIGESTED),
    ((FULL,), FULL),
    ((FSSPEC_SAVE, FSSPEC_LOAD), "FsspecWriter / Reader"),
    ((WITHOUT,), WITHOUT),
    ((MACHINE,), MACHINE),
)
_WIDTH = 240


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number, or the reason why there is none.

    Args:
        median, mad: over the rounds; None when the measurement failed.
        values: of each round.
        note: what a reader must know; "" for nothing.
    """

    metric: str
    system: str
    median: float | None
    mad: float | None
    unit: str
    values: tuple[float, ...] = ()
    note: str = ""

    def as_json(self) -> dict[str, object]:
        return {
            "metric": self.metric,
            "system": self.system,
            "median": self.median,
            "mad": self.mad,
            "unit": self.unit,
            "label": ALL_LABELS[self.metric],
            "values": list(self.values),
            "note": self.note,
        }


def make_rows(samples: Samples, notes: Mapping[str, str]) -> list[Row]:
    """All rows, in the order of the metrics; `notes` holds one for some systems."""
    order = list(ALL_LABELS)
    keys = sorted({*samples.values, *samples.failures}, key=lambda key: (order.index(key[0]), key[1]))
    rows = []
    for metric, system in keys:
        reason = samples.failures.get((metric, system))
        values = samples.values.get((metric, system), [])
        unit = UNITS.get(metric, "s")
        if reason is not None or not values:
            note = f"failed: {reason or 'no round counted'}"
            rows.append(Row(metric=metric, system=system, median=None, mad=None, unit=unit, note=note))
            continue
        median, mad = median_and_mad(values)
        rows.append(
            Row(
                metric=metric,
                system=system,
                median=median,
                mad=mad,
                unit=unit,
                values=tuple(values),
                note=notes.get(system, ""),
            )
        )
    return rows


def result(
    machine: Mapping[str, object],
    rows: Sequence[Row],
    samples: Samples,
    targets: Sequence[Target] = TARGETS,
) -> dict[str, object]:
    """What is written as JSON."""
    return {
        "machine": dict(machine),
        "rows": [row.as_json() for row in rows],
        "ratios": compute_ratios(samples.medians(), targets),
    }


def print_table(
    rows: Sequence[Row],
    samples: Samples,
    notes: Mapping[str, str],
    targets: Sequence[Target] = TARGETS,
) -> None:
    """Numbers of all systems, then the ratios with the bounds to reach."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=_WIDTH)
    cells = {(row.metric, row.system): _cell(row) for row in rows}
    shown = {system for _, system in cells}
    columns = [(names, title) for names, title in _COLUMNS if shown.intersection(names)]
    table = Table("metric", *(f"{title}{'*' if notes.get(names[0]) else ''}" for names, title in columns))
    for metric, label in ALL_LABELS.items():
        found = [
            next((cells[metric, name] for name in names if (metric, name) in cells), "")
            for names, _ in columns
        ]
        if any(found):
            table.add_row(label, *found)
    console.print(table)
    for name, note in notes.items():
        console.print(f"* {name}: {note}")
    bounds = Table("ratio", "of", "over", "ratio", "needed", "aim", "ok?")
    medians = samples.medians()
    ratios = compute_ratios(medians, targets)
    for target in targets:
        bounds.add_row(*_target_cells(target, ratios[target.name], passes(target, medians)))
    console.print(bounds)


def _cell(row: Row) -> str:
    if row.median is None or row.mad is None:
        return "failed"
    if row.unit == "requests":
        return f"{row.median:.0f} ±{row.mad:.0f}"
    scale, unit = (1e-6, "MB") if row.unit == "bytes" else (1.0, row.unit)
    return f"{row.median * scale:.3f} {unit} ±{row.mad * scale:.3f}"


def _target_cells(target: Target, ratio: float | None, passed: bool | None) -> list[str]:
    sign = "≥" if target.higher_is_better else "≤"
    also = "".join(f" and {metric} {sign} {bound:g} {UNITS[metric]}" for metric, bound in target.also)
    return [
        target.name,
        " ".join(target.above),
        " ".join(target.below) if target.below else "",
        "none" if ratio is None else f"{ratio:.3f}",
        f"{sign} {target.needed:g}{also}",
        "less" if target.aim is None else f"{sign} {target.aim:g}",
        {True: "yes", False: "NO", None: "?"}[passed],
    ]
