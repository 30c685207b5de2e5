"""`dcp-ckpt pin REF` and `dcp-ckpt unpin REF`: keep a checkpoint whatever retention says."""

from __future__ import annotations

from contextlib import closing

import click

from dcp_ckpt.cli.output import checkpoint_command, print_json
from dcp_ckpt.lifecycle.catalogue import CheckpointEntry
from dcp_ckpt.lifecycle.pins import pin, pin_reason, unpin
from dcp_ckpt.ops.refs import resolve_entry
from dcp_ckpt.storage import open_storage

__all__ = ["pin_command", "unpin_command"]


@click.command(name="pin")
@click.argument("ref")
@click.option("--reason", metavar="TEXT", help="Why, for those who come later.")
@checkpoint_command
def pin_command(ref: str, reason: str | None, as_json: bool) -> None:
    """Keep the checkpoint REF until it is unpinned, whatever retention and prune say.

    May be used while the training runs. Exit code 3 if the checkpoint was removed in the same moment.

    \b
    dcp-ckpt pin runs/run-001@latest --reason "results of the paper"
    """
    run, entry = resolve_entry(ref)
    with closing(open_storage(run)) as storage:
        changed = pin(storage, entry, reason=reason)
    if as_json:
        _print(run, entry, pinned=True, changed=changed, reason=reason if changed else pin_reason(entry))
    elif changed:
        click.echo(f"pinned {run}/{entry.directory}")
    else:
        why = pin_reason(entry)
        click.echo(f"{run}/{entry.directory} was pinned already{f' ({why})' if why else ''}")


@click.command(name="unpin")
@click.argument("ref")
@checkpoint_command
def unpin_command(ref: str, as_json: bool) -> None:
    """Take back all pins of the checkpoint REF: retention and prune may remove it again.

    \b
    dcp-ckpt unpin runs/run-001@1000
    """
    run, entry = resolve_entry(ref)
    with closing(open_storage(run)) as storage:
        changed = unpin(storage, entry)
    if as_json:
        _print(run, entry, pinned=False, changed=changed, reason=None)
    else:
        click.echo(
            f"{'unpinned ' if changed else ''}{run}/{entry.directory}{'' if changed else ' was not pinned'}"
        )


def _print(run: str, entry: CheckpointEntry, *, pinned: bool, changed: bool, reason: str | None) -> None:
    print_json(
        {
            "run": run,
            "directory": str(entry.directory),
            "step": entry.step,
            "epoch": entry.epoch,
            "pinned": pinned,
            "changed": changed,
            "reason": reason,
        }
    )
