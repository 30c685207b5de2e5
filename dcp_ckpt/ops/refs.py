"""References: from the words a person types to the directory of one checkpoint.

The grammar is `RUN@latest`, `RUN@best`, `RUN@best:METRIC:min`, `RUN@best:METRIC:max`, `RUN@STEP`, or the
path or URL of a checkpoint directory. Parsing is pure; resolving reads the run. Called by every operation
on committed checkpoints.
"""

from __future__ import annotations

import os
import re
from contextlib import closing
from dataclasses import dataclass

from dcp_ckpt.errors import CheckpointNotFound, ConfigError, StorageNotFound
from dcp_ckpt.format.names import MANIFEST
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, read_catalogue
from dcp_ckpt.policies import Mode
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.paths import named_by_user

__all__ = ["CheckpointLocation", "RunRef", "parse_ref", "resolve_entry", "resolve_ref", "split_location"]

_SELECTOR = re.compile(r"latest|best|best:(?P<metric>[^@]+):(?P<mode>min|max)|(?P<step>\d+)")
_MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """A checkpoint named by its run and `latest`, `best` or a step.

    Args:
        selector: "latest", "best" or the step.
        metric: for `best`; None asks the run's own configuration.
    """

    run: str
    selector: str | int
    metric: str | None = None
    mode: Mode = "min"


@dataclass(frozen=True, kw_only=True)
class CheckpointLocation:
    """Where one checkpoint is: `directory` below the storage at `root`."""

    root: str
    directory: str

    def __str__(self) -> str:
        return f"{self.root.rstrip('/')}/{self.directory}"


def parse_ref(ref: str | os.PathLike[str]) -> RunRef | None:
    """Take `RUN@SELECTOR` apart; None when `ref` is a plain path or URL, which may well hold an `@`."""
    run, at, selector = os.fspath(ref).rpartition("@")
    match = _SELECTOR.fullmatch(selector) if at and run else None
    if match is None:
        return None
    if match["step"]:
        return RunRef(run=run, selector=int(match["step"]))
    if match["metric"]:
        mode: Mode = "max" if match["mode"] == "max" else "min"
        return RunRef(run=run, selector="best", metric=match["metric"], mode=mode)
    return RunRef(run=run, selector=selector)


def resolve_ref(ref: str | os.PathLike[str]) -> CheckpointLocation:
    """Find the one checkpoint that `ref` names. Blocks on storage; local to the process.

    Raises:
        CheckpointNotFound: nothing of that name; the message lists what exists.
        CorruptCheckpoint, FormatTooNew: the step was asked for by number and its manifest cannot be used.
        ConfigError: `best` without a metric, in a run that does not name one.
    """
    run_ref = parse_ref(ref)
    if run_ref is None:
        return _resolve_directory(os.fspath(ref))
    with closing(open_storage(run_ref.run)) as storage:
        entry = _select(read_catalogue(storage), run_ref)
    return CheckpointLocation(root=run_ref.run, directory=str(entry.directory))


def resolve_entry(ref: str | os.PathLike[str]) -> tuple[str, CheckpointEntry]:
    """Find the one checkpoint that `ref` names, as its run sees it: with its marks. Blocks on storage.

    Returns:
        The path or URL of the run, and the checkpoint.

    Raises:
        CheckpointNotFound, CorruptCheckpoint, FormatTooNew, ConfigError: as `resolve_ref`; also when the run
            around a checkpoint directory does not count it as its own.
    """
    run_ref = parse_ref(ref)
    if run_ref is not None:
        with closing(open_storage(run_ref.run)) as storage:
            return run_ref.run, _select(read_catalogue(storage), run_ref)
    location = _resolve_directory(os.fspath(ref))
    with closing(open_storage(location.root)) as storage:
        catalogue = read_catalogue(storage)
    for entry in catalogue.entries:
        if str(entry.directory) == location.directory:
            return location.root, entry
    for rejected in catalogue.rejected:
        if str(rejected.directory) == location.directory:
            raise rejected.error
    raise CheckpointNotFound(
        "it is not in a run: its directory is not named step-NNNNNNNN", phase="choose", path=str(location)
    )


def split_location(path: str) -> tuple[str, str]:
    """The parent of a directory, to open as a storage, and its name in it.

    Raises:
        CheckpointNotFound: it has no parent, so it is not a checkpoint.
    """
    location = path.rstrip("/") if "://" in path else named_by_user(os.path.abspath(path))
    root, _, name = location.rpartition("/")
    if not name or root.endswith(":/"):
        raise CheckpointNotFound("not a checkpoint", phase="choose", path=path)
    return root or "/", name


def _resolve_directory(path: str) -> CheckpointLocation:
    root, directory = split_location(path)
    with closing(open_storage(root)) as storage:
        try:
            storage.size(f"{directory}/{MANIFEST}")
        except StorageNotFound as error:
            raise CheckpointNotFound(
                f"not a checkpoint: it has no {MANIFEST}. Name a run's checkpoint as RUN@latest, RUN@best or "
                "RUN@STEP, or give the path of a step directory",
                phase="choose",
                path=path,
            ) from error
    return CheckpointLocation(root=root, directory=directory)


def _select(catalogue: Catalogue, ref: RunRef) -> CheckpointEntry:
    if ref.selector == "latest":
        entry = catalogue.latest
        wanted = "no valid checkpoint"
    elif ref.selector == "best":
        metric, mode = _metric(catalogue, ref)
        entry = catalogue.best(metric, mode)
        wanted = f"no valid checkpoint with a value of {metric!r}"
    else:
        entry = catalogue.at_step(int(ref.selector))
        wanted = f"no checkpoint of step {ref.selector}"
        if entry is None:
            _raise_rejected(catalogue, int(ref.selector))
    if entry is None:
        raise CheckpointNotFound(f"{wanted}; {_existing(catalogue)}", phase="choose", path=ref.run)
    return entry


def _metric(catalogue: Catalogue, ref: RunRef) -> tuple[str, Mode]:
    """The metric of `best`: the one in the reference, else what the run's `config` monitors."""
    if ref.metric is not None:
        return ref.metric, ref.mode
    config = catalogue.run.config if catalogue.run else {}
    metric, mode = config.get("monitor"), config.get("mode")
    if isinstance(metric, str) and mode in ("min", "max"):
        return metric, "max" if mode == "max" else "min"
    known = sorted({name for entry in catalogue.entries for name in entry.encoded_metrics})
    # Guessing between min and max would quietly give the worst one.
    raise ConfigError(
        f"{ref.run}@best: the run does not say what it monitors; write RUN@best:METRIC:min or "
        f"RUN@best:METRIC:max (metrics: {', '.join(known) or 'none'})"
    )


def _raise_rejected(catalogue: Catalogue, step: int) -> None:
    for rejected in catalogue.rejected:
        if rejected.directory.step == step and rejected.state == "unreadable":
            raise rejected.error


def _existing(catalogue: Catalogue) -> str:
    steps = [
        f"{entry.step}{' (marked bad)' if entry.is_bad else ' (suspect)' if entry.is_suspect else ''}"
        for entry in catalogue.entries
    ]
    if not steps and catalogue.run is None and not catalogue.rejected:
        return "it is not a run: there is neither a run.json nor a step directory"
    if not steps:
        return "the run has no checkpoints"
    left_out = len(steps) - _MAX_LISTED
    shown = ([f"... {left_out} older"] if left_out > 0 else []) + steps[-_MAX_LISTED:]
    return f"existing steps: {', '.join(shown)}"
