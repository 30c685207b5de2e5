"""`dcp-ckpt recover RUN`: commit what was finished but not committed, and remove what never can be."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict

import click

from dcp_ckpt.cli.output import checkpoint_command, print_json
from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.lifecycle.catalogue import step_directories
from dcp_ckpt.lifecycle.no_run import not_a_run
from dcp_ckpt.lifecycle.recover import RecoverReport, recover_run
from dcp_ckpt.lifecycle.runs import read_run
from dcp_ckpt.storage import open_storage

__all__ = ["recover_command"]


@click.command(name="recover")
@click.argument("run")
@click.option("--force", is_flag=True, help="Go on although a live owner holds the run; it is fenced then.")
@click.option(
    "--wait-seconds",
    type=click.FloatRange(min=0),
    default=CheckpointConfig.recover_wait_seconds,
    show_default=True,
    metavar="SECONDS",
    help="For writers that still work, before a live owner is taken for one.",
)
@checkpoint_command
def recover_command(run: str, force: bool, wait_seconds: float, as_json: bool) -> None:
    """Complete and clean up RUN after a crash; a start does the same by itself.

    Commits attempts that all ranks finished and removes those that never can be a checkpoint. Waits for
    writers that still work, and refuses while a live owner holds the run.

    \b
    dcp-ckpt recover runs/run-001
    """
    with closing(open_storage(run)) as storage:
        # Recovering claims an epoch: a mistyped path must not become a run by that.
        if read_run(storage) is None and not step_directories(storage):
            raise not_a_run(storage, run)
        report = recover_run(storage, force=force, wait_seconds=wait_seconds)
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)


def _print_report(report: RecoverReport) -> None:
    found = {"committed": report.committed, "never finished": report.debris, "removed": report.removed}
    for title, entries in found.items():
        for entry in entries:
            click.echo(f"{title} {entry}")
    counts = ", ".join(f"{len(entries)} {title}" for title, entries in found.items())
    click.echo(f"{counts if any(found.values()) else 'nothing to recover'} (epoch {report.epoch})")
