"""`dcp-ckpt watch RUN`: the saves of a run under way, live."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json
from dcp_ckpt.lifecycle.activity import RunActivity, SaveActivity, read_activity
from dcp_ckpt.storage import open_storage
from dcp_ckpt.wording import shown_names

__all__ = ["watch_command"]

_BAR_WIDTH = 20


@click.command(name="watch")
@click.argument("run")
@click.option("--once", is_flag=True, help="Say how it is now, and end.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks. Each reads the run; on object stores choose more.",
)
@checkpoint_command
def watch_command(run: str, once: bool, every: float, as_json: bool) -> None:
    """Show which saves of RUN are under way, rank by rank, until Ctrl-C.

    On a terminal the picture is kept up to date; in a pipe there is a line for every change, with --json an
    object. It reads what the writers leave on storage and disturbs nobody, so it may run on any machine.
    """
    shown = _shown(as_json=as_json, live=not once)
    with closing(open_storage(run)) as storage, suppress(KeyboardInterrupt), shown as show:
        while True:
            show(read_activity(storage))
            if once:
                return
            time.sleep(every)


def _shown(*, as_json: bool, live: bool) -> AbstractContextManager[Callable[[RunActivity], None]]:
    if as_json:
        return nullcontext(_on_change(lambda activity: print_json(asdict(activity))))
    if live and sys.stdout.isatty():
        return _picture()
    return nullcontext(_on_change(lambda activity: click.echo("\n".join(_lines(activity)))))


def _on_change(show: Callable[[RunActivity], None]) -> Callable[[RunActivity], None]:
    last: list[RunActivity] = []

    def show_if_new(activity: RunActivity) -> None:
        if last != [activity]:
            show(activity)
            sys.stdout.flush()
            last[:] = [activity]

    return show_if_new


@contextmanager
def _picture() -> Iterator[Callable[[RunActivity], None]]:
    # Only a terminal needs it, and it costs more to import than a command takes.
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(auto_refresh=False) as live:

        def show(activity: RunActivity) -> None:
            parts: list[Text | Table] = [Text(_headline(activity))]
            for save in activity.saves:
                table = Table("rank", "state", "bytes", "", title=_title(save), title_justify="left")
                for rank in save.ranks:
                    bar = _bar(rank.num_bytes, rank.expected_bytes)
                    table.add_row(str(rank.rank), rank.state, human_bytes(rank.num_bytes), bar)
                parts.append(table)
            live.update(Group(*parts), refresh=True)

        yield show


def _lines(activity: RunActivity) -> list[str]:
    return [_headline(activity), *(f"  {_title(save)}" for save in activity.saves)]


def _headline(activity: RunActivity) -> str:
    if not activity.epoch:
        return "nobody has started to train here yet"
    state = "live" if activity.is_live else "not running"
    latest = "none yet" if activity.latest_step is None else f"step {activity.latest_step}"
    return (
        f"epoch {activity.epoch} ({activity.purpose}, {activity.world_size} ranks): {state}; "
        f"{activity.num_checkpoints} checkpoints, newest {latest}"
    )


def _title(save: SaveActivity) -> str:
    of = "" if save.expected_bytes is None else f" of about {human_bytes(save.expected_bytes)}"
    waiting = [str(rank.rank) for rank in save.ranks if rank.state != "written"]
    missing = f", waiting for rank {shown_names(waiting)}" if waiting else ""
    return (
        f"saving step {save.step} ({save.attempt}): {save.num_written}/{len(save.ranks)} ranks written, "
        f"{human_bytes(save.num_bytes)}{of}{missing}"
    )


def _bar(num_bytes: int, expected_bytes: int | None) -> str:
    if not expected_bytes:
        return ""
    filled = min(_BAR_WIDTH * num_bytes // expected_bytes, _BAR_WIDTH)
    return "█" * filled + "░" * (_BAR_WIDTH - filled)
