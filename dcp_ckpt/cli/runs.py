"""`dcp-ckpt runs BASE` and `dcp-ckpt list RUN`: what is there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import click

from dcp_ckpt.cli.output import (
    checkpoint_command,
    human_bytes,
    human_time,
    print_by_reason,
    print_json,
    print_table,
)
from dcp_ckpt.errors import CheckpointNotFound
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, read_catalogue, step_directories
from dcp_ckpt.lifecycle.no_run import not_a_run
from dcp_ckpt.lifecycle.runs import RunParent, read_run
from dcp_ckpt.lifecycle.suspicion import suspect_reason
from dcp_ckpt.ops.runs import RunSummary, monitored, summarize_runs
from dcp_ckpt.storage import open_storage

__all__ = ["list_command", "runs_command"]


@click.command(name="runs")
@click.argument("base")
@checkpoint_command
def runs_command(base: str, as_json: bool) -> None:
    """List the runs under BASE, with their newest and best checkpoints.

    \b
    dcp-ckpt runs runs
    dcp-ckpt runs s3://bucket/runs
    """
    summaries = summarize_runs(base)
    if not summaries:
        raise _no_runs(base)
    described = [_describe_run(summary) for summary in summaries]
    if as_json:
        print_json({"runs": described})
        return
    forks = any(run["parent"] for run in described)
    print_table(
        (
            "run",
            "name",
            *(["from"] if forks else []),
            "created (UTC)",
            "checkpoints",
            "latest step",
            "best",
            "bytes",
            "host",
        ),
        [
            (
                str(run["number"]),
                run["name"] or "",
                *([_origin(run["parent"])] if forks else []),
                human_time(run["created_at"]),
                str(run["checkpoints"]),
                "" if run["latest_step"] is None else str(run["latest_step"]),
                _best(summary),
                human_bytes(run["bytes"]),
                run["host"],
            )
            for summary, run in zip(summaries, described, strict=True)
        ],
    )


@click.command(name="list")
@click.argument("run")
@checkpoint_command
def list_command(run: str, as_json: bool) -> None:
    """List the checkpoints of RUN, oldest first, and step directories that are none.

    \b
    dcp-ckpt list runs/run-001
    """
    with closing(open_storage(run)) as storage:
        catalogue = read_catalogue(storage)
        if catalogue.run is None and not catalogue.entries and not catalogue.rejected:
            raise not_a_run(storage, run)
    if as_json:
        print_json(_describe_catalogue(catalogue))
        return
    shares = any(entry.manifest.shared_bytes for entry in catalogue.entries)
    best = _best_entry(catalogue)
    rows = [_row(entry, catalogue, best, shares=shares) for entry in catalogue.entries]
    if rows:
        written = ["written"] if shares else []
        titles = ["step", "directory", "epoch", "created (UTC)", "world", "bytes", *written]
        print_table([*titles, "metrics", "tags", "marks"], rows)
    else:
        click.echo("no checkpoints")
    rejected = [(str(one.directory), one.reason) for one in catalogue.rejected]
    print_by_reason("not a checkpoint:", rejected)


def _best_entry(catalogue: Catalogue) -> CheckpointEntry | None:
    wanted = monitored(catalogue.run)
    return catalogue.best(*wanted) if wanted else None


def _no_runs(base: str) -> CheckpointNotFound:
    with closing(open_storage(base)) as storage:
        if read_run(storage) is not None or step_directories(storage):
            return CheckpointNotFound(f"this is a run itself: dcp-ckpt list {base}", path=base)
    return CheckpointNotFound("no runs here (no run-NNN directory with a run.json)", path=base)


def _describe_run(summary: RunSummary) -> dict[str, Any]:
    run, best = summary.run, summary.best
    return {
        "number": run.number,
        "name": run.name,
        "path": run.path,
        "run_id": run.run_id,
        "created_at": run.document.created_at,
        "host": run.document.host,
        "parent": run.document.parent,
        "checkpoints": summary.num_checkpoints,
        "latest_step": summary.latest_step,
        "best": None if best is None else asdict(best) | {"value": encode_value(best.value, path="best")},
        "bytes": summary.num_bytes,
        "written_bytes": summary.written_bytes,
    }


def _origin(parent: RunParent | None) -> str:
    return "" if parent is None else f"{parent.run}@{parent.step}"


def _best(summary: RunSummary) -> str:
    best = summary.best
    return "" if best is None else f"{best.metric}={best.value:.6g} at {best.step}"


def _describe_catalogue(catalogue: Catalogue) -> dict[str, Any]:
    best = _best_entry(catalogue)
    return {
        "run": catalogue.run,
        "latest": str(catalogue.latest.directory) if catalogue.latest else None,
        "best": str(best.directory) if best else None,
        "checkpoints": [
            {
                "directory": str(entry.directory),
                "step": entry.step,
                "epoch": entry.epoch,
                "created_at": entry.manifest.created_at,
                "world_size": entry.manifest.world_size,
                "bytes": entry.manifest.total_bytes,
                "written_bytes": entry.manifest.written_bytes,
                "metrics": entry.encoded_metrics,
                "tags": entry.manifest.tags,
                "bad": entry.is_bad,
                "pinned": entry.is_pinned,
                "suspect": suspect_reason(entry),
            }
            for entry in catalogue.entries
        ],
        "rejected": [
            {
                "directory": str(rejected.directory),
                "state": rejected.state,
                "reason": rejected.reason,
            }
            for rejected in catalogue.rejected
        ],
    }


def _row(
    entry: CheckpointEntry, catalogue: Catalogue, best: CheckpointEntry | None, *, shares: bool
) -> tuple[str, ...]:
    marks = {
        "latest": entry is catalogue.latest,
        "best": entry is best,
        "bad": entry.is_bad,
        "suspect": entry.is_suspect,
        "pinned": entry.is_pinned,
    }
    return (
        str(entry.step),
        str(entry.directory),
        str(entry.epoch),
        human_time(entry.manifest.created_at),
        str(entry.manifest.world_size),
        human_bytes(entry.manifest.total_bytes),
        *([human_bytes(entry.manifest.written_bytes)] if shares else []),
        _metrics(entry.metrics),
        ",".join(entry.manifest.tags),
        ",".join(name for name, applies in marks.items() if applies),
    )


def _metrics(metrics: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in sorted(metrics.items())
    )
