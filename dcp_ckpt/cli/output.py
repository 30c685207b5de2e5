"""What every command shares: `--json`, tables, and errors as one line and one exit code.

Commands return nothing and print through this module. Knows no checkpoints.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    StateMismatch,
)
from dcp_ckpt.format.documents import encode_json

__all__ = [
    "EXIT_CORRUPT",
    "checkpoint_command",
    "exit_code",
    "human_bytes",
    "print_json",
    "print_table",
    "short_json",
]

EXIT_CORRUPT = 4
_MAX_VALUE_CHARACTERS = 60

_EXIT_CODES: tuple[tuple[type[CheckpointError], int], ...] = (
    (ConfigError, 2),
    (CheckpointNotFound, 3),
    (CorruptCheckpoint, EXIT_CORRUPT),
    (StateMismatch, 5),
    (CheckpointError, 1),
)


def exit_code(error: CheckpointError) -> int:
    """The exit code of the command line for an error."""
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def checkpoint_command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option `--json` and turn a `CheckpointError` into a line on stderr and an exit code.

    With `--json` the error is also an object on stdout, so that whoever reads stdout always gets one.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, **kwargs: Any) -> None:
        try:
            function(*args, as_json=as_json, **kwargs)
        except CheckpointError as error:
            code = exit_code(error)
            if as_json:
                fields = {"type": type(error).__name__, "message": str(error), "exit_code": code}
                print_json({"error": fields})
            click.echo(f"dcp-ckpt: {str(error).replace(chr(10), ' ')}", err=True)
            sys.exit(code)

    return wrapper


def print_json(document: Any) -> None:
    """One canonical JSON object on a line of its own."""
    click.echo(encode_json(document).decode())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: with lines and colours on a terminal, plain aligned text in a pipe."""
    if sys.stdout.isatty():
        _print_rich(columns, rows)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def human_bytes(num_bytes: int) -> str:
    """A size for people: `1.5 MiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def short_json(value: Any) -> str:
    """A value for a cell of a table: the typed JSON as it is stored, cut off where it is long."""
    # Nothing is decoded, so nothing (numpy) is imported.
    text = encode_json(value).decode()
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 3]}..."


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Only a terminal needs it, and it costs more to import than a command takes.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
