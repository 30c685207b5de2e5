"""Diff: what two committed checkpoints have in common, and how far apart the rest is.

Owns the order: tables first, then digests, and of what they do not decide the tensors, window by window.
Changes nothing. Called by the command line and by users' own scripts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.load.source import Source
from dcp_ckpt.ops.checkpoint import Checkpoint, open_checkpoint
from dcp_ckpt.ops.diff_numbers import DifferenceCounter, TensorNumbers
from dcp_ckpt.ops.diff_plan import DiffPlan, DiffTables, TensorPair, plan_diff
from dcp_ckpt.ops.diff_proofs import Proofs, proofs_of
from dcp_ckpt.ops.stock import StockCheckpoint
from dcp_ckpt.ops.windows import Window, WindowReader, batches

__all__ = ["DiffProgress", "DiffReport", "TensorDiff", "ValueDiff", "diff"]

DiffProgress = Callable[[int, int], None]
"""Called with the bytes of tensors compared so far and those in all, of both checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """One tensor that is not the same in both.

    Args:
        numbers: None where the shapes differ.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    numbers: TensorNumbers | None


@dataclass(frozen=True, kw_only=True)
class ValueDiff:
    """One value that differs; `a` and `b` are typed JSON as it is stored (docs/format.md, section 7)."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class DiffReport:
    """What differs, each list by name.

    Args:
        a, b: paths or URLs of the checkpoints.
        step_a, step_b: None where nobody knows.
        only_in_a, only_in_b: names of tensors and values.
        tensors: those that differ in dtype, shape or any bit.
        values: those that differ.
        num_equal_tensors, num_equal_values: a tied tensor counts once.
        num_proven: how many tensors of these their digests proved equal, so that they were not read.
        unreadable: names of values that could not be compared.
        unverified: what could not be checked when it was read; empty for checkpoints of ours.
    """

    a: str
    b: str
    step_a: int | None
    step_b: int | None
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    values: tuple[ValueDiff, ...]
    num_equal_tensors: int
    num_proven: int
    num_equal_values: int
    unreadable: tuple[str, ...]
    unverified: str

    @property
    def equal(self) -> bool:
        """Whether nothing was found that differs."""
        return not (self.only_in_a or self.only_in_b or self.tensors or self.values)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    key: str = "*",
    progress: DiffProgress | None = None,
) -> DiffReport:
    """Compare two committed checkpoints, of any layouts. One process, without a GPU; blocks.

    Tensors are compared by their stored names and global contents, however they were sharded. What digests
    prove to be equal is not read. Values of single ranks are not compared. Memory: some windows of 16 MiB.

    Args:
        a: as in `open_checkpoint`; also a stock DCP directory.
        b: likewise.
        key: a glob of whole stored names, as `dcp-ckpt inspect` shows them; all others are left out.
        progress: told how far it is; what it raises ends the diff.

    Raises:
        CheckpointNotFound: there is no such checkpoint.
        StateMismatch: `key` matches nothing.
        CorruptCheckpoint: one is damaged, or was deleted meanwhile.
        StorageError: a read failed.
    """
    with open_checkpoint(a) as ours, open_checkpoint(b) as theirs:
        sources = (ours.source(), theirs.source())
        tables = (_tables(ours, sources[0]), _tables(theirs, sources[1]))
        plan = plan_diff(*tables, key)
        compared = _compare(sources, plan.compared, progress)
        return _report(ours, theirs, tables, plan, compared)


def _tables(checkpoint: Checkpoint, source: Source) -> DiffTables:
    values = {name: entry.value for name, entry in checkpoint.values.items()}
    return DiffTables(
        tensors=source.tensors,
        aliases={other: name for name, others in checkpoint.aliases.items() for other in others},
        values=values,
        unreadable=[name for name in source.names() if name not in values and name not in source.tensors],
        proofs=_proofs(checkpoint, source),
    )


def _proofs(checkpoint: Checkpoint, source: Source) -> dict[str, Proofs]:
    if isinstance(checkpoint, StockCheckpoint):
        return {}
    ranks = range(checkpoint.manifest.world_size)
    return proofs_of(map(checkpoint.fragment, ranks), {n: entry.dtype for n, entry in source.tensors.items()})


def _compare(
    sources: tuple[Source, Source], pairs: Sequence[TensorPair], progress: DiffProgress | None
) -> list[TensorDiff]:
    """Read the tensors of all pairs; those of which some bit differs."""
    a = WindowReader(sources[0], [pair.stored_a for pair in pairs])
    b = WindowReader(sources[1], [pair.stored_b for pair in pairs])
    counters = [DifferenceCounter() for _ in pairs]
    done_bytes, total_bytes = 0, sum(map(_num_bytes, pairs))
    for batch in batches(_wider(pair) for pair in pairs):
        done_bytes += _count(batch, a, b, counters)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return [
        _tensor_diff(pair, counter.numbers())
        for pair, counter in zip(pairs, counters, strict=True)
        if not counter.is_equal or pair.a.dtype != pair.b.dtype
    ]


def _count(
    batch: Sequence[Window], a: WindowReader, b: WindowReader, counters: Sequence[DifferenceCounter]
) -> int:
    """Count the windows of a batch, which are gone when this returns; how many bytes they had."""
    num_bytes = 0
    for window, ours, theirs in zip(batch, a.read(batch), b.read(batch), strict=True):
        counters[window.number].add(ours, theirs)
        num_bytes += ours.nbytes + theirs.nbytes
    return num_bytes


def _wider(pair: TensorPair) -> TensorEntry:
    """Of the two dtypes the larger one, which bounds the windows."""
    return max(pair.a, pair.b, key=lambda entry: dtype_info(entry.dtype).item_bytes)


def _num_bytes(pair: TensorPair) -> int:
    return sum(math.prod(one.shape) * dtype_info(one.dtype).item_bytes for one in (pair.a, pair.b))


def _tensor_diff(pair: TensorPair, numbers: TensorNumbers | None) -> TensorDiff:
    return TensorDiff(
        name=pair.name,
        dtype_a=pair.a.dtype,
        dtype_b=pair.b.dtype,
        shape_a=tuple(pair.a.shape),
        shape_b=tuple(pair.b.shape),
        numbers=numbers,
    )


def _report(
    a: Checkpoint, b: Checkpoint, tables: Sequence[DiffTables], plan: DiffPlan, compared: Sequence[TensorDiff]
) -> DiffReport:
    differing = [*compared, *(_tensor_diff(pair, None) for pair in plan.reshaped)]
    return DiffReport(
        a=a.url,
        b=b.url,
        step_a=a.step,
        step_b=b.step,
        only_in_a=plan.only_in_a,
        only_in_b=plan.only_in_b,
        tensors=tuple(sorted(differing, key=lambda tensor: tensor.name)),
        values=tuple(
            ValueDiff(name=name, a=tables[0].values[name], b=tables[1].values[name]) for name in plan.values
        ),
        num_equal_tensors=len(plan.compared) - len(compared) + len(plan.proven),
        num_proven=len(plan.proven),
        num_equal_values=plan.num_equal_values,
        unreadable=plan.unreadable,
        unverified=a.unverified or b.unverified,
    )
