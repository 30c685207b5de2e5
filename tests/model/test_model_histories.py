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
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.policies import LatestN
from tests.model.explorer import require_kept
from tests.model.places import FilePlace, ObjectPlace, Place
from tests.model.promises import Attempt, damaged_in
from tests.model.stepping import Process, Task
from tests.model.trainers import Save, Trainer
from tests.model.world import World

_Item = TypeVar("_Item")
_MOST_OWNERS = 8
_MOST_NAMES = 24
_ALL = 10_000
_STEPS = st.sampled_from([100, 200, 300, 400])
_WHICH = st.integers(min_value=0, max_value=99)
_OPERATIONS = st.sampled_from([1, 2, 3, 5, 8, 13, 21, 34, _ALL])
_FIRST_OPERATIONS = st.sampled_from([_ALL, _ALL, _ALL, 0, 5, 13, 21, 34])
"""How far something comes at once; most things come to their end."""


@dataclass
class Owner:
    """A trainer of the history, and what it is at."""

    trainer: Trainer
    main: Task | None = None
    saving: Save | None = None
    writing: dict[int, Task] = field(default_factory=dict)
    has_started: bool = False

    @property
    def may_save(self) -> bool:
        return self._is_free and self.saving is None and all(task.is_done for task in self.writing.values())

    @property
    def may_conclude(self) -> bool:
        return self._is_free and self.saving is not None

    @property
    def _is_free(self) -> bool:
        """Its main thread has nothing to do."""
        is_busy = self.main is not None and not self.main.is_done
        return self.has_started and not is_busy and not self.trainer.process.is_dead


class History(RuleBasedStateMachine):
    """One run; `kind` and `begin` are set by the test."""

    kind: type[Place]
    begin: Callable[[World], World]

    @initialize(steps=st.sampled_from([(), (100,), (100, 200), (100, 200, 300)]))
    def make(self, steps: tuple[int, ...]) -> None:
        self.world = self.begin(World(self.kind()))
        self.owners: list[Owner] = []
        self.tasks: list[Task] = []
        self.path: list[tuple[str, str]] = []
        self.num_names = 0
        self.add_owner(num_ranks=1, keep=9, oldest=False, reuse=True, operations=_ALL)
        for _ in steps:
            self.begin_save(self.owners[0], 0, refused=False, operations=_ALL)
            self.end_save(self.owners[0], in_time=True, operations=_ALL)

    def teardown(self) -> None:
        for task in getattr(self, "tasks", ()):
            task.kill()

    # Trainers.

    @precondition(lambda self: len(self.owners) < _MOST_OWNERS)
    @rule(
        num_ranks=st.sampled_from([1, 2]),
        keep=st.sampled_from([1, 2]),
        oldest=st.booleans(),
        reuse=st.booleans(),
        operations=_FIRST_OPERATIONS,
    )
    def start(self, num_ranks: int, keep: int, oldest: bool, reuse: bool, operations: int) -> None:
        """A trainer starts, and resumes from the newest or from the oldest checkpoint."""
        self.add_owner(num_ranks=num_ranks, keep=keep, oldest=oldest, reuse=reuse, operations=operations)

    @precondition(lambda self: any(owner.may_save for owner in self.owners))
    @rule(
        which=_WHICH, step=_STEPS, refused=st.sampled_from([False, False, True]), operations=_FIRST_OPERATIONS
    )
    def save(self, which: int, step: int, refused: bool, operations: int) -> None:
        """A trainer stages a save; its writers begin. Perhaps the last rank cannot stage."""
        owner = one_of([owner for owner in self.owners if owner.may_save], which)
        self.begin_save(owner, step, refused=refused, operations=operations)

    @precondition(lambda self: any(owner.may_conclude for owner in self.owners))
    @rule(which=_WHICH, in_time=st.sampled_from([True, True, False]), operations=_FIRST_OPERATIONS)
    def conclude(self, which: int, in_time: bool, operations: int) -> None:
        """Rank 0 decides: when all have reported, or at the deadline."""
        owner = one_of([owner for owner in self.owners if owner.may_conclude], which)
        self.end_save(owner, in_time=in_time, operations=operations)

    @precondition(lambda self: any(owner.may_save for owner in self.owners))
    @rule(which=_WHICH, operations=_FIRST_OPERATIONS)
    def close(self, which: int, operations: int) -> None:
        """A trainer ends as it should."""
        owner = one_of([owner for owner in self.owners if owner.may_save], which)
        owner.has_started = False
        owner.main = self.go(f"{owner.trainer.name} close", owner.trainer.close, operations)

    @precondition(lambda self: any(not owner.trainer.process.is_dead for owner in self.owners))
    @rule(which=_WHICH, with_writers=st.booleans())
    def kill(self, which: int, with_writers: bool) -> None:
        """A trainer dies; its writers die with it or go on."""
        owner = one_of([owner for owner in self.owners if not owner.trainer.process.is_dead], which)
        owner.trainer.die(with_writers=with_writers)
        for task in [owner.main, *(owner.writing.values() if with_writers else ())]:
            if task is not None:
                task.kill()

    @precondition(lambda self: any(process.leases for process in self.processes()))
    @rule(which=_WHICH, lives=st.booleans())
    def lease(self, which: int, lives: bool) -> None:
        """A stopped process is taken for dead, or shows that it lives."""
        process = one_of([process for process in self.processes() if process.leases], which)
        process.beat() if lives and not process.is_dead else process.expire()

    # Commands.

    @precondition(lambda self: self.num_names < _MOST_NAMES)
    @rule(
        keep=st.sampled_from([1, 2]), force=st.sampled_from([True, True, False]), operations=_FIRST_OPERATIONS
    )
    def prune(self, keep: int, force: bool, operations: int) -> None:
        name = self.name("prune")
        self.go(name, lambda: self.world.command_prune(name, LatestN(keep), force=force), operations)

    @precondition(lambda self: self.num_names < _MOST_NAMES)
    @rule(force=st.sampled_from([True, True, False]), operations=_FIRST_OPERATIONS)
    def recover(self, force: bool, operations: int) -> None:
        name = self.name("recover")
        self.go(name, lambda: self.world.command_recover(name, force=force), operations)

    @precondition(lambda self: self.num_names < _MOST_NAMES)
    @rule(step=_STEPS, operations=_FIRST_OPERATIONS)
    def pin(self, step: int, operations: int) -> None:
        name = self.name("pin")
        self.go(name, lambda: self.world.command_pin(name, step), operations)

    @precondition(lambda self: self.world.ledger.pinned)
    @rule(which=_WHICH, operations=_FIRST_OPERATIONS)
    def unpin(self, which: int, operations: int) -> None:
        name, attempt = self.name("unpin"), one_of(sorted(self.world.ledger.pinned), which)
        self.go(name, lambda: self.world.command_unpin(name, attempt.order[1]), operations)

    # The rest of the world.

    @precondition(lambda self: any(not task.is_done for task in self.tasks))
    @rule(which=_WHICH, operations=_OPERATIONS)
    def go_on(self, which: int, operations: int) -> None:
        """Something that is under way, or was stopped long ago, comes a little further."""
        self.run(one_of([task for task in self.tasks if not task.is_done], which), operations)

    @precondition(lambda self: len(self.good()) > 2)
    @rule(which=_WHICH)
    def damage(self, which: int) -> None:
        """The disk damages one of several good checkpoints."""
        self.world.damage(one_of(self.good(), which))

    @precondition(lambda self: self.world.visible() and len(self.world.ledger.foreign) < 2)
    @rule(which=_WHICH)
    def leave_a_note(self, which: int) -> None:
        """Somebody puts a file of theirs beside ours."""
        attempt = one_of(sorted(self.world.visible()), which)
        self.world.leave_foreign_file(attempt.directory, f"{self.name('note')}.txt")

    @invariant()
    def promises_are_kept(self) -> None:
        if hasattr(self, "world"):
            require_kept(self.world, self.path)

    # What rules are made of.

    def add_owner(self, *, num_ranks: int, keep: int, oldest: bool, reuse: bool, operations: int) -> None:
        name = self.name("trainer")
        owner = Owner(Trainer(self.world, name, num_ranks=num_ranks, keep=LatestN(keep), reuse=reuse))

        def run() -> None:
            owner.trainer.start()
            entries = owner.trainer.catalogue.entries
            owner.trainer.load(entries[0].step if oldest and entries and not entries[0].is_bad else "latest")
            owner.has_started = True

        self.owners.append(owner)
        owner.main = self.go(f"{owner.trainer.name} start", run, operations)

    def begin_save(self, owner: Owner, step: int, *, refused: bool, operations: int) -> None:
        trainer = owner.trainer
        # Half of the steps drawn would be refused: then it is the next one.
        step = max(step, trainer.steps.floor // 100 * 100 + 100)
        try:
            save = owner.saving = trainer.begin(step)
        except CheckpointError:
            return
        owner.writing = {}
        for rank in range(trainer.num_ranks):
            if refused and rank == trainer.num_ranks - 1:
                trainer.fail(save, rank)
            elif not trainer.writers[rank].is_dead:
                owner.writing[rank] = self.go(
                    f"{trainer.name} writer {rank} {save.attempt}",
                    lambda rank=rank: trainer.write(save, rank),  # type: ignore[misc]
                    operations,
                )

    def end_save(self, owner: Owner, *, in_time: bool, operations: int) -> None:
        trainer, save = owner.trainer, owner.saving
        assert save is not None
        if in_time:
            for task in owner.writing.values():
                self.run(task, _ALL)
        elif 0 in owner.writing and not owner.writing[0].is_done:
            # Its own trainer ends a writer at the deadline.
            owner.writing[0].kill()
            trainer.fail(save, 0)
        owner.saving = None
        name = f"{trainer.name} commit {save.attempt}"
        owner.main = self.go(name, lambda: trainer.conclude(save), operations)

    def go(self, name: str, act: Callable[[], object], operations: int) -> Task:
        task = Task(name, act)
        self.tasks.append(task)
        self.run(task, operations)
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

    def good(self) -> list[Attempt]:
        return sorted(self.world.visible().keys() - damaged_in(self.world.place, self.world.ledger))

    def name(self, kind: str) -> str:
        self.num_names += 1
        return f"{kind}-{self.num_names}"


def one_of(items: list[_Item], which: int) -> _Item:
    return items[which % len(items)]


def machine(kind: type[Place], begin: Callable[[World], World]) -> type[History]:
    return type(f"{kind.__name__}History", (History,), {"kind": kind, "begin": staticmethod(begin)})


@pytest.mark.parametrize("kind", [FilePlace, ObjectPlace])
@pytest.mark.parametrize(
    "num_histories", [20, pytest.param(500, marks=[pytest.mark.crash, pytest.mark.timeout(900)])]
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
