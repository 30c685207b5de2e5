"""Average: one checkpoint out of several, element by element.

Owns which checkpoints are meant and the arithmetic. Called by the command line and by users' own scripts;
imports torch when it reads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

from dcp_ckpt.errors import CheckpointNotFound, ConfigError
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.ops.average_plan import AveragePlan, AverageTables, plan_average, require_weights
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.ops.importing.dcp_source import CheckpointSource
from dcp_ckpt.ops.new_checkpoint import WriteProgress, write_checkpoint
from dcp_ckpt.ops.new_state import NewState
from dcp_ckpt.ops.windows import Window, WindowReader, batches
from dcp_ckpt.storage import open_storage

if TYPE_CHECKING:
    import torch

__all__ = ["AverageReport", "AveragedCheckpoint", "average"]

_TAG = "average"

_Ref = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class AveragedCheckpoint:
    """One checkpoint that went into an average.

    Args:
        step: None where nobody knows.
        weight: its part of the whole, from 0 to 1.
    """

    path: str
    step: int | None
    weight: float


@dataclass(frozen=True, kw_only=True)
class AverageReport:
    """What was averaged, and where it is now.

    Args:
        path: of the new checkpoint.
        step, epoch: its own.
        sources: in the order that they were named; with `last`, from old to new.
        newest: path of the one that integers and values are from.
        num_averaged: tensors.
        num_copied, num_values: tensors and values of the newest, as they were.
        num_bytes: written.
        left_out: reason -> how many tensors and values of the newest.
        unverified: what could not be checked when it was read; empty for checkpoints of ours.
    """

    path: str
    step: int
    epoch: int
    sources: tuple[AveragedCheckpoint, ...]
    newest: str
    num_averaged: int
    num_copied: int
    num_values: int
    num_bytes: int
    left_out: Mapping[str, int]
    unverified: str


def average(
    refs: Sequence[_Ref] | _Ref,
    run: _Ref,
    *,
    step: int,
    weights: Sequence[float] | None = None,
    last: int | None = None,
    include_optimizer: bool = False,
    force: bool = False,
    wait_seconds: float = 0.0,
    progress: WriteProgress | None = None,
) -> AverageReport:
    """Make a committed checkpoint of a run that is the average of others. One process; blocks.

    Floating and complex tensors are the weighted mean, summed up in float32 (float64 for float64 and
    complex128) and rounded once, to the stored dtype. Other tensors and values are those of the newest one,
    which is that of the greatest step. Values of single ranks are left out. The checkpoints may have been
    saved in any layouts. If it fails, nothing of it counts. Memory: some windows of 16 MiB.

    Args:
        refs: as in `open_checkpoint`; with `last`, one run.
        run: directory or URL of the run that the average goes into; made if nothing is there.
        step: greater than that of every checkpoint of this run.
        weights: one for each checkpoint, not below 0; their sum need not be 1. By default all are equal.
        last: the newest so many checkpoints of the run, without those that are marked bad.
        include_optimizer: average the state of optimizers, too, which is left out otherwise.
        force: go on although a live owner holds the run; it is fenced then, and cannot save any more.
        wait_seconds: how long to wait for an owner that lives.
        progress: told how far it is; what it raises ends it.

    Raises:
        CheckpointNotFound: there is no such checkpoint, or the run has fewer.
        ConfigError: the arguments contradict each other, `run` is no run, or a live owner holds it.
        StateMismatch: names, shapes or dtypes differ; one message says all that does.
        StepAlreadySaved: the run has a checkpoint of this step or a later one.
        CorruptCheckpoint: one is damaged, or was deleted meanwhile.
        StorageFull: there is no room; found before anything is written.
        StorageError: a read or write failed.
    """
    chosen = [refs] if isinstance(refs, str | os.PathLike) else list(refs)
    if last is not None:
        chosen = list(_newest(chosen, last))
    scale = require_weights(weights, len(chosen))
    with ExitStack() as opened:
        sources = [CheckpointSource(opened.enter_context(open_checkpoint(ref))) for ref in chosen]
        plan = plan_average([_tables(source) for source in sources], include_optimizer=include_optimizer)
        storage = opened.enter_context(closing(open_storage(os.fspath(run))))
        written = write_checkpoint(
            storage,
            NewState(tensors=plan.tensors, values=plan.values, tags=[_TAG]),
            _Mean(sources, scale, plan).windows,
            step=step,
            purpose="average",
            force=force,
            wait_seconds=wait_seconds,
            progress=progress,
        )
        left_out = {**plan.left_out, **sources[plan.newest].left_out}
        return AverageReport(
            path=f"{storage.url.rstrip('/')}/{written.directory}",
            step=step,
            epoch=written.epoch,
            sources=tuple(
                AveragedCheckpoint(
                    path=source.checkpoint.url, step=source.checkpoint.step, weight=weight / sum(scale)
                )
                for source, weight in zip(sources, scale, strict=True)
            ),
            newest=sources[plan.newest].checkpoint.url,
            num_averaged=sum(plan.averaged),
            num_copied=len(plan.averaged) - sum(plan.averaged),
            num_values=len(plan.values),
            num_bytes=written.num_bytes,
            left_out=dict(sorted(Counter(left_out.values()).items())),
            unverified=next((source.unverified for source in sources if source.unverified), ""),
        )


def _newest(refs: Sequence[_Ref], last: int) -> Iterator[str]:
    """References to the newest checkpoints of a run, from old to new."""
    if len(refs) != 1:
        raise ConfigError(f"last is for the checkpoints of one run, and {len(refs)} references are given")
    if last < 1:
        raise ConfigError(f"last is {last}; it must be at least 1")
    run = os.fspath(refs[0])
    with closing(open_storage(run)) as storage:
        valid = [entry for entry in read_catalogue(storage).entries if not entry.is_bad]
        if len(valid) < last:
            raise CheckpointNotFound(f"not {last} valid checkpoints in this run, but {len(valid)}", path=run)
        for entry in valid[-last:]:
            yield f"{run.rstrip('/')}/{entry.directory}"


def _tables(source: CheckpointSource) -> AverageTables:
    return AverageTables(
        url=source.checkpoint.url,
        step=source.checkpoint.step,
        tensors=source.tensors,
        values=source.values,
    )


class _Mean:
    """The contents of the new checkpoint.

    Args:
        scale: the weight of each source.
    """

    def __init__(
        self, sources: Sequence[CheckpointSource], scale: Sequence[float], plan: AveragePlan
    ) -> None:
        self._sources = sources
        self._scale = scale
        self._plan = plan

    def windows(self, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        """As `Windows`."""
        names = [self._plan.tensors[number].name for number in numbers]
        readers = [WindowReader(source.tables, names) for source in self._sources]
        newest = readers[self._plan.newest]
        tensors = self._sources[self._plan.newest].tables.tensors
        for batch in batches(tensors[name] for name in names):
            is_mean = [self._plan.averaged[numbers[window.number]] for window in batch]
            means = self._means(readers, list(compress(batch, is_mean)))
            copied = iter(newest.read([w for w, mean in zip(batch, is_mean, strict=True) if not mean]))
            for mean in is_mean:
                yield next(means if mean else copied)

    def _means(self, readers: Sequence[WindowReader], batch: Sequence[Window]) -> Iterator[torch.Tensor]:
        first, *others = readers
        parts = first.read(batch)
        dtypes = [part.dtype for part in parts]
        sums = [part.to(_summed_in(part.dtype)).mul_(self._scale[0]) for part in parts]
        for reader, weight in zip(others, self._scale[1:], strict=True):
            for total, part in zip(sums, reader.read(batch), strict=True):
                total.add_(part.to(total.dtype), alpha=weight)
        for total, dtype in zip(sums, dtypes, strict=True):
            yield total.div_(sum(self._scale)).to(dtype)


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    import torch

    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32
