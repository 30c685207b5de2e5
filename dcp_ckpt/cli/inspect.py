"""`dcp-ckpt inspect REF`: what one checkpoint holds."""

from __future__ import annotations

import math
import shlex
from fnmatch import fnmatchcase
from typing import Any

import click

from dcp_ckpt.cli.output import (
    checkpoint_command,
    human_bytes,
    print_json,
    print_table,
    printable,
    short_json,
)
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.errors import LoadError, StateMismatch
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.lifecycle.runs import RunDocument, read_run
from dcp_ckpt.ops.checkpoint import Checkpoint, open_checkpoint
from dcp_ckpt.ops.stats import TensorStats, tensor_stats
from dcp_ckpt.ops.stock import StockCheckpoint
from dcp_ckpt.wording import shown_names

__all__ = ["inspect_command"]


@click.command(name="inspect")
@click.argument("ref")
@click.option("--key", "pattern", metavar="GLOB", default="*", help="Only tensors and values of these names.")
@click.option("--stats", is_flag=True, help="Read the tensors: minimum, maximum, mean, non-finite elements.")
@checkpoint_command
def inspect_command(ref: str, pattern: str, stats: bool, as_json: bool) -> None:
    """Show the tensors, values and origin of the checkpoint REF.

    \b
    dcp-ckpt inspect runs/run-001@latest
    dcp-ckpt inspect runs/run-001@best --key 'model.*' --stats
    """
    with open_checkpoint(ref) as checkpoint:
        header = _describe(checkpoint)
        names = [
            name
            for name in checkpoint.tensors
            if any(fnmatchcase(known, pattern) for known in (name, *checkpoint.aliases.get(name, ())))
        ]
        tensors = [_describe_tensor(checkpoint, name) for name in names]
        if stats:
            _add_stats(checkpoint, tensors)
        values = {
            name: entry.value
            for name, entry in sorted(checkpoint.values.items())
            if fnmatchcase(name, pattern)
        }
        if not tensors and not values and pattern != "*":
            raise StateMismatch(
                f"key {pattern!r} matches nothing; the checkpoint holds {shown_names(checkpoint.keys())}"
            )
    if as_json:
        print_json({**header, "tensors": tensors, "values": values})
        return
    _print_header(header)
    _print_tensors(tensors, stats)
    if values:
        click.echo()
        print_table(("value", "content"), [(name, short_json(value)) for name, value in values.items()])


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    if isinstance(checkpoint, StockCheckpoint):
        return {
            "directory": checkpoint.directory,
            "step": checkpoint.step,
            "bytes": checkpoint.num_bytes,
            "unverified": checkpoint.unverified,
            "unreadable": dict(checkpoint.unreadable),
        }
    manifest = checkpoint.manifest
    run = _run(checkpoint)
    return {
        "directory": checkpoint.directory,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "created_at": manifest.created_at,
        "bytes": manifest.total_bytes,
        "written_bytes": manifest.written_bytes,
        "shared_with": _shared_with(checkpoint),
        "metrics": manifest.metrics,
        "tags": manifest.tags,
        "run_id": manifest.run_id,
        "format_version": manifest.format_version,
        "run": run if run and run.run_id == manifest.run_id else None,
    }


def _shared_with(checkpoint: Checkpoint) -> dict[str, int]:
    """The older checkpoints that wrote files of this one, and the bytes of those files."""
    found: dict[str, int] = {}
    if not checkpoint.manifest.shared_bytes:
        return found
    for rank in range(checkpoint.manifest.world_size):
        for file in checkpoint.fragment(rank).files:
            if file.origin is not None:
                found[file.origin.directory] = found.get(file.origin.directory, 0) + file.size_bytes
    return dict(sorted(found.items()))


def _run(checkpoint: Checkpoint) -> RunDocument | None:
    """The run around the checkpoint; a copied step directory has none, and a damaged one is not needed."""
    try:
        return read_run(checkpoint.storage)
    except LoadError:
        return None


def _add_stats(checkpoint: Checkpoint, tensors: list[dict[str, Any]]) -> None:
    """Read all of them, one at a time."""
    total_bytes = sum(described["bytes"] for described in tensors)
    done_bytes = 0
    with progress_bar("stats") as progress:
        for described in tensors:
            described["stats"] = tensor_stats(checkpoint.read_tensor(described["name"]))
            done_bytes += described["bytes"]
            if progress is not None:
                progress(done_bytes, total_bytes)


def _describe_tensor(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    entry = checkpoint.tensors[name]
    mesh = checkpoint.mesh(name)
    return {
        "name": name,
        "aliases": list(checkpoint.aliases.get(name, ())),
        "dtype": entry.dtype,
        "shape": entry.shape,
        "placements": entry.placements,
        "mesh_shape": mesh.shape if mesh else None,
        "bytes": math.prod(entry.shape) * DTYPES[entry.dtype].item_bytes,
    }


def _print_stock_header(header: dict[str, Any]) -> None:
    click.echo(f"directory   {header['directory']}")
    click.echo(f"step        {'not stated' if header['step'] is None else header['step']}")
    click.echo(f"size        {human_bytes(header['bytes'])}")
    click.echo(f"note        {header['unverified']}")
    for name, reason in sorted(header["unreadable"].items()):
        click.echo(f"unreadable  {name}: {reason}")


def _print_header(header: dict[str, Any]) -> None:
    if "unverified" in header:
        _print_stock_header(header)
        return
    run: RunDocument | None = header["run"]
    lines = [
        ("directory", header["directory"]),
        ("step", f"{header['step']} (epoch {header['epoch']}, attempt {header['attempt']})"),
        ("created", header["created_at"]),
        ("world size", str(header["world_size"])),
        ("size", human_bytes(header["bytes"])),
        ("shared", ", ".join(f"{human_bytes(n)} of {name}" for name, n in header["shared_with"].items())),
        ("metrics", short_json(header["metrics"]) if header["metrics"] else ""),
        ("tags", ", ".join(header["tags"])),
        ("run", f"{run.number} {run.name or ''} {run.run_id}" if run else header["run_id"]),
        ("host", run.host if run else ""),
        ("command", shlex.join(run.command) if run else ""),
        ("commit", _commit(run) if run else ""),
        ("versions", " ".join(f"{name} {version}" for name, version in run.versions.items()) if run else ""),
    ]
    for title, text in lines:
        if text:
            click.echo(f"{title:<11} {printable(' '.join(text.split()))}")


def _commit(run: RunDocument) -> str:
    git = run.git or {}
    changes = ", with changes that were not committed" if git.get("dirty") else ""
    return f"{git['commit']}{changes}" if "commit" in git else ""


def _print_tensors(tensors: list[dict[str, Any]], stats: bool) -> None:
    columns = ["tensor", "dtype", "shape", "placements", "bytes"]
    rows = [
        [
            " = ".join((tensor["name"], *tensor["aliases"])),
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            _placements(tensor),
            human_bytes(tensor["bytes"]),
            *(_stats_cells(tensor["stats"]) if stats else ()),
        ]
        for tensor in tensors
    ]
    if stats:
        columns += ["min", "max", "mean", "non-finite"]
    click.echo()
    print_table(columns, rows)


def _placements(tensor: dict[str, Any]) -> str:
    if tensor["mesh_shape"] is None:
        return "whole"
    return f"{','.join(tensor['placements'])} on {'x'.join(map(str, tensor['mesh_shape']))}"


def _stats_cells(stats: TensorStats) -> list[str]:
    numbers = ["" if number is None else f"{number:.6g}" for number in (stats.min, stats.max, stats.mean)]
    return [*numbers, str(stats.num_nonfinite)]
