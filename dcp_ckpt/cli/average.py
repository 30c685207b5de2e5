"""`dcp-ckpt average REF... --out RUN --step N`: one checkpoint out of several."""

from __future__ import annotations

from typing import Any

import click

from dcp_ckpt.cli.output import checkpoint_command, counted, human_bytes, print_json, print_table
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.ops.average import AverageReport, average

__all__ = ["average_command"]


class _WeightsType(click.ParamType[list[float]]):
    """`1,2,1` as numbers."""

    name = "weights"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r}: numbers separated by commas, as in 1,2,1", param, ctx)


@click.command(name="average")
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--out", "run", metavar="RUN", required=True, help="The run that the average goes into.")
@click.option("--step", type=click.IntRange(min=0), required=True, metavar="N", help="Of the new checkpoint.")
@click.option(
    "--weights", type=_WeightsType(), metavar="W,W,...", help="One for each REF. Default: all are equal."
)
@click.option(
    "--last", type=click.IntRange(min=1), metavar="K", help="REF is a run: its K newest valid checkpoints."
)
@click.option("--include-optimizer", is_flag=True, help="Average the state of optimizers, too.")
@click.option("--force", is_flag=True, help="Go on although a live owner holds the run; it is fenced then.")
@checkpoint_command
def average_command(refs: tuple[str, ...], run: str, as_json: bool, **options: Any) -> None:
    """Make the checkpoint of step N of RUN out of the average of all REF.

    Floating tensors are averaged in float32 (float64 for float64); integers and values are those of the
    newest. States of optimizers and values of single ranks are left out. Names, shapes and dtypes have to be
    equal; layouts may differ. RUN is made if nothing is there, and had better be another one than that of a
    training, which would go on from the average as its newest checkpoint.

    \b
    dcp-ckpt average runs/run-001 --last 3 --out runs/run-002 --step 0
    dcp-ckpt average runs/run-001@800 runs/run-001@1000 --weights 1,3 --out runs/run-002 --step 0
    """
    with progress_bar("average") as progress:
        report = average(refs, run, progress=progress, **options)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: AverageReport) -> None:
    rows = [
        (source.path, "" if source.step is None else str(source.step), f"{source.weight:.6g}")
        for source in report.sources
    ]
    print_table(("checkpoint", "step", "weight"), rows)
    click.echo(f"averaged {report.num_averaged} tensors to {report.path}: {human_bytes(report.num_bytes)}")
    if report.num_copied or report.num_values:
        click.echo(
            f"copied from {report.newest}: {counted(report.num_copied, 'tensor')} (not floating), "
            f"{counted(report.num_values, 'value')}"
        )
    for reason, count in report.left_out.items():
        click.echo(f"left out: {count} {reason}")
    if report.unverified:
        click.echo(f"note: {report.unverified}")
