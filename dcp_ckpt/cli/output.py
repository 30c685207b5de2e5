"""What every command shares: `--json`, tables, and errors as one line and one exit code.

Commands return nothing and print through this module. Knows no checkpoints.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
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
from dcp_ckpt.wording import shown_names

__all__ = [
    "EXIT_CORRUPT",
    "EXIT_FAILED",
    "checkpoint_command",
    "column_widths",
    "counted",
    "exit_code",
    "human_bytes",
    "human_time",
    "print_by_reason",
    "print_json",
    "print_json_error",
    "print_table",
    "printable",
    "short_json",
    "short_json_pair",
]

EXIT_FAILED = 1
EXIT_CORRUPT = 4
_MAX_VALUE_CHARACTERS = 60
_SHORT_CELL_CHARACTERS = 15
_LONG_WORD_CHARACTERS = 24
_COLUMN_GAP = 2
_CHARACTERS_BEFORE_A_DIFFERENCE = 24

_EXIT_CODES: tuple[tuple[type[CheckpointError], int], ...] = (
    (ConfigError, 2),
    (CheckpointNotFound, 3),
    (CorruptCheckpoint, EXIT_CORRUPT),
    (StateMismatch, 5),
    (CheckpointError, EXIT_FAILED),
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
                print_json_error(type(error).__name__, str(error), code)
            click.echo(f"dcp-ckpt: {str(error).replace(chr(10), ' ')}", err=True)
            sys.exit(code)

    return wrapper


def print_json(document: Any) -> None:
    """One canonical JSON object on a line of its own."""
    click.echo(encode_json(document).decode())


def print_json_error(kind: str, message: str, exit_code: int) -> None:
    """What a command with `--json` prints where it fails."""
    print_json({"error": {"type": kind, "message": message, "exit_code": exit_code}})


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: with lines and colours on a terminal, plain aligned text in a pipe."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, rows)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def counted(count: int, what: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def human_bytes(num_bytes: int) -> str:
    """A size for people: `1.5 MiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_time(created_at: str) -> str:
    """A time for people: `2026-01-31 23:59:59`, in UTC as it is stored."""
    return created_at[:19].replace("T", " ")


def print_by_reason(title: str, found: Iterable[tuple[str, str]]) -> None:
    """A line for each reason, with the first names that it holds for.

    On object stores every checkpoint that retention removed leaves a directory behind.

    Args:
        found: names, each with its reason.
    """
    names: dict[str, list[str]] = {}
    for name, reason in found:
        names.setdefault(reason, []).append(name)
    for reason, all_names in names.items():
        click.echo(f"{title} {shown_names(all_names, most=3)}: {reason}")


def printable(text: str) -> str:
    """Names come from files of anybody: what would steer the terminal is shown as an escape, `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def short_json(value: Any) -> str:
    """A value for a cell of a table: the typed JSON as it is stored, cut off where it is long."""
    # Nothing is decoded, so nothing (numpy) is imported.
    return _cut(encode_json(value).decode())


def short_json_pair(a: Any, b: Any) -> tuple[str, str]:
    """Two values that differ, each for a cell; where they are long, from a little before the difference."""
    text_a, text_b = encode_json(a).decode(), encode_json(b).decode()
    if max(len(text_a), len(text_b)) <= _MAX_VALUE_CHARACTERS:
        return text_a, text_b
    same = next((i for i, (x, y) in enumerate(zip(text_a, text_b, strict=False)) if x != y), 0)
    start = same - _CHARACTERS_BEFORE_A_DIFFERENCE
    if start <= 0:
        return _cut(text_a), _cut(text_b)
    return _cut(f"...{text_a[start:]}"), _cut(f"...{text_b[start:]}")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 3]}..."


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # Only a terminal needs it, and it costs more to import than a command takes.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = column_widths([columns, *rows], console.width)
    # Where even the least widths have no room, lines are longer than the terminal, which breaks them.
    console.width = max(console.width, sum(widths) + _COLUMN_GAP * len(widths))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def column_widths(lines: Sequence[Sequence[str]], available: int) -> list[int]:
    """Widths in which nothing is cut off: long cells are folded where there is no room, best between words.

    Args:
        lines: the cells, header included.
        available: the width of the terminal; exceeded if there is no room for a word of each column.
    """
    cells = list(zip(*lines, strict=True))
    least = [min(max(map(_least_width, column)), _LONG_WORD_CHARACTERS) for column in cells]
    spare = available - sum(least) - _COLUMN_GAP * len(least)
    widths = []
    for width, column in zip(least, cells, strict=True):
        more = max(0, min(spare, max(map(len, column)) - width))
        spare -= more
        widths.append(width + more)
    return widths


def _least_width(cell: str) -> int:
    return len(cell) if len(cell) <= _SHORT_CELL_CHARACTERS else max(map(len, cell.split()), default=0)
