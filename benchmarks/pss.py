"""What processes weigh while they work: their proportional set sizes, sampled from outside.

Shared memory counts once in the sum over all who map it. Knows no checkpointing system. A sampler takes up to
half of a core, so nothing is timed while one runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import fields_of

__all__ = ["Peak", "Sampler", "Weight", "tree_of"]

PERIOD_SECONDS = 0.020
_LOOK_SECONDS = 0.2
"""How often new processes are looked for."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The sums over some processes.

    Args:
        pss_bytes: proportional set sizes of all.
        writer_bytes: those of the writers, without shared memory: staging is no writer's own.
    """

    pss_bytes: int = 0
    writer_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most that was seen, each number by itself."""

    pss_bytes: int
    writer_bytes: int
    num_samples: int


class Sampler:
    """Weighs processes from one call to the next, in a thread of its own.

    Args:
        roots: weighed with all their descendants. One that has ended weighs nothing.
        writers: those among them that are weighed apart as well.
    """

    def __init__(self, roots: Sequence[int], writers: Sequence[int]) -> None:
        self._roots = roots
        self._writers = frozenset(writers)
        self._weights: list[Weight] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> Peak:
        """End it. Blocks for less than a sample; there is at least one."""
        self._stopped.set()
        self._thread.join()
        return Peak(
            pss_bytes=max(weight.pss_bytes for weight in self._weights),
            writer_bytes=max(weight.writer_bytes for weight in self._weights),
            num_samples=len(self._weights),
        )

    def _run(self) -> None:
        looked = float("-inf")
        pids: set[int] = set()
        while not (self._stopped.is_set() and self._weights):
            start = time.monotonic()
            if start - looked > _LOOK_SECONDS:
                pids, looked = tree_of(self._roots), start
            self._weights.append(_weigh(pids, self._writers))
            # Never more than half of a core.
            took = time.monotonic() - start
            self._stopped.wait(max(PERIOD_SECONDS - took, took))


def tree_of(roots: Iterable[int]) -> set[int]:
    """The processes and all their descendants, as far as their parents live."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(directory.name))
    found: set[int] = set()
    ahead = list(roots)
    while ahead:
        pid = ahead.pop()
        if pid not in found:
            found.add(pid)
            ahead.extend(children.get(pid, ()))
    return found


def _weigh(pids: Iterable[int], writers: Set[int]) -> Weight:
    pss = of_writers = 0
    for pid in pids:
        try:
            fields = fields_of(Path(f"/proc/{pid}/smaps_rollup"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        pss += fields.get("Pss", 0) << 10
        if pid in writers:
            of_writers += (fields.get("Pss_Anon", 0) + fields.get("Pss_File", 0)) << 10
    return Weight(pss_bytes=pss, writer_bytes=of_writers)
