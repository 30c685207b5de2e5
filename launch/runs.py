"""Which run a start continues or begins, and how it gets the state to go on from.

Owns the choice between resuming, fine-tuning and starting anew, out of the flags and what is under
`--run-dir`. Called by `train.py` on all ranks; knows nothing of what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcp_ckpt import (
    Checkpointer,
    LoadReport,
    Run,
    RunParent,
    TrainState,
    errors,
    list_runs,
    load_checkpoint,
    open_checkpoint,
    open_run,
)
from launch.lora import ADAPTERS
from launch.options import Options

__all__ = ["choose_run", "restore"]


def choose_run(options: Options, config: Mapping[str, Any]) -> Run:
    """The run of this start, chosen or created once for all ranks.

    With `--lora-rank`, a run that was trained without adapters is not continued: a new one begins from its
    newest checkpoint, which is recorded as its parent.

    Raises:
        CheckpointNotFound: there is nothing to continue or to fine-tune.
    """
    # Only rank 0's arguments of open_run count, so it does not matter if ranks see different runs.
    base = _run_to_fine_tune(options)
    if base is None:
        choice = options.run_number or options.resume
        return open_run(options.run_dir, resume=choice, name=options.name, config=config)
    parent = _newest_checkpoint(base)
    return open_run(options.run_dir, resume="never", name=options.name, config=config, parent=parent)


def _run_to_fine_tune(options: Options) -> Run | None:
    if options.lora_rank is None or options.resume == "never":
        return None
    runs = [run for run in list_runs(options.run_dir) if options.run_number in (None, run.number)]
    if not runs or runs[-1].document.config.get("lora_rank") is not None:
        return None
    return runs[-1]


def _newest_checkpoint(run: Run) -> RunParent:
    with open_checkpoint(f"{run.path}@latest") as checkpoint:
        manifest = checkpoint.manifest
    name = run.path.rstrip("/").rpartition("/")[2]
    return RunParent(run=name, run_id=manifest.run_id, epoch=manifest.epoch, step=manifest.step)


def restore(checkpointer: Checkpointer, run: Run, state: TrainState, options: Options) -> LoadReport | None:
    """Load the newest checkpoint of the run; where it has none yet, the model that it is to fine-tune.

    Returns:
        What was loaded of this run; None: training begins at step 1.

    Raises:
        CheckpointNotFound: `--resume must`, and there is neither.
    """
    loaded = checkpointer.load(state, which="latest")
    parent = run.document.parent
    if loaded is None and parent is not None:
        with open_checkpoint(f"{options.run_dir}/{parent.run}@{parent.step}") as base:
            path = f"{options.run_dir}/{parent.run}/{base.directory}"
        weights = TrainState(model=state.model, rng=False, mesh_roles=state.mesh_roles)
        load_checkpoint(path, weights, exclude=[ADAPTERS])
    elif loaded is None and options.resume == "must":
        raise errors.CheckpointNotFound("--resume must: no checkpoint was committed")
    return loaded
