"""Which checkpoints to mistrust: policies over metrics. Asked by `dcp_ckpt.lifecycle.suspicion`."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.policies.checks import finite, require_count, require_name, require_number

__all__ = ["LossSpike", "NotFinite", "SuspectPolicy"]

_FEWEST_BEFORE = 3
"""Of fewer checkpoints, none says what is usual."""


class SuspectPolicy(ABC):
    """Says whether the metrics of a checkpoint make it suspect.

    A suspect checkpoint can be loaded like any other; it never takes the place of a good one in retention,
    and is never the best.
    """

    @abstractmethod
    def reason(self, metrics: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str | None:
        """Why a checkpoint is suspect, or None.

        Args:
            metrics: its own.
            before: those of the checkpoints before it that are not suspect, oldest first.
        """


@dataclass(frozen=True)
class NotFinite(SuspectPolicy):
    """A metric is NaN or infinite."""

    def reason(self, metrics: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str | None:
        wrong = [
            f"{name} is {value}"
            for name, value in sorted(metrics.items())
            if isinstance(value, float) and not math.isfinite(value)
        ]
        return ", ".join(wrong) or None


@dataclass(frozen=True)
class LossSpike(SuspectPolicy):
    """A metric is NaN or infinite, or one of them has jumped.

    Args:
        metric: a loss: positive, and less is better.
        factor: how many times the median of the checkpoints before is too much.
        window: of so many checkpoints before; fewer than 3 say nothing.
    """

    metric: str = "loss"
    factor: float = 2.0
    window: int = 5

    def __post_init__(self) -> None:
        require_name("LossSpike", self.metric)
        require_number("LossSpike", "factor", self.factor, above=1.0)
        require_count("LossSpike", self.window)

    def reason(self, metrics: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> str | None:
        values = [value for one in before if (value := finite(one.get(self.metric))) is not None]
        usual, value = values[-self.window :], finite(metrics.get(self.metric))
        if value is not None and len(usual) >= min(_FEWEST_BEFORE, self.window):
            median = statistics.median(usual)
            if value > self.factor * median > 0:
                return f"{self.metric} jumped to {value:.6g}, from a median of {median:.6g}"
        return NotFinite().reason(metrics, before)
