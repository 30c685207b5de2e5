"""`dcp-ckpt verify REF|RUN`: is every byte what was written?"""

from __future__ import annotations

import sys

import click

from dcp_ckpt.cli.output import (
    EXIT_CORRUPT,
    EXIT_FAILED,
    checkpoint_command,
    human_bytes,
    print_by_reason,
    print_json,
)
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.ops.verify import VerifyReport, verify

__all__ = ["verify_command"]


@click.command(name="verify")
@click.argument("target", metavar="REF|RUN")
@checkpoint_command
def verify_command(target: str, as_json: bool) -> None:
    """Check all bytes of a checkpoint, or of all checkpoints of a run, against their digests.

    Names every damaged file and byte range, and the first tensors in it; with --json all of them. Exit code 4
    if anything is damaged, 1 if reading was not allowed. Stock DCP checkpoints have no digests: only sizes
    and the structure of their containers are checked.

    \b
    dcp-ckpt verify runs/run-001
    dcp-ckpt verify s3://bucket/runs/run-001@best
    """
    with progress_bar("verify") as progress:
        report = verify(target, progress=progress)
    if as_json:
        checkpoints, skipped = report.checkpoints, report.skipped
        print_json({"ok": report.ok, "checkpoints": checkpoints, "skipped": skipped})
    else:
        _print_report(report)
    if not report.ok:
        sys.exit(EXIT_CORRUPT if report.is_damaged else EXIT_FAILED)


def _print_report(report: VerifyReport) -> None:
    print_by_reason("skipped", ((skipped.directory, skipped.reason) for skipped in report.skipped))
    for checked in report.checkpoints:
        for problem in checked.problems:
            click.echo(f"{'UNCHECKED' if problem.kind == 'unchecked' else 'DAMAGED'} {problem}")
        if not checked.problems:
            size = human_bytes(checked.num_bytes)
            click.echo(f"ok {checked.directory}: {checked.num_files} files, {size}")
        if checked.unverified:
            click.echo(f"   {checked.unverified}")
    num_wrong = sum(bool(checked.problems) for checked in report.checkpoints)
    what = "damaged" if report.is_damaged or report.ok else "unchecked"
    click.echo(f"{len(report.checkpoints)} checked, {num_wrong} {what}")
