"""`dcp-ckpt diff A B`: what differs between two checkpoints."""

from __future__ import annotations

from dataclasses import asdict

import click

from dcp_ckpt.cli.output import checkpoint_command, counted, print_json, print_table, short_json_pair
from dcp_ckpt.cli.progress import progress_bar
from dcp_ckpt.ops.diff import DiffReport, TensorDiff, diff

__all__ = ["diff_command"]


@click.command(name="diff")
@click.argument("a")
@click.argument("b")
@click.option("--key", metavar="GLOB", default="*", help="Only tensors and values of these names.")
@checkpoint_command
def diff_command(a: str, b: str, key: str, as_json: bool) -> None:
    """Compare the checkpoints A and B, of any layouts, by what they hold.

    Shows what only one of them has, shapes and dtypes that differ, and of tensors that differ how far: the
    largest and the mean change, the norm of the change relative to the norm in A, and how many elements
    differ, are NaN or infinite. What digests prove to be equal is not read. The exit code is 0 whether they
    differ or not; with --json, "equal" says it.

    \b
    dcp-ckpt diff runs/run-001@1000 runs/run-001@latest
    dcp-ckpt diff runs/run-001@latest runs/run-002@latest --key 'model.*'
    """
    with progress_bar("diff") as progress:
        report = diff(a, b, key=key, progress=progress)
    if as_json:
        print_json({"equal": report.equal, **asdict(report)})
    else:
        _print_report(report)


def _print_report(report: DiffReport) -> None:
    for letter, url, step in (("A", report.a, report.step_a), ("B", report.b, report.step_b)):
        click.echo(f"{letter}  {url}{'' if step is None else f': step {step}'}")
    for letter, names in (("A", report.only_in_a), ("B", report.only_in_b)):
        for name in names:
            click.echo(f"only in {letter}: {name}")
    if report.tensors:
        click.echo()
        columns = (
            "tensor",
            "dtype",
            "shape",
            "max change",
            "mean change",
            "relative",
            "differ",
            "NaN",
            "inf",
        )
        print_table(columns, [_row(tensor) for tensor in report.tensors])
    if report.values:
        click.echo()
        rows = [(value.name, *short_json_pair(value.a, value.b)) for value in report.values]
        print_table(("value", "A", "B"), rows)
    if report.tensors or report.values:
        click.echo()
    for name in report.unreadable:
        click.echo(f"not compared: {name}")
    proven = f" ({report.num_proven} by their digests)" if report.num_proven else ""
    click.echo(
        f"equal: {counted(report.num_equal_tensors, 'tensor')}{proven} and "
        f"{counted(report.num_equal_values, 'value')}; different: {counted(len(report.tensors), 'tensor')} "
        f"and {counted(len(report.values), 'value')}; "
        f"only in one: {len(report.only_in_a) + len(report.only_in_b)}"
    )
    if report.unverified:
        click.echo(f"note: {report.unverified}")


def _row(tensor: TensorDiff) -> tuple[str, ...]:
    numbers = tensor.numbers
    changes = ("", "", "", "", "", "")
    if numbers is not None:
        changes = (
            _number(numbers.max_abs),
            _number(numbers.mean_abs),
            _number(numbers.relative),
            f"{numbers.num_different} of {numbers.num_elements}",
            _change(numbers.num_nan_a, numbers.num_nan_b),
            _change(numbers.num_inf_a, numbers.num_inf_b),
        )
    dtype = _change(tensor.dtype_a, tensor.dtype_b)
    return (tensor.name, dtype, _change(_shape(tensor.shape_a), _shape(tensor.shape_b)), *changes)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


def _change(a: object, b: object) -> str:
    return str(a) if a == b else f"{a} -> {b}"
