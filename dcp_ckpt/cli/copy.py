"""`dcp-ckpt copy REF DST`: a checkpoint in another place, checked byte by byte."""

from __future__ import annotations

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.ops.copy import CopyReport, copy_checkpoint

__all__ = ["copy_command"]


@click.command(name="copy")
@click.argument("ref")
@click.argument("destination", metavar="DST")
@checkpoint_command
def copy_command(ref: str, destination: str, as_json: bool) -> None:
    """Copy the checkpoint REF to DST, which becomes a checkpoint directory.

    If DST ends in "/" or is a directory that is not a checkpoint, the copy becomes DST/step-00001000, as
    with cp. Every byte is checked on the way; the copy is a checkpoint only when all of it is there. Never
    overwrites. If it fails, give the same command again: what is there is checked and kept.

    \b
    dcp-ckpt copy runs/run-001@best /backup/
    dcp-ckpt copy runs/run-001@1000 /backup/before-the-change
    dcp-ckpt copy s3://bucket/run-001@latest .
    """
    with progress_bar("copy") as progress:
        report = copy_checkpoint(ref, destination, progress=progress)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: CopyReport) -> None:
    kept = f" ({human_bytes(report.kept_bytes)} of them were there)" if report.kept_bytes else ""
    total = human_bytes(report.copied_bytes + report.kept_bytes)
    click.echo(
        f"copied step {report.step} to {report.path}: {report.num_files} files, {total}{kept}, all checked"
    )
    for note in report.notes:
        click.echo(f"note: {note}")
