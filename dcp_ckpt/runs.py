"""Opening a run from all ranks: rank 0 chooses or creates it, every rank learns which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.lifecycle.runs import Resume, Run, RunParent
from dcp_ckpt.lifecycle.runs import open_run as open_run_here

__all__ = ["open_run"]


def open_run(
    base: str | os.PathLike[str],
    *,
    resume: Resume = "auto",
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    parent: RunParent | None = None,
) -> Run:
    """Choose the run to continue, or create the next one. Called on all ranks, collectively; blocks.

    Without torch.distributed it is the choice of this process, else rank 0's arguments count. Two jobs that
    create at the same moment get two numbers.

    Args:
        base: directory or URL that holds the runs; made if missing.
        resume: "auto": the newest run under `base`, or a new one when there is none; "must": the newest run;
            "never": a new run; an int: the run of that number.
        name: of a new run; a run that is continued keeps its own.
        config: JSON types; recorded in a new run as it is, so leave secrets out.
        parent: the checkpoint that a new run begins from; recorded in it.

    Raises:
        CheckpointNotFound: there is no such run; the message lists those that exist.
        ConfigError, StorageError: on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return open_run_here(base, resume=resume, name=name, config=config, parent=parent)
    answer: list[Run | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer[0] = open_run_here(base, resume=resume, name=name, config=config, parent=parent)
        except CheckpointError as error:
            answer[0] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], CheckpointError):
        raise answer[0]
    assert answer[0] is not None
    return answer[0]
