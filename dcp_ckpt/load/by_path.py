"""Loading one checkpoint by its path, without owning its run.

Claims nothing and writes nothing. Called by users for evaluation and fine-tuning, and by the checkpointer
when it is given a path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial

import torch.distributed as dist

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, connect
from dcp_ckpt.load.loader import Loader
from dcp_ckpt.load.report import LoadReport
from dcp_ckpt.load.restore import Components
from dcp_ckpt.load.selection import Selection
from dcp_ckpt.state.train_state import State, components_of
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.paths import named_by_user

__all__ = ["load_checkpoint", "load_path"]


def load_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    cast: Sequence[str] = (),
    config: CheckpointConfig | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Load one checkpoint without owning its run: for evaluation, fine-tuning, or a look.

    Called on all ranks; blocks. Claims nothing and writes nothing, so it may read the run of a training that
    is going on.

    Names are those that the live state has: `model.head.weight`, `optimizer.state.head.weight.exp_avg`,
    `optimizer.param_groups`, `lr_scheduler`, `rng`. Globs are those of `fnmatch`, where `*` matches dots as
    well; a glob that matches a name also covers what lies below it, and one that matches nothing, here or in
    the checkpoint, is an error.

        load_checkpoint(path, state, include=("model.*",))  # the weights only
        load_checkpoint(path, state, exclude=("optimizer.*", "lr_scheduler*", "*.head.*"))  # fine-tuning
        load_checkpoint(path, state, rename={"model.blocks": "model.layers"})
        load_checkpoint(path, state, cast=("model.*",))

    Args:
        path: a checkpoint directory or URL.
        state: filled in place, as by `Checkpointer.load`.
        include: globs of what to restore; None means everything.
        exclude: globs of what stays exactly as it is, whether the checkpoint has it or not. Parameters that
            are new keep their fresh state, and groups of hyper-parameters are matched by the parameters that
            are restored. Names of one tensor are left out together.
        rename: stored name to live name, of single entries and of all that lies below a prefix; the longest
            one that fits counts, and "" is the top of the state. What optimizers keep for a parameter follows
            it.
        cast: globs of tensors that may be cast to the dtype of the live ones: between floating-point types,
            between complex types, or to wider integers. Any other difference of dtype is an error. Moments
            that do not exist yet get the dtype of their parameter.
        config: `verify` and `timeout_seconds` count.
        process_group: the ranks that load together; None means all.

    Raises:
        ConfigError: a glob or a prefix that matches nothing, names that collide, or some names of a tied
            tensor only; nothing was changed.
        CheckpointNotFound, StateMismatch, CorruptCheckpoint: as `Checkpointer.load`.
    """
    selection = Selection(include=include, exclude=exclude, rename=rename or {}, cast=cast)
    config = config or CheckpointConfig()
    with closing(connect(process_group, timeout_seconds=config.timeout_seconds)) as channel:
        return load_path(path, partial(components_of, state), channel, config, "load/1", selection)


def load_path(
    path: str | os.PathLike[str],
    components: Components,
    channel: Channel,
    config: CheckpointConfig,
    tag: str,
    selection: Selection,
) -> LoadReport:
    """Load the checkpoint directory at `path`; see `load_checkpoint`.

    Args:
        tag: unique in the life of the channel.
    """
    root, _, directory = named_by_user(os.fspath(path).rstrip("/")).rpartition("/")
    with closing(open_storage(root or ".")) as storage:
        loader = Loader(storage, root or ".", channel, config, tag, selection)
        return loader.load_directory(components, directory)
