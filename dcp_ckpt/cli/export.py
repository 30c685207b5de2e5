"""`dcp-ckpt export REF OUT`: a checkpoint for other programs."""

from __future__ import annotations

import re
from typing import Any

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.ops.export import ExportReport, export

__all__ = ["export_command"]

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)


class _SizeType(click.ParamType[int]):
    """`5GB` or `4GiB` as a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size: write it as in 5GB (10^9 bytes) or 4GiB (2^30)", param, ctx)
        unit = 1024 if match[3] else 1000
        return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))


@click.command(name="export")
@click.argument("ref")
@click.argument("out")
@click.option(
    "--format",
    "format",
    type=click.Choice(["safetensors", "torch", "dcp"]),
    default="safetensors",
    show_default=True,
    help="safetensors: a directory as Hugging Face has it; torch: a file for torch.load; dcp: a directory "
    "for stock dcp.load.",
)
@click.option("--dtype", metavar="DTYPE", help="Convert floating tensors: bf16, fp16, fp32 or fp64.")
@click.option(
    "--include",
    metavar="GLOB",
    multiple=True,
    help="Only tensors of these stored names. Default: those of models; for dcp everything.",
)
@click.option("--exclude", metavar="GLOB", multiple=True, help="None of these.")
@click.option(
    "--strip-prefix",
    metavar="PREFIX",
    help="What names lose. Default: 'model.', with the key if one of several models is exported alone; for "
    "dcp nothing.",
)
@click.option(
    "--max-shard-size",
    type=_SizeType(),
    metavar="SIZE",
    help="Of a safetensors file, as in 5GB (the default).",
)
@click.option("--fuse-lora", is_flag=True, help="Merge LoRA adapters into their weights.")
@click.option("--lora-alpha", type=float, metavar="A", help="Scale A / rank, where no scale is stored.")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@checkpoint_command
def export_command(ref: str, out: str, max_shard_size: int | None, as_json: bool, **options: Any) -> None:
    """Write the checkpoint REF to OUT for other programs.

    OUT is a directory; for torch a file, and for safetensors, too, if its name ends in .safetensors. One
    tensor is in memory at a time, and every byte read is checked. OUT appears when all of it is whole.

    \b
    dcp-ckpt export runs/run-001@best model/ --dtype bf16
    dcp-ckpt export runs/run-001@latest model.pt --format torch
    dcp-ckpt export runs/run-001@1000 stock/ --format dcp
    dcp-ckpt export runs/run-002@latest merged/ --fuse-lora
    """
    with progress_bar("export") as progress:
        report = export(ref, out, max_shard_bytes=max_shard_size, progress=progress, **options)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: ExportReport) -> None:
    step = "" if report.step is None else f" of step {report.step}"
    values = f" and {report.num_values} values" if report.num_values else ""
    click.echo(
        f"exported {report.num_tensors} tensors{values}{step} to {report.path}: {len(report.files)} "
        f"file{'s' * (len(report.files) > 1)}, {human_bytes(report.num_bytes)}"
    )
    if report.prefix:
        click.echo(f"names: without {report.prefix!r}")
    if report.num_fused:
        click.echo(f"fused: {report.num_fused} adapters")
    for dtypes, count in report.converted.items():
        click.echo(f"converted: {count} from {dtypes}")
    for reason, count in report.left_out.items():
        click.echo(f"left out: {count} {reason}")
    for note in filter(None, (*report.notes, report.unverified)):
        click.echo(f"note: {note}")
