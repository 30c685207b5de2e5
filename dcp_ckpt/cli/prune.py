"""`dcp-ckpt prune RUN`: remove checkpoints that nobody asked to keep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json, print_table
from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.lifecycle.catalogue import step_directories
from dcp_ckpt.lifecycle.no_run import not_a_run
from dcp_ckpt.lifecycle.prune import PruneItem, PrunePlan, PruneReport, plan_prune, prune_run
from dcp_ckpt.lifecycle.runs import read_run
from dcp_ckpt.policies import AnyOf, BestN, EveryNSteps, KeepPolicy, LatestN, Mode
from dcp_ckpt.storage import Storage, open_storage

__all__ = ["prune_command"]

_AT_LEAST_1 = click.IntRange(min=1)


@click.command(name="prune")
@click.argument("run")
@click.option("--keep-last", type=_AT_LEAST_1, metavar="N", help="Keep the N newest.")
@click.option("--keep-every", type=_AT_LEAST_1, metavar="K", help="Keep steps that are multiples of K.")
@click.option("--keep-best", type=_AT_LEAST_1, metavar="M", help="Keep the M best; needs the next two.")
@click.option("--monitor", metavar="NAME", help="The metric that says which is best.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of it is better.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, and touch nothing.")
@click.option("--force", is_flag=True, help="Go on although a live owner holds the run; it is fenced then.")
@click.option(
    "--grace-seconds",
    type=click.FloatRange(min=0),
    default=CheckpointConfig.grace_seconds,
    show_default=True,
    metavar="SECONDS",
    help="Between taking checkpoints back and deleting their files.",
)
@checkpoint_command
def prune_command(
    run: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: int | None,
    monitor: str | None,
    mode: Mode | None,
    dry_run: bool,
    force: bool,
    grace_seconds: float,
    as_json: bool,
) -> None:
    """Remove all checkpoints of RUN that no option keeps; what any of them keeps stays.

    At least one of --keep-last, --keep-every and --keep-best is needed. Whatever they say, these stay: the
    newest checkpoint, the newest valid one, the one that the newest training resumed from, pinned ones, those
    marked bad, and what is unreadable or of another run. Unfinished saves of earlier starts are cleared up
    first, as at every start. Refuses while a live owner holds the run. After an interruption, run it again.

    \b
    dcp-ckpt prune runs/run-001 --keep-last 3 --dry-run
    dcp-ckpt prune runs/run-001 --keep-last 1 --keep-every 1000
    dcp-ckpt prune runs/run-001 --keep-best 2 --monitor val_loss --mode min
    """
    keep = _policy(keep_last, keep_every, keep_best, monitor, mode)
    with closing(open_storage(run)) as storage:
        _require_run(storage, run)
        if dry_run:
            plan = plan_prune(storage, keep)
            print_json(_describe_plan(plan)) if as_json else _print_plan(plan)
            return
        report = prune_run(storage, keep, grace_seconds=grace_seconds, force=force)
    print_json(_describe_report(report)) if as_json else _print_report(report)


def _policy(
    keep_last: int | None,
    keep_every: int | None,
    keep_best: int | None,
    monitor: str | None,
    mode: Mode | None,
) -> KeepPolicy:
    policies: list[KeepPolicy] = []
    if keep_last is not None:
        policies.append(LatestN(keep_last))
    if keep_every is not None:
        policies.append(EveryNSteps(keep_every))
    if keep_best is not None:
        # Guessing between min and max would remove the best and keep the worst.
        if monitor is None or mode is None:
            raise click.UsageError("--keep-best needs --monitor NAME and --mode min or max")
        policies.append(BestN(keep_best, monitor, mode))
    elif monitor is not None or mode is not None:
        raise click.UsageError("--monitor and --mode go with --keep-best")
    if not policies:
        raise click.UsageError(
            "say what to keep: at least one of --keep-last N, --keep-every K and --keep-best M"
        )
    return policies[0] if len(policies) == 1 else AnyOf(*policies)


def _require_run(storage: Storage, run: str) -> None:
    """Pruning claims an epoch: a mistyped path must not become a run by that."""
    if read_run(storage) is None and not step_directories(storage):
        raise not_a_run(storage, run)


def _describe_plan(plan: PrunePlan) -> dict[str, Any]:
    return {
        "dry_run": True,
        "epoch": None,
        "kept": _describe_items(plan.kept),
        "removed": _describe_items(plan.removed),
        "spared": [],
        "recovered": None,
        "freed_bytes": plan.freed_bytes,
    }


def _describe_report(report: PruneReport) -> dict[str, Any]:
    return {
        "dry_run": False,
        "epoch": report.epoch,
        "kept": _describe_items(report.kept),
        "removed": _describe_items(report.removed),
        "spared": _describe_items(report.spared),
        "recovered": {
            "committed": report.recovered.committed,
            "debris": report.recovered.debris,
            "removed": report.recovered.removed,
        },
        "freed_bytes": report.freed_bytes,
    }


def _describe_items(items: Sequence[PruneItem]) -> list[dict[str, Any]]:
    return [
        {
            "directory": str(item.directory),
            "epoch": item.epoch,
            "step": item.step,
            "bytes": item.size_bytes,
            "shared_bytes": item.shared_bytes,
            "reason": item.reason,
        }
        for item in items
    ]


def _print_plan(plan: PrunePlan) -> None:
    _print_items({"keep": plan.kept, "remove": plan.removed})
    size = _size(plan)
    click.echo(
        f"{len(plan.kept)} to keep, {len(plan.removed)} to remove, {size} to free; nothing was touched"
    )


def _print_report(report: PruneReport) -> None:
    for directory in report.recovered.committed:
        click.echo(f"committed {directory}, which the start before had finished writing")
    for name in report.recovered.removed:
        click.echo(f"cleared away {name}")
    _print_items({"kept": report.kept, "removed": report.removed, "spared": report.spared})
    num_kept = len(report.kept) + len(report.spared)
    size = _size(report)
    click.echo(f"{num_kept} kept, {len(report.removed)} removed, {size} freed (epoch {report.epoch})")


def _size(prune: PrunePlan | PruneReport) -> str:
    return f"{'up to ' if prune.shares else ''}{human_bytes(prune.freed_bytes)}"


def _print_items(verdicts: dict[str, tuple[PruneItem, ...]]) -> None:
    rows = [(item, verdict) for verdict, items in verdicts.items() for item in items]
    rows.sort(key=lambda row: (row[0].epoch, row[0].step))
    if rows:
        print_table(
            ("step", "directory", "epoch", "bytes", "verdict", "reason"),
            [
                (
                    str(item.step),
                    str(item.directory),
                    str(item.epoch),
                    human_bytes(item.size_bytes),
                    verdict,
                    item.reason,
                )
                for item, verdict in rows
            ],
        )
    else:
        click.echo("no checkpoints")
