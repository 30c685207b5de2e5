"""Every order in which the operations of a few tasks can fall, and a crash of everything at every moment.

A history is a list of choices. Each is run from the beginning, since threads cannot be copied; what is
reached twice (equal storage, equal pasts of all tasks) is gone on with once. Finds violations surely, in a
small scope.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.model.promises import broken_at_the_end, broken_now, damaged_in
from tests.model.stepping import Task, touches
from tests.model.trainers import Trainer
from tests.model.world import World

__all__ = ["Explored", "Scene", "Violation", "explore", "require_kept", "start_again"]


class Violation(AssertionError):
    """A promise is broken; the message is the history."""


@dataclass(frozen=True)
class Scene:
    """The beginning of a history: a world, and what is about to happen in it, by name."""

    world: World
    acts: dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Explored:
    """How far an exploration came; `is_complete`: there is nothing else that can happen."""

    num_states: int
    num_histories: int
    is_complete: bool


def explore(begin: Callable[[], Scene], *, most_states: int) -> Explored:
    """Go through all histories, or as many as lead to so many states: drawn with a fixed seed.

    Raises:
        Violation: a promise is broken; the message is the history.
    """
    search = _Search(begin)
    while search.ahead and len(search.seen) < most_states:
        search.go_on()
    return Explored(
        num_states=len(search.seen), num_histories=search.num_histories, is_complete=not search.ahead
    )


class _Search:
    """Depth first, with sleep sets: two operations that do not touch each other are swapped once."""

    def __init__(self, begin: Callable[[], Scene]) -> None:
        self._begin = begin
        self._checked: set[int] = set()
        self._random = random.Random(0)
        self.num_histories = 0
        # State -> tasks that need not be gone on with from there: other histories do.
        self.seen: dict[int, frozenset[int]] = {}
        # Beginnings of histories, and the tasks that sleep at their ends.
        self.ahead: list[tuple[list[int], frozenset[int]]] = [([], frozenset())]

    def go_on(self) -> None:
        """Run one history until it meets nothing new."""
        self.num_histories += 1
        drawn = self._random.randrange(len(self.ahead))
        self.ahead[drawn], self.ahead[-1] = self.ahead[-1], self.ahead[drawn]
        choices, asleep = self.ahead.pop()
        scene = self._begin()
        tasks = [Task(name, act) for name, act in scene.acts.items()]
        path: list[tuple[str, str]] = []

        def step(number: int) -> None:
            path.append((tasks[number].name, tasks[number].pending))
            tasks[number].step()

        try:
            for number in choices:
                step(number)
            while ready := self._ready(scene, tasks, asleep, path):
                for later in ready[:0:-1]:
                    done = asleep | set(ready[: ready.index(later)])
                    self.ahead.append(([*choices, later], _still_asleep(tasks, done, later)))
                asleep = _still_asleep(tasks, asleep, ready[0])
                choices = [*choices, ready[0]]
                step(ready[0])
        finally:
            for task in tasks:
                task.kill()

    def _ready(
        self, scene: Scene, tasks: Sequence[Task], asleep: frozenset[int], path: Sequence[tuple[str, str]]
    ) -> list[int]:
        """Check this state if it is new; the tasks to go on with from here."""
        place = hash(scene.world.place.fingerprint())
        state = hash((place, *(task.key for task in tasks)))
        runnable = frozenset(number for number, task in enumerate(tasks) if not task.is_done)
        if state in self.seen:
            ready = self.seen[state] - asleep
            self.seen[state] &= asleep
            return sorted(ready & runnable)
        self.seen[state] = asleep
        _require_no_surprise(tasks, path)
        key = hash((place, scene.world.ledger.key()))
        if key not in self._checked:
            self._checked.add(key)
            require_kept(scene.world, path)
        return sorted(runnable - asleep)


def _still_asleep(tasks: Sequence[Task], asleep: Iterable[int], number: int) -> frozenset[int]:
    """Those of the sleeping tasks that a step of another one does not wake."""
    return frozenset(
        other
        for other in asleep
        if other != number and not touches(tasks[other].pending, tasks[number].pending)
    )


def _require_no_surprise(tasks: Sequence[Task], path: Sequence[tuple[str, str]]) -> None:
    for task in tasks:
        if isinstance(task.result, BaseException):
            raise Violation(_story(path, [f"{task.name} ended with {task.result!r}"])) from task.result


def require_kept(world: World, path: Sequence[tuple[str, str]]) -> None:
    """Every promise holds now, and would hold should everything die now."""
    broken = list(broken_now(world.place, world.ledger)) or list(start_again(world))
    if broken:
        raise Violation(_story(path, broken))


def start_again(world: World) -> Iterator[str]:
    """What is broken when all die now and one more start is made; the world itself stays as it is."""
    after = World(world.place.copy())
    after.ledger = world.ledger.copy()
    trainer = Trainer(after, "the last start")
    try:
        trainer.start()
        if after.visible().keys() - damaged_in(after.place, world.ledger):
            trainer.load()
    except Exception as error:
        yield f"the last start fails: {error!r}"
        return
    yield from broken_now(after.place, world.ledger)
    yield from broken_at_the_end(after.place, world.ledger)


def _story(path: Sequence[tuple[str, str]], broken: Sequence[str]) -> str:
    lines: list[str] = []
    last = ""
    for name, operation in path:
        if name != last:
            lines.append(f"{name}:")
        lines.append(f"    {operation}")
        last = name
    return "\n".join(["", *broken, "after:", *lines])
