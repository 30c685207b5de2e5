"""What an average holds: a pure function of the tables of the checkpoints that go into it.

Called by `ops.average`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcp_ckpt.errors import ConfigError, StateMismatch
from dcp_ckpt.ops.new_state import NewTensor, NewValue
from dcp_ckpt.wording import shown_names

__all__ = ["AveragePlan", "AverageTables", "plan_average", "require_weights"]

_OPTIMIZERS = frozenset({"optim", "optimizer", "optimizers"})
"""What states of optimizers are called at the top of a state, here and elsewhere."""


@dataclass(frozen=True, kw_only=True)
class AverageTables:
    """What an average needs to know of one checkpoint.

    Args:
        url: for messages.
        step: None where nobody knows.
    """

    url: str
    step: int | None
    tensors: Sequence[NewTensor]
    values: Sequence[NewValue]


@dataclass(frozen=True, kw_only=True)
class AveragePlan:
    """What is made of what.

    Args:
        newest: which of the checkpoints everything comes from that has no average.
        tensors: of the new checkpoint.
        averaged: for each of them whether it is an average; else it is that of the newest.
        values: of the newest.
        left_out: name -> why it is not in the new checkpoint.
    """

    newest: int
    tensors: tuple[NewTensor, ...]
    averaged: tuple[bool, ...]
    values: tuple[NewValue, ...]
    left_out: Mapping[str, str]


def require_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One weight for each checkpoint; 1 where nothing is said.

    Raises:
        ConfigError: they are of another number, or have no sum to divide by.
    """
    if count < 1:
        raise ConfigError("nothing to average: name at least one checkpoint")
    if weights is None:
        return (1.0,) * count
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} checkpoints: give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ConfigError(f"weights {list(weights)}: finite numbers, none below 0 and not all 0")
    return tuple(map(float, weights))


def plan_average(tables: Sequence[AverageTables], *, include_optimizer: bool) -> AveragePlan:
    """Decide what is averaged. Pure.

    Raises:
        StateMismatch: the checkpoints hold different tensors; one message says all that differs.
    """
    newest = max(range(len(tables)), key=lambda number: (_step(tables[number]), number))
    wanted = [
        {
            tensor.name: tensor
            for tensor in table.tensors
            if include_optimizer or not _is_optimizer(tensor.path)
        }
        for table in tables
    ]
    if problems := [
        wrong for number in range(len(tables)) for wrong in _misfits(tables, wanted, number, newest)
    ]:
        raise StateMismatch(f"these checkpoints have no average: {'; '.join(problems)}")
    if not wanted[newest]:
        raise StateMismatch(f"there is nothing to average in {tables[newest].url}")
    others = [entry for entry in tables[newest].values if include_optimizer or not _is_optimizer(entry.path)]
    kept = {*wanted[newest], *(entry.name for entry in others)}
    held = [
        *(tensor.name for tensor in tables[newest].tensors),
        *(entry.name for entry in tables[newest].values),
    ]
    tensors = tuple(wanted[newest].values())
    return AveragePlan(
        newest=newest,
        tensors=tensors,
        averaged=tuple("float" in tensor.dtype or "complex" in tensor.dtype for tensor in tensors),
        values=tuple(others),
        left_out={name: "of an optimizer" for name in held if name not in kept},
    )


def _step(table: AverageTables) -> int:
    return -1 if table.step is None else table.step


def _is_optimizer(path: Sequence[str]) -> bool:
    return path[0] in _OPTIMIZERS


def _misfits(
    tables: Sequence[AverageTables],
    wanted: Sequence[Mapping[str, NewTensor]],
    number: int,
    newest: int,
) -> Iterator[str]:
    """How one checkpoint differs from the newest."""
    ours, theirs = wanted[newest], wanted[number]
    where = f"{tables[number].url} has, unlike {tables[newest].url},"
    if missing := sorted(ours.keys() - theirs.keys()):
        yield f"{where} no {shown_names(missing)}"
    if extra := sorted(theirs.keys() - ours.keys()):
        yield f"{where} {shown_names(extra)}"
    differing = [
        f"{name} as {_shown(theirs[name])}, not {_shown(ours[name])}"
        for name in sorted(ours.keys() & theirs.keys())
        if _shown(ours[name]) != _shown(theirs[name])
    ]
    if differing:
        yield f"{where} {shown_names(differing)}"


def _shown(tensor: NewTensor) -> str:
    tied = sorted(".".join(path) for path in tensor.aliases)
    return f"{tensor.dtype} of shape {list(tensor.shape)}{' tied to ' + ', '.join(tied) if tied else ''}"
