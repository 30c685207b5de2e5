"""The entry point `dcp-ckpt`: the group that holds the commands.

Called by the installed script and by `python -m dcp_ckpt`. A command's module is imported when it is asked
for, so that each starts as fast as what it needs, and help needs none of them.
"""

from __future__ import annotations

import gc
import importlib
from typing import Any

import click

from dcp_ckpt import __version__
from dcp_ckpt.cli.other_names import command_here, names_a_path, option_here
from dcp_ckpt.cli.output import print_json_error

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


_REF_ARGUMENTS = {"a", "ref", "refs", "target"}
_WHAT_A_REF_IS = (
    "A REF is RUN@latest, RUN@best, RUN@best:METRIC:min (or :max), RUN@STEP, or the directory or URL of a "
    "checkpoint."
)
_ALLOCATIONS_BEFORE_A_LOOK = 100_000


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"dcp_ckpt.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        if _REF_ARGUMENTS & {parameter.name for parameter in command.params}:
            command.epilog = _WHAT_A_REF_IS
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        here = command_here(args[0])
        if here is not None and not ctx.resilient_parsing:
            raise click.UsageError(f"There is no command {args[0]!r}; here it is {here!r}.", ctx)
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            # The group itself knows no names to guess from.
            raise click.NoSuchCommand(args[0], possibilities=_COMMANDS, ctx=ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            answer = _answered(error) if isinstance(error, click.NoSuchOption) else error
            if as_json:
                print_json_error(type(error).__name__, answer.format_message(), answer.exit_code)
            raise answer from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])


def _answered(error: click.NoSuchOption) -> click.UsageError:
    """The error, with what the option is called here if people know it by another name."""
    if error.ctx is None:
        return error
    parameters = error.ctx.command.get_params(error.ctx)
    options = [name for option in parameters if isinstance(option, click.Option) for name in option.opts]
    flag = error.option_name
    if (here := option_here(flag, options)) is not None:
        return click.UsageError(f"There is no {flag}; here it is {here}.", error.ctx)
    if names_a_path(flag):
        arguments = [one.make_metavar(error.ctx) for one in parameters if isinstance(one, click.Argument)]
        return click.UsageError(f"There is no {flag}: give {' and '.join(arguments)} without it.", error.ctx)
    return error


@click.group(name="dcp-ckpt", cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dcp-ckpt")
def cli() -> None:
    """Look at, check, compare, copy, export, import, average, thin out and repair checkpoints.

    A RUN is the directory or URL of a run, a BASE that of many. A REF is a checkpoint: RUN@latest, RUN@best,
    RUN@STEP, or its own directory or URL.

    \b
    dcp-ckpt runs runs
    dcp-ckpt verify runs/run-001
    dcp-ckpt export runs/run-001@best model/

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no such checkpoint,
                4 corrupt, 5 does not fit.
    """


def main() -> None:
    """Run the command line of this process and exit."""
    # What a command makes it keeps until it ends: to look for garbage in it costs a quarter of its time.
    gc.set_threshold(_ALLOCATIONS_BEFORE_A_LOOK)
    cli(prog_name="dcp-ckpt")
