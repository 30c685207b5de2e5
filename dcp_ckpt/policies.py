"""Policies as values: when to save, and what to keep.

Owns the rules themselves, as small frozen objects with one pure method each. They know no storage and no
clock: the caller tells them what it sees. `dcp_ckpt.config` holds them, the checkpointer asks the save
policies on rank 0 only, `dcp_ckpt.lifecycle.retention` asks the keep policies.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from numbers import Real
from typing import Any, Literal, Protocol

from dcp_ckpt.errors import ConfigError

__all__ = [
    "AnyOf",
    "AtSteps",
    "BestN",
    "EveryNSeconds",
    "EveryNSteps",
    "EverySeconds",
    "EverySteps",
    "KeepPolicy",
    "LatestN",
    "Mode",
    "SavePolicy",
    "Saved",
    "is_keep_policy",
    "is_save_policy",
]

Mode = Literal["min", "max"]


class Saved(Protocol):
    """What a keep policy sees of one committed checkpoint."""

    @property
    def epoch(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def created_at(self) -> datetime: ...

    @property
    def metrics(self) -> Mapping[str, Any]: ...


class SavePolicy(ABC):
    """Says whether a save is due."""

    @abstractmethod
    def is_due(self, *, step: int, seconds_since_save: float) -> bool:
        """Whether to save now.

        Args:
            step: the number of finished optimizer steps.
            seconds_since_save: since the last save began, or since the start when there was none.
        """


class KeepPolicy(ABC):
    """Says which checkpoints to keep. What is protected otherwise is not its business."""

    @abstractmethod
    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        """Positions in `checkpoints` to keep, each with the reason.

        Args:
            checkpoints: all that count, in ascending order of (epoch, step).
        """


@dataclass(frozen=True)
class EverySteps(SavePolicy):
    """Save when the step is a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        _require_count("EverySteps", self.n)

    def is_due(self, *, step: int, seconds_since_save: float) -> bool:
        return step % self.n == 0


@dataclass(frozen=True)
class EverySeconds(SavePolicy):
    """Save when the last save lies `seconds` back."""

    seconds: float

    def __post_init__(self) -> None:
        _require_seconds("EverySeconds", self.seconds)

    def is_due(self, *, step: int, seconds_since_save: float) -> bool:
        return seconds_since_save >= self.seconds


@dataclass(frozen=True, init=False)
class AtSteps(SavePolicy):
    """Save at exactly these steps."""

    steps: tuple[int, ...]

    def __init__(self, *steps: int) -> None:
        if not steps:
            raise ConfigError("AtSteps() needs at least one step")
        for step in steps:
            _require_count("AtSteps", step)
        object.__setattr__(self, "steps", steps)

    def is_due(self, *, step: int, seconds_since_save: float) -> bool:
        return step in self.steps


@dataclass(frozen=True)
class LatestN(KeepPolicy):
    """Keep the `n` newest."""

    n: int

    def __post_init__(self) -> None:
        _require_count("LatestN", self.n)

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        first = max(0, len(checkpoints) - self.n)
        return dict.fromkeys(range(first, len(checkpoints)), f"among the latest {self.n}")


@dataclass(frozen=True)
class EveryNSteps(KeepPolicy):
    """Keep those whose step is a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        _require_count("EveryNSteps", self.n)

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        reason = f"every {self.n} steps"
        return {i: reason for i, saved in enumerate(checkpoints) if saved.step % self.n == 0}


@dataclass(frozen=True)
class EveryNSeconds(KeepPolicy):
    """Keep the oldest, then each one that is `seconds` younger than the one kept before it.

    Removing what this does not keep never changes what it keeps.
    """

    seconds: float

    def __post_init__(self) -> None:
        _require_seconds("EveryNSeconds", self.seconds)

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        kept: dict[int, str] = {}
        last: datetime | None = None
        for i in sorted(range(len(checkpoints)), key=lambda i: checkpoints[i].created_at):
            created_at = checkpoints[i].created_at
            if last is None or (created_at - last).total_seconds() >= self.seconds:
                kept[i] = f"every {self.seconds:g} seconds"
                last = created_at
        return kept


@dataclass(frozen=True)
class BestN(KeepPolicy):
    """Keep the `n` best by a metric; of equal ones the newer. Missing and non-finite values never win."""

    n: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _require_count("BestN", self.n)
        _require_name("BestN", self.metric)
        if self.mode not in ("min", "max"):
            raise ConfigError(f"BestN mode must be 'min' or 'max', not {self.mode!r}")

    def ranked(self, checkpoints: Sequence[Saved]) -> list[int]:
        """All positions that have a finite value of the metric, best first."""
        sign = 1.0 if self.mode == "min" else -1.0
        scores = [
            (sign * score, -i)
            for i, saved in enumerate(checkpoints)
            if (score := _finite(saved.metrics.get(self.metric))) is not None
        ]
        return [-i for _, i in sorted(scores)]

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        reason = f"among the best {self.n} by {self.mode} {self.metric}"
        return dict.fromkeys(self.ranked(checkpoints)[: self.n], reason)


@dataclass(frozen=True, init=False, repr=False)
class AnyOf(SavePolicy, KeepPolicy):
    """What any of the policies says; all of them save policies, or all keep policies."""

    policies: tuple[SavePolicy | KeepPolicy, ...]

    def __init__(self, *policies: SavePolicy | KeepPolicy) -> None:
        object.__setattr__(self, "policies", policies)
        if not policies:
            raise ConfigError("AnyOf() needs at least one policy")
        if not is_save_policy(self) and not is_keep_policy(self):
            raise ConfigError(
                f"AnyOf takes either save policies or keep policies, not {', '.join(map(repr, policies))}"
            )

    def __repr__(self) -> str:
        return f"AnyOf({', '.join(map(repr, self.policies))})"

    def is_due(self, *, step: int, seconds_since_save: float) -> bool:
        return any(
            isinstance(policy, SavePolicy) and policy.is_due(step=step, seconds_since_save=seconds_since_save)
            for policy in self.policies
        )

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        kept: dict[int, str] = {}
        for policy in self.policies:
            if isinstance(policy, KeepPolicy):
                for position, reason in policy.keeps(checkpoints).items():
                    kept[position] = f"{kept[position]}, {reason}" if position in kept else reason
        return kept


def is_save_policy(value: object) -> bool:
    """Whether `value` can be asked when to save."""
    if isinstance(value, AnyOf):
        return all(map(is_save_policy, value.policies))
    return isinstance(value, SavePolicy)


def is_keep_policy(value: object) -> bool:
    """Whether `value` can be asked what to keep."""
    if isinstance(value, AnyOf):
        return all(map(is_keep_policy, value.policies))
    return isinstance(value, KeepPolicy)


def _finite(value: Any) -> float | None:
    """The value of a metric as a number that can be compared, or None."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _require_count(policy: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{policy} needs a whole number of at least 1, not {value!r}")


def _require_name(policy: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{policy} needs the name of a metric, not {value!r}")


def _require_seconds(policy: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ConfigError(f"{policy} needs a positive number of seconds, not {value!r}")
