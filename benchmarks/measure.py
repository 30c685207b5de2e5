"""Sections that all ranks run together on one clock, and the samples that come out of them.

Knows neither what is measured nor any checkpointing system. Used by every other module of the benchmark.
"""

from __future__ import annotations

import faulthandler
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

__all__ = [
    "Ranks",
    "Samples",
    "SectionFailed",
    "WrongBytes",
    "median_and_mad",
    "slowest",
    "timed",
    "total",
]

Parts = Mapping[str, float]

_STUCK_SECONDS = 300.0
"""A section that lasts longer prints the stacks of all its threads."""


class SectionFailed(Exception):
    """Some rank failed in a section; raised on all of them, with the first failure as the message."""


class WrongBytes(Exception):
    """A load gave other bytes than were saved: nothing that was measured counts."""


def median_and_mad(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the median absolute deviation from it.

    Raises:
        statistics.StatisticsError: there are no values.
    """
    median = statistics.median(values)
    return median, statistics.median(abs(value - median) for value in values)


class Samples:
    """What was measured: one value for each metric, system and round.

    Args of the attributes:
        counting: False while warming up: values are dropped.
        failures: metric and system -> why there is no number.
    """

    def __init__(self) -> None:
        self.counting = True
        self.values: dict[tuple[str, str], list[float]] = {}
        self.failures: dict[tuple[str, str], str] = {}

    def add(self, metric: str, system: str, value: float) -> None:
        if self.counting:
            self.values.setdefault((metric, system), []).append(value)

    def fail(self, metric: str, system: str, reason: str) -> None:
        self.failures.setdefault((metric, system), reason)

    def medians(self) -> dict[tuple[str, str], float]:
        """Of everything that did not fail."""
        return {
            key: statistics.median(values) for key, values in self.values.items() if key not in self.failures
        }


class Ranks:
    """The ranks of a process group, doing one thing at a time.

    Its collectives run on a group that nothing else uses, so that a system may run its own meanwhile.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def together(self, act: Callable[[], Parts | None]) -> list[dict[str, float]]:
        """Run `act` on every rank, starting at once. Called on all ranks; blocks.

        Returns:
            What `act` returned, by rank; nothing for ranks where it returned None.

        Raises:
            WrongBytes, SectionFailed: `act` failed on some rank; all ranks raise the same.
        """
        faulthandler.dump_traceback_later(_STUCK_SECONDS)  # where every rank stands, before deadlines hide it
        dist.barrier(group=self._group)
        parts: Parts = {}
        kind = text = ""
        try:
            parts = act() or {}
        except (Exception, CheckpointException) as error:  # the second is not an Exception
            kind = "bytes" if isinstance(error, WrongBytes) else "failed"
            text = f"rank {self.rank}: {type(error).__name__}: {error}"
        outcomes: list[tuple[dict[str, float], str, str]] = [({}, "", "")] * self.size
        dist.all_gather_object(outcomes, (dict(parts), kind, text), group=self._group)
        faulthandler.cancel_dump_traceback_later()
        for _, kind, text in sorted(outcomes, key=lambda outcome: outcome[1]):
            if kind:
                raise (WrongBytes if kind == "bytes" else SectionFailed)(text)
        return [outcome[0] for outcome in outcomes]

    def seconds(self, act: Callable[[], object]) -> float:
        """How long the slowest rank takes for `act`; as `together`."""
        return slowest(self.together(lambda: timed(act)))["seconds"]


def timed(act: Callable[[], object]) -> dict[str, float]:
    """Run `act`; its wall time as a part."""
    start = time.perf_counter()
    act()
    return {"seconds": time.perf_counter() - start}


def slowest(parts: Sequence[Parts]) -> dict[str, float]:
    """For each part, the greatest over the ranks that have it."""
    return _reduced(parts, max)


def total(parts: Sequence[Parts]) -> dict[str, float]:
    """For each part, the sum over the ranks that have it."""
    return _reduced(parts, sum)


def _reduced(parts: Sequence[Parts], reduce: Callable[[list[float]], float]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: reduce([part[name] for part in parts if name in part]) for name in names}
