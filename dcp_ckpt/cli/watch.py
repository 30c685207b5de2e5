"""`dcp-ckpt watch RUN`: the saves of a run under way, live."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict

import click

from dcp_ckpt.cli.output import checkpoint_command, counted, human_bytes, print_json
from dcp_ckpt.errors import StorageTransient
from dcp_ckpt.lifecycle.activity import RankActivity, RunActivity, SaveActivity, read_activity
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.wording import shown_names

__all__ = ["ranks_to_show", "watch_command"]

_BAR_WIDTH = 20
_LINES_BESIDE_RANKS = 5
_STATES = ("waiting", "writing", "written")


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
    with closing(open_storage(run)) as storage, suppress(KeyboardInterrupt):
        first = read_activity(storage)
        _watch(storage, first, once=once, every=every, as_json=as_json)


def _watch(storage: Storage, first: RunActivity, *, once: bool, every: float, as_json: bool) -> None:
    with _shown(as_json=as_json, live=not once) as show:
        show(first)
        while not once:
            time.sleep(every)
            try:
                show(read_activity(storage))
            except StorageTransient as error:
                # It watches for hours: what may be over at the next look is told, and is no end.
                click.echo(f"dcp-ckpt: looking again: {error}", err=True)


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

    def drawn(activity: RunActivity, save: SaveActivity, num_lines: int) -> Iterator[Text | Table]:
        yield Text(f"\n{_title(save, is_live=activity.is_live)}")
        table = Table(box=None, show_header=False, pad_edge=False)
        for rank in ranks_to_show(save.ranks, num_lines):
            bar = _bar(rank.num_bytes, rank.expected_bytes)
            table.add_row(f"rank {rank.rank}", bar, human_bytes(rank.num_bytes), rank.state)
        yield table
        if num_lines < len(save.ranks):
            yield Text(f"and {counted(len(save.ranks) - num_lines, 'rank')} more")

    with Live(auto_refresh=False) as live:

        def show(activity: RunActivity) -> None:
            # What is higher than the terminal would be cut off at its end.
            per_save = live.console.height // max(1, len(activity.saves)) - _LINES_BESIDE_RANKS
            saves = [part for save in activity.saves for part in drawn(activity, save, max(1, per_save))]
            live.update(Group(Text(_headline(activity)), *saves), refresh=True)

        yield show


def ranks_to_show(ranks: Sequence[RankActivity], most: int) -> list[RankActivity]:
    """At most so many ranks, in their order: those furthest behind, where there is no room for all."""
    behind = sorted(ranks, key=lambda rank: (_STATES.index(rank.state), rank.num_bytes, rank.rank))
    return sorted(behind[:most], key=lambda rank: rank.rank)


def _lines(activity: RunActivity) -> list[str]:
    return [_headline(activity), *(f"  {_title(save, is_live=activity.is_live)}" for save in activity.saves)]


def _headline(activity: RunActivity) -> str:
    if not activity.epoch:
        return "nobody has started to train here yet"
    state = "live" if activity.is_live else "not running"
    latest = "" if activity.latest_step is None else f", newest step {activity.latest_step}"
    return (
        f"epoch {activity.epoch} ({activity.purpose}, {counted(activity.world_size, 'rank')}): {state}; "
        f"{counted(activity.num_checkpoints, 'checkpoint')}{latest}"
    )


def _title(save: SaveActivity, *, is_live: bool) -> str:
    of = "" if save.expected_bytes is None else f" of about {human_bytes(save.expected_bytes)}"
    waiting = [str(rank.rank) for rank in save.ranks if rank.state != "written"]
    missing = f", waiting for rank{'s' * (len(waiting) > 1)} {shown_names(waiting)}" if waiting else ""
    doing = "saving" if is_live else "unfinished save of"
    return (
        f"{doing} step {save.step} ({save.attempt}): {save.num_written}/{len(save.ranks)} ranks written, "
        f"{human_bytes(save.num_bytes)}{of}{missing}"
    )


def _bar(num_bytes: int, expected_bytes: int | None) -> str:
    if not expected_bytes:
        return ""
    filled = min(_BAR_WIDTH * num_bytes // expected_bytes, _BAR_WIDTH)
    return "█" * filled + "░" * (_BAR_WIDTH - filled)
