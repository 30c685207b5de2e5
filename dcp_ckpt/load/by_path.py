"""Loading one checkpoint by its path, without owning its run.

Claims nothing and writes nothing. Called by users for evaluation and fine-tuning, and by the checkpointer
when it is given a path.
"""

from __future__ import annotations

import os
from contextlib import closing

import torch.distributed as dist

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, connect
from dcp_ckpt.load.loader import Loader
from dcp_ckpt.load.report import LoadReport
from dcp_ckpt.load.restore import Components
from dcp_ckpt.state.train_state import State, components_of
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.paths import named_by_user

__all__ = ["load_checkpoint", "load_path"]


def load_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    *,
    config: CheckpointConfig | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Load one checkpoint without owning its run: for evaluation, fine-tuning, or a look.

    Called on all ranks; blocks. Claims nothing and writes nothing, so it may read the run of a training that
    is going on.

    Args:
        path: a checkpoint directory or URL.
        state: filled in place, as by `Checkpointer.load`.
        config: `verify` and `timeout_seconds` count.
        process_group: the ranks that load together; None means all.

    Raises:
        CheckpointNotFound, StateMismatch, CorruptCheckpoint: as `Checkpointer.load`.
    """
    config = config or CheckpointConfig()
    with closing(connect(process_group, timeout_seconds=config.timeout_seconds)) as channel:
        return load_path(path, lambda: components_of(state), channel, config, tag="load/1")


def load_path(
    path: str | os.PathLike[str],
    components: Components,
    channel: Channel,
    config: CheckpointConfig,
    *,
    tag: str,
) -> LoadReport:
    """Load the checkpoint directory at `path`; see `load_checkpoint`.

    Args:
        tag: unique in the life of the channel.
    """
    root, _, directory = named_by_user(os.fspath(path).rstrip("/")).rpartition("/")
    with closing(open_storage(root or ".")) as storage:
        return Loader(storage, root or ".", channel, config, tag=tag).load_directory(components, directory)
