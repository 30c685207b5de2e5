"""`dcp-ckpt runs BASE` and `dcp-ckpt list RUN`: what is there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json, print_table
from dcp_ckpt.errors import CheckpointNotFound
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, read_catalogue
from dcp_ckpt.lifecycle.suspicion import suspect_reason
from dcp_ckpt.ops.runs import RunSummary, summarize_runs
from dcp_ckpt.storage import open_storage

__all__ = ["list_command", "runs_command"]


@click.command(name="runs")
@click.argument("base")
@checkpoint_command
def runs_command(base: str, as_json: bool) -> None:
    """List the runs under BASE."""
    summaries = summarize_runs(base)
    if not summaries:
        raise CheckpointNotFound("no runs here (no run-NNN directory with a run.json)", path=base)
    described = [_describe_run(summary) for summary in summaries]
    if as_json:
        print_json({"runs": described})
        return
    print_table(
        ("run", "name", "created", "checkpoints", "latest step", "best", "bytes", "host"),
        [
            (
                str(run["number"]),
                run["name"] or "",
                run["created_at"],
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
    """List the checkpoints of RUN, oldest first, and step directories that are none."""
    with closing(open_storage(run)) as storage:
        catalogue = read_catalogue(storage)
    if catalogue.run is None and not catalogue.entries and not catalogue.rejected:
        raise CheckpointNotFound("not a run: neither a run.json nor a step directory", path=run)
    if as_json:
        print_json(_describe_catalogue(catalogue))
        return
    shares = any(entry.manifest.shared_bytes for entry in catalogue.entries)
    rows = [_row(entry, catalogue, shares=shares) for entry in catalogue.entries]
    if rows:
        written = ["written"] if shares else []
        titles = ["step", "directory", "epoch", "created", "world", "bytes", *written]
        print_table([*titles, "metrics", "tags", "marks"], rows)
    else:
        click.echo("no checkpoints")
    for rejected in catalogue.rejected:
        click.echo(f"not a checkpoint: {rejected.directory}: {rejected.reason}")


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


def _best(summary: RunSummary) -> str:
    best = summary.best
    return "" if best is None else f"{best.metric}={best.value:.6g} at {best.step}"


def _describe_catalogue(catalogue: Catalogue) -> dict[str, Any]:
    return {
        "run": catalogue.run,
        "latest": str(catalogue.latest.directory) if catalogue.latest else None,
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


def _row(entry: CheckpointEntry, catalogue: Catalogue, *, shares: bool) -> tuple[str, ...]:
    marks = {
        "latest": entry is catalogue.latest,
        "bad": entry.is_bad,
        "suspect": entry.is_suspect,
        "pinned": entry.is_pinned,
    }
    return (
        str(entry.step),
        str(entry.directory),
        str(entry.epoch),
        entry.manifest.created_at,
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
