"""Commands and options as other programs call them, answered with those here. Pure.

Called by the group of commands when it meets a word that it does not know.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["command_here", "names_a_path", "option_here"]

_COMMANDS = {
    "average": ("merge", "soup", "swa"),
    "copy": ("backup", "cp", "download", "pull", "push", "upload"),
    "diff": ("cmp", "compare"),
    "export": ("convert", "dump", "save"),
    "import": ("add", "load"),
    "inspect": ("cat", "describe", "info", "show", "stat", "stats", "tree"),
    "list": ("checkpoints", "ls", "snapshots", "steps"),
    "pin": ("keep", "lock", "protect"),
    "prune": ("clean", "cleanup", "delete", "forget", "gc", "remove", "rm"),
    "recover": ("fix", "repair"),
    "runs": ("experiments", "list-runs"),
    "unpin": ("unlock", "unprotect"),
    "verify": ("check", "fsck", "validate"),
    "watch": ("follow", "monitor", "status", "tail", "top"),
}
_OPTIONS = {
    "--keep-last": (
        "--keep-last-n",
        "--keep-latest",
        "--keep-latest-k",
        "--keep-latest-n",
        "--max-to-keep",
        "--save-total-limit",
    ),
    "--keep-every": ("--interval", "--keep-interval", "--keep-period"),
    "--keep-best": ("--best-n", "--save-top-k", "--top-k"),
    "--monitor": ("--best-metric", "--metric", "--metric-for-best-model"),
    "--mode": ("--best-mode", "--greater-is-better"),
    "--dry-run": ("--dry", "--no-act", "--simulate"),
    "--dtype": ("--precision", "--torch-dtype"),
    "--format": ("--output-format", "--to"),
    "--include": ("--filter", "--only"),
    "--key": ("--filter", "--only"),
    "--last": ("--last-k", "--num-checkpoints"),
    "--max-shard-size": ("--shard-size",),
    "--out": ("--dst", "--output", "--output-dir", "--run", "--run-dir"),
    "--every": ("--interval", "--refresh"),
    "--world-size": ("--nproc-per-node", "--num-ranks", "--ranks"),
}
_PATHS = frozenset(
    {
        "--checkpoint",
        "--checkpoint-dir",
        "--checkpoint-path",
        "--ckpt-dir",
        "--ckpt-path",
        "--dir",
        "--dirpath",
        "--dst",
        "--logdir",
        "--out",
        "--output",
        "--output-dir",
        "--path",
        "--ref",
        "--resume-from-checkpoint",
        "--run",
        "--run-dir",
        "--src",
    }
)


def command_here(name: str) -> str | None:
    """The command that does what `name` does in other programs, or None."""
    return next((here for here, names in _COMMANDS.items() if name in names), None)


def option_here(flag: str, options: Collection[str]) -> str | None:
    """The one of `options` that people mean by `flag`, or None.

    Args:
        flag: as typed; underscores count as dashes.
        options: those of the command, in full.
    """
    dashed = flag.replace("_", "-")
    if dashed in options:
        return dashed
    return next((here for here in options if dashed in _OPTIONS.get(here, ())), None)


def names_a_path(flag: str) -> bool:
    """Whether people mean by `flag` what is an argument here."""
    return flag.replace("_", "-") in _PATHS
