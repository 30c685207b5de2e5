"""`dcp-ckpt import SRC RUN --step N`: files of other programs as a checkpoint of a run."""

from __future__ import annotations

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.ops.import_checkpoint import ImportReport, import_checkpoint

__all__ = ["import_command"]


@click.command(name="import")
@click.argument("src")
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), required=True, metavar="N", help="Of the checkpoint.")
@click.option(
    "--prefix",
    metavar="PREFIX",
    default="",
    help="What all names gain: 'model.' for the bare tensors of a model, to load them with TrainState.",
)
@click.option("--force", is_flag=True, help="Go on although a live owner holds the run; it is fenced then.")
@checkpoint_command
def import_command(src: str, run: str, step: int, prefix: str, force: bool, as_json: bool) -> None:
    """Make the checkpoint of step N of RUN out of SRC.

    SRC is the directory of a stock DCP checkpoint, a safetensors file, the directory or the index of a model
    in shards, or a torch.save file. No pickle is executed. RUN is made if nothing is there; nothing in it is
    overwritten, and N has to be greater than all of its steps.

    \b
    dcp-ckpt import model/ runs/run-007 --step 0 --prefix model.
    dcp-ckpt import pytorch_model.bin runs/run-007 --step 0 --prefix model.
    dcp-ckpt import /old/checkpoints/step-1000 runs/run-007 --step 1000
    """
    with progress_bar("import") as progress:
        report = import_checkpoint(src, run, step=step, prefix=prefix, force=force, progress=progress)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: ImportReport) -> None:
    values = f" and {report.num_values} values" if report.num_values else ""
    click.echo(
        f"imported {report.num_tensors} tensors{values} ({report.kind}) to {report.path}: "
        f"{human_bytes(report.num_bytes)}"
    )
    if report.prefix:
        click.echo(f"names: with {report.prefix!r}")
    for reason, count in report.left_out.items():
        click.echo(f"left out: {count} {reason}")
    if report.unverified:
        click.echo(f"note: {report.unverified}")
