"""`dcp-ckpt verify REF|RUN`: is every byte what was written?"""

from __future__ import annotations

import sys

import click

from dcp_ckpt.cli.output import EXIT_CORRUPT, checkpoint_command, human_bytes, print_json
from dcp_ckpt.ops.verify import VerifyReport, verify

__all__ = ["verify_command"]


@click.command(name="verify")
@click.argument("target", metavar="REF|RUN")
@checkpoint_command
def verify_command(target: str, as_json: bool) -> None:
    """Check all bytes of a checkpoint, or of all checkpoints of a run, against their digests.

    Names every damaged file, byte range and tensor. Exit code 4 if there is any. Stock DCP checkpoints have
    no digests: only sizes and the structure of their containers are checked.
    """
    report = verify(target)
    if as_json:
        checkpoints, skipped = report.checkpoints, report.skipped
        print_json({"ok": report.ok, "checkpoints": checkpoints, "skipped": skipped})
    else:
        _print_report(report)
    if not report.ok:
        sys.exit(EXIT_CORRUPT)


def _print_report(report: VerifyReport) -> None:
    for skipped in report.skipped:
        click.echo(f"skipped {skipped.directory}: {skipped.reason}")
    for checked in report.checkpoints:
        for problem in checked.problems:
            click.echo(f"DAMAGED {problem}")
        if not checked.problems:
            size = human_bytes(checked.num_bytes)
            click.echo(f"ok {checked.directory}: {checked.num_files} files, {size}")
        if checked.unverified:
            click.echo(f"   {checked.unverified}")
    num_damaged = sum(bool(checked.problems) for checked in report.checkpoints)
    click.echo(f"{len(report.checkpoints)} checked, {num_damaged} damaged")
