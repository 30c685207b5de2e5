"""What is said of a path that was named as a run and is none: what is there instead, and what to name.

Reads one listing. Called by what takes a run, once it has found neither a `run.json` nor a step directory.
"""

from __future__ import annotations

from dcp_ckpt.errors import CheckpointNotFound
from dcp_ckpt.format.names import MANIFEST, parse_run_name
from dcp_ckpt.storage.base import Storage

__all__ = ["not_a_run"]


def not_a_run(storage: Storage, path: str) -> CheckpointNotFound:
    """The error to raise.

    Args:
        path: as it was given, for the message.
    """
    names = storage.list_names("")
    runs = [name for name in sorted(names) if parse_run_name(name.removesuffix("/")) is not None]
    if runs:
        newest = f"{path.rstrip('/')}/{runs[-1].removesuffix('/')}"
        return CheckpointNotFound(
            f"not a run, but a directory of runs: name one of them, as {newest}", path=path
        )
    if MANIFEST in names:
        return CheckpointNotFound("not a run, but a checkpoint: name the run around it", path=path)
    found = "neither a run.json nor a step directory" if names else "nothing is there"
    return CheckpointNotFound(f"not a run: {found}", path=path)
