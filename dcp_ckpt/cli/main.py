"""The entry point `dcp-ckpt`: the group that holds the commands.

Called by the installed script and by `python -m dcp_ckpt`. A command's module is imported when it is asked
for, so that each starts as fast as what it needs, and help needs none of them.
"""

from __future__ import annotations

import gc
import importlib

import click

from dcp_ckpt import __version__

__all__ = ["cli", "main"]

_COMMANDS = {
    "average": ("average", "Make a checkpoint that is the average of others."),
    "copy": ("copy", "Copy a checkpoint to another place, checking every byte."),
    "diff": ("diff", "Compare two checkpoints: names, shapes, dtypes, numbers, values."),
    "export": ("export", "Write a checkpoint as safetensors, a torch file or a stock DCP directory."),
    "import": ("import_", "Make a checkpoint of a run out of DCP, safetensors or torch.save files."),
    "inspect": ("inspect", "Show the tensors, values and origin of a checkpoint."),
    "list": ("runs", "List the checkpoints of a run."),
    "pin": ("pins", "Keep a checkpoint, whatever retention says."),
    "plan": ("plan", "Show what each rank of some world would read to load a checkpoint."),
    "prune": ("prune", "Remove checkpoints of a run that no option keeps."),
    "recover": ("recover", "Complete and clean up a run after a crash."),
    "runs": ("runs", "List the runs in a directory."),
    "unpin": ("pins", "Let retention remove a checkpoint again."),
    "watch": ("watch", "Show the saves of a run that are under way, live."),
    "verify": ("verify", "Check all bytes of a checkpoint or a run against their digests."),
}
"""Name -> module, in which `<name>_command` is the command, and what the group's help says of it."""


_ALLOCATIONS_BEFORE_A_LOOK = 100_000


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"dcp_ckpt.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])


@click.group(name="dcp-ckpt", cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dcp-ckpt")
def cli() -> None:
    """Look at, check, compare, copy, export, import, average, thin out and repair checkpoints.

    A REF is RUN@latest, RUN@best, RUN@STEP or a checkpoint directory.

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such checkpoint,
                4 corrupt, 5 does not fit.
    """


def main() -> None:
    """Run the command line of this process and exit."""
    # What a command makes it keeps until it ends: to look for garbage in it costs a quarter of its time.
    gc.set_threshold(_ALLOCATIONS_BEFORE_A_LOOK)
    cli(prog_name="dcp-ckpt")
