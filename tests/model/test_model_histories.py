"""Long histories of one run, drawn at random: owners come, stop, wake up and die in the middle of anything.

Whatever happens, the promises hold at every moment, and would hold if everything died there and then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.policies import LatestN
from tests.model.explorer import require_kept
from tests.model.places import FilePlace, ObjectPlace, Place
from tests.model.stepping import Process, Task
from tests.model.world import Save, Trainer, World

_Item = TypeVar("_Item")
_MOST_OWNERS = 8
_STEPS = st.sampled_from([100, 200, 300, 400])
_WHICH = st.integers(min_value=0, max_value=99)
_OPERATIONS = st.sampled_from([1, 1, 2, 3, 5, 8, 13, 21, 200])


@dataclass
class Owner:
    """A trainer of the history, and what it is at."""

    trainer: Trainer
    main: Task | None = None
    save: Save | None = None
    writing: dict[int, Task] = field(default_factory=dict)
    has_started: bool = False

    @property
    def is_free(self) -> bool:
        """It could do something new."""
        return (
            self.has_started and not self.trainer.process.is_dead and (self.main is None or self.main.is_done)
        )


class History(RuleBasedStateMachine):
    """One run; `kind` and `begin` are set by the test."""

    kind: type[Place]
    begin: Callable[[World], World]

    @initialize()
    def make(self) -> None:
        self.world = self.begin(World(self.kind()))
        self.owners: list[Owner] = []
        self.tasks: list[Task] = []
        self.path: list[tuple[str, str]] = []
        self.count = 0

    def teardown(self) -> None:
        for task in getattr(self, "tasks", ()):
            task.kill()

    @rule(num_ranks=st.sampled_from([1, 2]), keep=st.sampled_from([1, 2]), oldest=st.booleans())
    def start(self, num_ranks: int, keep: int, oldest: bool) -> None:
        """A trainer starts, and resumes from the newest or from an older checkpoint."""
        if len(self.owners) >= _MOST_OWNERS:
            return
        owner = Owner(Trainer(self.world, self.name("trainer"), num_ranks=num_ranks, keep=LatestN(keep)))

        def run() -> None:
            owner.trainer.start()
            entries = owner.trainer.catalogue.entries
            owner.trainer.load(entries[0].step if oldest and entries and not entries[0].is_bad else "latest")
            owner.has_started = True

        self.owners.append(owner)
        owner.main = self.go(f"{owner.trainer.name} start", run)

    @rule(which=_WHICH, step=_STEPS, refused=st.sampled_from([False, False, True]))
    def save(self, which: int, step: int, refused: bool) -> None:
        """A trainer stages a save; its writers begin. Perhaps the last rank cannot stage."""
        owner = self.one_of([owner for owner in self.owners if owner.is_free and owner.save is None], which)
        if owner is None or any(not task.is_done for task in owner.writing.values()):
            return
        try:
            save = owner.save = owner.trainer.begin(step)
        except CheckpointError:
            return
        owner.writing = {}
        for rank in range(owner.trainer.num_ranks):
            if refused and rank == owner.trainer.num_ranks - 1:
                owner.trainer.fail(save, rank)
            elif not owner.trainer.writers[rank].is_dead:
                owner.writing[rank] = self.go(
                    f"{owner.trainer.name} writer {rank} {save.attempt}",
                    lambda rank=rank: owner.trainer.write(save, rank),  # type: ignore[misc]
                )

    @rule(which=_WHICH, in_time=st.booleans())
    def conclude(self, which: int, in_time: bool) -> None:
        """Rank 0 decides: when all have reported, or at the deadline."""
        owner = self.one_of([owner for owner in self.owners if owner.is_free and owner.save], which)
        if owner is None:
            return
        save = owner.save
        assert save is not None
        if in_time:
            for task in owner.writing.values():
                self.run(task, 1000)
        elif 0 in owner.writing and not owner.writing[0].is_done:
            # Its own trainer ends a writer at the deadline.
            owner.writing[0].kill()
            owner.trainer.fail(save, 0)
        owner.save = None
        owner.main = self.go(
            f"{owner.trainer.name} commit {save.attempt}", lambda: owner.trainer.conclude(save)
        )

    @rule(which=_WHICH, operations=_OPERATIONS)
    def go_on(self, which: int, operations: int) -> None:
        """Something that is under way comes a little further."""
        task = self.one_of([task for task in self.tasks if not task.is_done], which)
        if task is not None:
            self.run(task, operations)

    @rule(which=_WHICH, with_writers=st.booleans())
    def kill(self, which: int, with_writers: bool) -> None:
        """A trainer dies; its writers die with it or go on."""
        owner = self.one_of([owner for owner in self.owners if not owner.trainer.process.is_dead], which)
        if owner is None:
            return
        owner.trainer.die(with_writers=with_writers)
        for task in [owner.main, *(owner.writing.values() if with_writers else ())]:
            if task is not None:
                task.kill()

    @rule(which=_WHICH)
    def close(self, which: int) -> None:
        """A trainer ends as it should."""
        owner = self.one_of([owner for owner in self.owners if owner.is_free and owner.save is None], which)
        if owner is not None:
            owner.has_started = False
            owner.main = self.go(f"{owner.trainer.name} close", owner.trainer.close)

    @rule(which=_WHICH, lives=st.booleans())
    def lease(self, which: int, lives: bool) -> None:
        """A stopped process is taken for dead, or shows that it lives."""
        process = self.one_of([process for process in self.processes() if process.leases], which)
        if process is not None:
            process.beat() if lives and not process.is_dead else process.expire()

    @rule(keep=st.sampled_from([1, 2]), force=st.booleans())
    def prune(self, keep: int, force: bool) -> None:
        name = self.name("prune")
        self.command(name, lambda: self.world.command_prune(name, LatestN(keep), force=force))

    @rule(force=st.booleans())
    def recover(self, force: bool) -> None:
        name = self.name("recover")
        self.command(name, lambda: self.world.command_recover(name, force=force))

    @rule(step=_STEPS)
    def pin(self, step: int) -> None:
        name = self.name("pin")
        self.command(name, lambda: self.world.command_pin(name, step))

    @rule(step=_STEPS)
    def unpin(self, step: int) -> None:
        name = self.name("unpin")
        self.command(name, lambda: self.world.command_unpin(name, step))

    @rule(which=_WHICH)
    def damage(self, which: int) -> None:
        """The disk damages one of several good checkpoints."""
        good = sorted(self.world.visible().keys() - self.world.ledger.damaged)
        attempt = self.one_of(good, which)
        if attempt is not None and len(good) > 2:
            self.world.damage(attempt)

    @rule(which=_WHICH)
    def leave_a_note(self, which: int) -> None:
        """Somebody puts a file of theirs beside ours."""
        attempt = self.one_of(sorted(self.world.visible()), which)
        if attempt is not None and len(self.world.ledger.foreign) < 2:
            self.world.leave_foreign_file(attempt.directory, f"{self.name('note')}.txt")

    @invariant()
    def promises_are_kept(self) -> None:
        if hasattr(self, "world"):
            require_kept(self.world, self.path)

    def command(self, name: str, act: Callable[[], object]) -> None:
        if self.count < 3 * _MOST_OWNERS:
            self.go(name, act)

    def go(self, name: str, act: Callable[[], object]) -> Task:
        task = Task(name, act)
        self.tasks.append(task)
        return task

    def run(self, task: Task, operations: int) -> None:
        for _ in range(operations):
            if task.is_done:
                break
            self.path.append((task.name, task.pending))
            task.step()
        if isinstance(task.result, BaseException) and not isinstance(task.result, CheckpointError):
            raise task.result

    def processes(self) -> list[Process]:
        return list(self.world.processes.values())

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.count}"

    @staticmethod
    def one_of(items: list[_Item], which: int) -> _Item | None:
        return items[which % len(items)] if items else None


def machine(kind: type[Place], begin: Callable[[World], World]) -> type[History]:
    return type(f"{kind.__name__}History", (History,), {"kind": kind, "begin": staticmethod(begin)})


@pytest.mark.parametrize("kind", [FilePlace, ObjectPlace])
@pytest.mark.parametrize(
    "num_histories", [30, pytest.param(400, marks=[pytest.mark.crash, pytest.mark.timeout(900)])]
)
def test_any_history_keeps_the_promises(
    repeatable: Callable[[World], World], kind: type[Place], num_histories: int
) -> None:
    run_state_machine_as_test(
        machine(kind, repeatable),
        settings=settings(
            max_examples=num_histories,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
