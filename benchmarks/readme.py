"""The table and the plot of the README, from a result file.

    python benchmarks/readme.py benchmarks/results/2026-11-28.json

Pure but for reading and writing. matplotlib is in the `bench` extra; without it the plot stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ratios import OURS, STOCK_LOAD, STOCK_SAVE, THREAD
from benchmarks.results import medians_of, shown_value, verdicts

__all__ = ["README", "marked", "replaced", "section", "update"]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "saves.svg"
BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"

_ROWS: Sequence[tuple[str, str, str, str]] = (
    ("`save()` and its fence hold the training", "stall_sharded", THREAD, "stall_sharded"),
    ("the same, DDP: every rank holds everything", "stall_replicated", THREAD, "stall_replicated"),
    ("save until durable (fsync and commit for both)", "durable", STOCK_SAVE, "durable"),
    ("first save of a fresh process until durable", "first_save", "dcp.async_save process", "first_save"),
    ("training slowed down by a save, in all", "tax", THREAD, "tax"),
    ("load on the same ranks, cached", "load_same", STOCK_LOAD, "load_same"),
    ("8 ranks' state on 4", "load_8_4", STOCK_LOAD, "load_8_4"),
    ("4 ranks' state on 8", "load_4_8", STOCK_LOAD, "load_4_8"),
    ("DDP load, cached", "ddp_load_time", STOCK_LOAD, "ddp_load_time"),
)


def update(result: Path) -> None:
    """Write table and plot of a result file into the repository."""
    document = json.loads(result.read_text())
    README.write_text(replaced(README.read_text(), section(document, result.name)))
    draw(document)


def section(document: Mapping[str, Any], name: str) -> str:
    """What stands between the marks."""
    result = document["scripts"]["save_latency"]
    medians, machine = medians_of(result), result["machine"]
    target = "bench" if document["quick"] else "bench-full"
    lines = [
        f"{machine['world_size']} ranks, {machine['size_gib']:g} GiB of sharded state, "
        f"{machine['cores']} cores, medians of {machine['rounds']} interleaved rounds, every load compared",
        f"bit for bit ([benchmarks/results/{name}](benchmarks/results/{name}), by `make {target}`):",
        "",
        "| | dcp_ckpt | stock DCP | ratio | needed |",
        "|---|---|---|---|---|",
    ]
    by_name = {
        verdict.target.name: verdict for verdict in verdicts(document) if verdict.script == "save_latency"
    }
    for label, metric, system, ratio in _ROWS:
        ours, theirs = medians.get((metric, OURS)), medians.get((metric, system))
        if ours is None or theirs is None:
            continue
        verdict = by_name[ratio]
        lines.append(
            f"| {label} | {ours:.3g} s | `{system}` {theirs:.3g} s | {shown_value(verdict.ratio)} | "
            f"{verdict.target.needed:g} |"
        )
    limits = ", ".join(
        f"{what} {medians[metric, 'machine']:.2g} s"
        for what, metric in (
            ("copying the bytes in memory", "memcpy"),
            ("writing them past the page cache", "direct_write"),
            ("reading them back so", "direct_read"),
        )
        if (metric, "machine") in medians
    )
    lines += [
        "",
        f"The machine by itself, in the same run: {limits}.",
        "",
        "![stall and durable time by system](docs/saves.svg)",
    ]
    return "\n".join(lines)


def marked(text: str) -> str:
    """What stands between the marks now."""
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def replaced(text: str, content: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def draw(document: Mapping[str, Any]) -> None:
    """Stall and durable time by system, as an SVG."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed (pip install -e '.[bench]'): the plot stays as it is")
        return
    mpl.use("svg")
    from matplotlib import pyplot

    # The same bytes for the same numbers.
    mpl.rcParams.update({"svg.hashsalt": "dcp_ckpt", "svg.fonttype": "none", "font.size": 9})
    result = document["scripts"]["save_latency"]
    medians = medians_of(result)
    volatile = {row["system"] for row in result["rows"] if row["note"].startswith("not durable")}
    systems = [system for metric, system in medians if metric == "durable"]
    stalls = [
        medians.get(("stall_sharded", system), medians.get(("held", system), 0.0)) for system in systems
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 0.4 * len(systems) + 1), sharey=True)
    for axis, values, title in (
        (axes[0], stalls, "training held (s)"),
        (axes[1], [medians["durable", system] for system in systems], "until durable (s; *: without fsync)"),
    ):
        colors = ["#2a6fbb" if system == OURS else "#b8c4cf" for system in systems]
        names = [f"{system}*" if system in volatile else system for system in systems]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3)
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.18 * max(values))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    update(Path(sys.argv[1]))
