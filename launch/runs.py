"""Which run a start continues or begins, and how it gets the state to go on from.

Owns the choice between resuming, forking, fine-tuning and starting anew, out of the flags and what is under
`--run-dir`. Called by `train.py` on all ranks; knows nothing of what is trained.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

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
from launch.settings import changed_settings, require_allowed

__all__ = ["choose_run", "config_before", "restore"]

_ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class _Origin:
    """A checkpoint that somebody named, and the run it is in."""

    run_path: str
    number: int
    config: Mapping[str, Any]
    parent: RunParent
    is_newest: bool


def choose_run(options: Options, config: Mapping[str, Any], *, rank: int) -> Run:
    """The run of this start, chosen or created once for all ranks.

    A checkpoint in `--resume` continues its run if it is the newest there; else a new run begins from it.
    With `--lora-rank`, a run that was trained without adapters is not continued: a new one begins from its
    newest checkpoint. In both cases `run.json` records it as the parent.

    Raises:
        CheckpointNotFound: there is nothing to continue or to fine-tune.
        StateMismatch: a setting cannot be changed in a run that begins from that checkpoint.
    """
    # Only rank 0's arguments of open_run count, so it does not matter if ranks see different runs.
    if options.resume_ref is not None:
        return _from_checkpoint(_origin(options.resume_ref), options, config)
    resume = _answer(options) if options.resume == "ask" and rank == 0 else options.resume
    base = None if resume == "never" else _run_to_fine_tune(options)
    if base is not None:
        parent = _newest_checkpoint(base)
        return open_run(options.run_dir, resume="never", name=options.name, config=config, parent=parent)
    if resume == "never":
        return open_run(options.run_dir, resume="never", name=options.name, config=config)
    choice: Literal["auto", "must"] | int = options.run_number or ("must" if resume == "must" else "auto")
    return open_run(options.run_dir, resume=choice, name=options.name, config=config)


def _from_checkpoint(origin: _Origin, options: Options, config: Mapping[str, Any]) -> Run:
    base, _, name = origin.run_path.rpartition("/")
    base = base or "."
    fine_tunes = _fine_tunes(origin.config, options)
    if origin.is_newest and not fine_tunes:
        return open_run(base, resume=origin.number, name=options.name, config=config)
    if not fine_tunes:
        # Before a run is created that could not begin.
        require_allowed(changed_settings(origin.config, config), origin.run_path)
    is_beside = base.rstrip("/") == options.run_dir.rstrip("/")
    parent = RunParent(
        run=name if is_beside else origin.run_path,
        run_id=origin.parent.run_id,
        epoch=origin.parent.epoch,
        step=origin.parent.step,
    )
    return open_run(options.run_dir, resume="never", name=options.name, config=config, parent=parent)


def _origin(ref: str) -> _Origin:
    with open_checkpoint(ref) as checkpoint:
        manifest, run_path = checkpoint.manifest, checkpoint.url.rstrip("/").rpartition("/")[0]
    base, _, _ = run_path.rpartition("/")
    runs = {run.run_id: run for run in list_runs(base or ".")}
    if manifest.run_id not in runs:
        raise errors.ConfigError(
            f"{ref} is not in a numbered run; --resume needs one such as runs/run-001@1200"
        )
    run = runs[manifest.run_id]
    with open_checkpoint(f"{run.path}@latest") as newest:
        is_newest = newest.manifest.attempt == manifest.attempt
    parent = RunParent(run=run.path, run_id=run.run_id, epoch=manifest.epoch, step=manifest.step)
    return _Origin(run.path, run.number, run.document.config, parent, is_newest)


def _answer(options: Options) -> str:
    """What rank 0's user says; without a terminal nobody is asked and a new run begins."""
    runs = [run for run in list_runs(options.run_dir) if options.run_number in (None, run.number)]
    try:
        newest = _newest_checkpoint(runs[-1]) if runs else None
    except errors.CheckpointNotFound:
        newest = None
    if newest is None:
        return "auto"
    question = f"Resume from step {newest.step}? [y/N] "
    if not (sys.stdin and sys.stdin.isatty()):
        print(f"{question}no terminal to ask on: a new run begins; --resume auto resumes", flush=True)
        return "never"
    print(question, end="", flush=True)
    # The other ranks wait for the answer, but not for ever.
    if not select.select([sys.stdin], [], [], _ANSWER_SECONDS)[0]:
        print(f"no answer in {_ANSWER_SECONDS / 60:g} minutes: a new run begins", flush=True)
        return "never"
    return "auto" if sys.stdin.readline().strip().lower() in ("y", "yes") else "never"


def _run_to_fine_tune(options: Options) -> Run | None:
    runs = [run for run in list_runs(options.run_dir) if options.run_number in (None, run.number)]
    return runs[-1] if runs and _fine_tunes(runs[-1].document.config, options) else None


def _fine_tunes(config: Mapping[str, Any], options: Options) -> bool:
    """Whether this start trains adapters of a run that has none."""
    return options.lora_rank is not None and config.get("lora_rank") is None


def _newest_checkpoint(run: Run) -> RunParent:
    with open_checkpoint(f"{run.path}@latest") as checkpoint:
        manifest = checkpoint.manifest
    name = run.path.rstrip("/").rpartition("/")[2]
    return RunParent(run=name, run_id=manifest.run_id, epoch=manifest.epoch, step=manifest.step)


def config_before(run: Run, options: Options) -> Mapping[str, Any]:
    """The settings that those of this start are compared with: the run's own, or those it was forked with."""
    origin = _parent_run(run, options) if run.is_new else None
    if origin is None or _fine_tunes(origin.document.config, options):
        return run.document.config
    return origin.document.config


def _parent_run(run: Run, options: Options) -> Run | None:
    parent = run.document.parent
    if parent is None:
        return None
    base = parent.run.rstrip("/").rpartition("/")[0] or ("." if "/" in parent.run else options.run_dir)
    return next((other for other in list_runs(base) if other.run_id == parent.run_id), None)


def restore(checkpointer: Checkpointer, run: Run, state: TrainState, options: Options) -> LoadReport | None:
    """Load the newest checkpoint of the run; where it has none yet, what it begins from.

    A fork begins from all of its parent's state, a run that fine-tunes from the model alone.

    Returns:
        What was loaded that training goes on from; None: training begins at step 1.

    Raises:
        CheckpointNotFound: `--resume must`, and there is neither.
    """
    loaded = checkpointer.load(state, which="latest")
    parent = run.document.parent
    if loaded is not None:
        return loaded
    if parent is None:
        if options.resume == "must":
            raise errors.CheckpointNotFound("--resume must: no checkpoint was committed")
        return None
    origin = _parent_run(run, options)
    path = parent.run if "/" in parent.run else f"{options.run_dir}/{parent.run}"
    with open_checkpoint(f"{path}@{parent.step}") as base:
        directory = base.url
    if origin is not None and not _fine_tunes(origin.document.config, options):
        loaded = checkpointer.load(state, which=directory)
        forked = f"this run begins from step {parent.step} of {parent.run}, which stays as it is"
        return loaded and replace(loaded, notes=(*loaded.notes, forked))
    weights = TrainState(model=state.model, rng=False, mesh_roles=state.mesh_roles)
    load_checkpoint(directory, weights, exclude=[ADAPTERS])
    return None
