"""A run of the benchmark: rounds in which every system has its turn, checked loads, and failures of peers.

Knows the order of things, not what they mean: that is in `saves` and `loads`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from benchmarks.measure import Ranks, Samples, SectionFailed, slowest, timed
from benchmarks.peers import DEADLINE_SECONDS, Overlap, System, make_system
from benchmarks.ratios import OURS
from benchmarks.workload import Digests, State

__all__ = ["Bench", "say"]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all phases share.

    Args:
        directory: everything is written below it.
        state_bytes: of the sharded state, over all ranks.
        rounds: rounds that count; each phase runs one more before them.
        overlap: of this project where the tensors are trained on during a save.
        missing: names of systems that are not there or have failed -> reason.
        notes: what a reader must know about a system's numbers.
    """

    directory: Path
    state_bytes: int
    rounds: int
    overlap: Overlap
    ranks: Ranks
    samples: Samples = field(default_factory=Samples)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def each_round(self, phase: str, *, warm: bool = False) -> Iterator[int]:
        """Numbers of the rounds; round 0 warms up, is not counted, and is left out when all is `warm`."""
        for number in range(int(warm), self.rounds + 1):
            self.samples.counting = number > 0
            if self.ranks.rank == 0:
                say(f"{phase}: " + (f"round {number} of {self.rounds}" if number else "warming up"))
            yield number

    def in_turn(self, number: int, acts: Sequence[Callable[[], None]]) -> None:
        """Run all acts; another one is first in each round, so that none always follows the same one."""
        first = number % len(acts)
        for act in (*acts[first:], *acts[:first]):
            act()

    def make(self, name: str, *, directory: str = "") -> System | None:
        """Start a system; None, with the reason printed, when it is not installed or does not start."""
        made: list[System] = []
        group = self.new_group()
        try:
            self.ranks.together(lambda: made.append(self.start(name, group, directory=directory)))
        except SectionFailed as error:
            if name == OURS:
                raise
            self.drop(name, str(error))
            return None
        return made[0]

    def start(self, name: str, group: dist.ProcessGroup, *, directory: str = "") -> System:
        """This rank's part of starting a system, which all ranks do together.

        Args:
            group: of all ranks, for this system only.
            directory: of its saves, below that of the run; "" for one of its name.
        """
        where = self.directory / (directory or name).replace(" ", "-")
        system = make_system(name, where, self.overlap, group)
        if system.note:
            self.notes[name] = system.note
        return system

    def attempt(self, name: str, metrics: Sequence[str], state: State, act: Callable[[], None]) -> None:
        """Run one system's part of a round. A peer that fails gets failed rows and is left out from then on.

        Args:
            name: of the system.
            metrics: that `act` measures for it.
            state: what it works on; made whole again after a failure.
        """
        if name not in self.missing:
            try:
                act()
                return
            except SectionFailed as error:
                if name == OURS:
                    raise
                self.drop(name, str(error))
                self.ranks.together(state.fill)
        for metric in metrics:
            self.samples.fail(metric, name, self.missing[name])

    def close(self, system: System) -> None:
        """End a system; of a peer it does not matter how."""
        try:
            system.close()
        except (Exception, CheckpointException) as error:
            if system.name == OURS:
                raise
            say(f"closing {system.name} on rank {self.ranks.rank}: {error}")

    def drop(self, name: str, reason: str) -> None:
        self.missing[name] = reason
        if self.ranks.rank == 0:
            say(f"without {name}: {reason}")

    def checked_load(self, load: Callable[[], object], state: State, expected: Digests, system: str) -> float:
        """Load over NaNs and compare every byte; the time of the slowest rank.

        Ranks outside of the state's layout only wait.
        """
        self.ranks.together(state.scramble)
        parts = self.ranks.together(lambda: timed(load) if state.tensors else None)
        self.ranks.together(lambda: state.check(expected, system))
        return slowest(parts)["seconds"]

    def digests_of(self, state: State) -> Digests:
        """Of all blocks that some rank holds; called on all ranks."""
        gathered: list[dict[tuple[int, int], str]] = [{} for _ in range(self.ranks.size)]
        dist.all_gather_object(gathered, state.digests())
        return {key: value for digests in gathered for key, value in digests.items()}

    def on_first_rank(self, act: Callable[[], object]) -> None:
        """Run `act` on rank 0 while the others wait."""

        def run() -> None:
            if self.ranks.rank == 0:
                act()

        self.ranks.together(run)

    def remove(self, directory: Path) -> None:
        """Remove what is below this run's directory; processes that are just ending may still write there."""
        shutil.rmtree(directory, ignore_errors=True)

    @staticmethod
    def new_group(ranks: Sequence[int] | None = None) -> dist.ProcessGroup:
        """A group of its own, of all ranks or of some; its collectives fail after the deadline."""
        group: dist.ProcessGroup = dist.new_group(
            list(ranks) if ranks is not None else None, timeout=timedelta(seconds=DEADLINE_SECONDS)
        )
        return group


def say(text: str) -> None:
    print(text, flush=True)
