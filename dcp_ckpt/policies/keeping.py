"""What to keep: policies over the checkpoints of a run. Asked by `dcp_ckpt.lifecycle.retention`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.policies.checks import finite, require_count, require_name, require_seconds

__all__ = ["BestN", "EveryNSeconds", "EveryNSteps", "KeepPolicy", "LatestN", "Mode", "Saved"]

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

    @property
    def is_suspect(self) -> bool: ...


class KeepPolicy(ABC):
    """Says which checkpoints to keep. What is protected otherwise is not its business."""

    @abstractmethod
    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        """Positions in `checkpoints` to keep, each with the reason.

        Args:
            checkpoints: all that count, in ascending order of (epoch, step).
        """


@dataclass(frozen=True)
class LatestN(KeepPolicy):
    """Keep the `n` newest."""

    n: int

    def __post_init__(self) -> None:
        require_count("LatestN", self.n)

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        first = max(0, len(checkpoints) - self.n)
        return dict.fromkeys(range(first, len(checkpoints)), f"among the latest {self.n}")


@dataclass(frozen=True)
class EveryNSteps(KeepPolicy):
    """Keep those whose step is a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        require_count("EveryNSteps", self.n)

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
        require_seconds("EveryNSeconds", self.seconds)

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
    """Keep the `n` best by a metric; of equal ones the newer.

    Missing and non-finite values never win, and neither do suspect checkpoints.

    Args:
        n: how many.
        metric: a name in the `metrics` of `save` or `report_metrics`.
        mode: "min" where less is better, "max" where more is.
    """

    n: int
    metric: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        require_count("BestN", self.n)
        require_name("BestN", self.metric)
        if self.mode not in ("min", "max"):
            raise ConfigError(f"BestN mode must be 'min' or 'max', not {self.mode!r}")

    def ranked(self, checkpoints: Sequence[Saved]) -> list[int]:
        """All positions that are not suspect and have a finite value of the metric, best first."""
        sign = 1.0 if self.mode == "min" else -1.0
        scores = [
            (sign * score, -i)
            for i, saved in enumerate(checkpoints)
            if not saved.is_suspect and (score := finite(saved.metrics.get(self.metric))) is not None
        ]
        return [-i for _, i in sorted(scores)]

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        reason = f"among the best {self.n} by {self.mode} {self.metric}"
        return dict.fromkeys(self.ranked(checkpoints)[: self.n], reason)
