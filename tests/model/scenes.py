"""Small scenes in which owners of one run meet. Each is a beginning; what follows is in any order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.policies import LatestN
from dcp_ckpt.save.record import Report
from tests.model.explorer import Scene
from tests.model.trainers import Trainer
from tests.model.world import World

__all__ = ["LONG", "QUICK"]

Act = Callable[[], object]


def told(act: Act) -> Act:
    """An act whose errors are told to a person and end nothing but the act."""

    def run() -> object:
        with suppress(CheckpointError):
            return act()
        return None

    return run


def in_turn(*acts: Act) -> Act:
    """One after the other."""

    def run() -> None:
        for act in acts:
            act()

    return run


def trained(world: World, *steps: int, num_ranks: int = 1) -> Trainer:
    """A trainer that has committed these steps and goes on."""
    trainer = Trainer(world, "old", num_ranks=num_ranks, keep=None)
    trainer.start()
    for step in steps:
        assert trainer.save(step).outcome == "committed"
    return trainer


def sharing(world: World, *steps: int, num_ranks: int = 1) -> Trainer:
    """The same, with saves that share files."""
    trainer = Trainer(world, "old", num_ranks=num_ranks, keep=None, reuse=True)
    trainer.start()
    for step in steps:
        assert trainer.save(step).outcome == "committed"
    return trainer


def without_error(report: Report) -> None:
    assert report.error is None, report.error


def start_and_load(trainer: Trainer, which: str | int = "latest") -> Act:
    return in_turn(trainer.start, lambda: trainer.load(which))


def commit_and_start(world: World) -> Scene:
    """An owner commits while the next one takes over."""
    old = trained(world, 100)
    save = old.begin(200)
    old.write(save, 0)
    return Scene(world, {"old": lambda: old.conclude(save), "new": start_and_load(Trainer(world, "new"))})


def first_commit_and_start(world: World) -> Scene:
    """The same where there is nothing yet."""
    old = trained(world)
    save = old.begin(200)
    old.write(save, 0)
    return Scene(world, {"old": lambda: old.conclude(save), "new": start_and_load(Trainer(world, "new"))})


def writer_and_start(world: World) -> Scene:
    """A writer outlives its trainer and finishes while the next owner takes over."""
    old = trained(world, 100, num_ranks=2)
    save = old.begin(200)
    old.write(save, 0)
    old.die(with_writers=False)
    return Scene(world, {"writer": lambda: old.write(save, 1), "new": start_and_load(Trainer(world, "new"))})


def failure_and_start(world: World) -> Scene:
    """An owner takes back what has failed while the next one takes over."""
    old = trained(world, 100, num_ranks=2)
    save = old.begin(200)
    old.write(save, 0)
    old.write(save, 1)
    old.fail(save, 1)
    return Scene(world, {"old": lambda: old.conclude(save), "new": start_and_load(Trainer(world, "new"))})


def failure_and_writer(world: World) -> Scene:
    """A save fails by its deadline while a late writer still finishes it."""
    old = trained(world, 100, num_ranks=2)
    save = old.begin(200)
    old.write(save, 0)
    return Scene(world, {"old": lambda: old.conclude(save), "writer": lambda: old.write(save, 1)})


def removal_and_start(world: World) -> Scene:
    """Retention removes while the next owner takes over."""
    old = trained(world, 100, 200)
    old.keep_only(LatestN(1))
    return Scene(world, {"old": old.janitor.tidy, "new": start_and_load(Trainer(world, "new"))})


def removal_and_start_from_it(world: World) -> Scene:
    """The next owner resumes from the very checkpoint that is being removed."""
    old = trained(world, 100, 200)
    old.keep_only(LatestN(1))
    new = Trainer(world, "new")
    return Scene(world, {"old": old.janitor.tidy, "new": told(start_and_load(new, 100))})


def removal_and_pin(world: World) -> Scene:
    """Somebody pins what retention removes."""
    old = trained(world, 100, 200)
    old.keep_only(LatestN(1))
    return Scene(world, {"old": old.janitor.tidy, "pin": told(lambda: world.command_pin("pin", 100))})


def sharing_and_retention(world: World) -> Scene:
    """An owner commits and removes what a save behind it still shares."""
    old = sharing(world, 100, num_ranks=2)
    old.keep_only(LatestN(1))
    saves = [old.begin(200), old.begin(300)]
    for save, rank in ((saves[0], 0), (saves[0], 1), (saves[1], 0)):
        old.write(save, rank)
    return Scene(
        world,
        {
            "old": in_turn(*(partial(old.conclude, save) for save in saves)),
            "writer": lambda: without_error(old.write(saves[1], 1)),
        },
    )


def sharing_and_removal_by_the_next(world: World) -> Scene:
    """The next owner goes back, and removes the base of what the one before still writes and commits."""
    old = sharing(world, 100, 200, num_ranks=2)
    save = old.begin(300)
    old.write(save, 0)
    new = Trainer(world, "new", keep=LatestN(1), reuse=True)
    return Scene(
        world,
        {
            "old": in_turn(lambda: old.write(save, 1), lambda: old.conclude(save)),
            "new": told(in_turn(start_and_load(new, 100), lambda: new.save(150))),
        },
    )


def sharing_and_start(world: World) -> Scene:
    """A writer outlives its trainer and shares while the next owner recovers, goes on and shares as well."""
    old = sharing(world, 100, num_ranks=2)
    save = old.begin(200)
    old.write(save, 0)
    old.die(with_writers=False)
    new = Trainer(world, "new", num_ranks=2, keep=LatestN(1), reuse=True)
    return Scene(
        world,
        {
            "writer": lambda: old.write(save, 1),
            "new": told(in_turn(start_and_load(new), lambda: new.save(300))),
        },
    )


def two_starts(world: World) -> Scene:
    """Two starts after a crash, at the same moment; an attempt is whole, another is not."""
    old = trained(world, 100)
    for step in (200, 300):
        save = old.begin(step)
        old.write(save, 0)
    old.die(with_writers=True)
    return Scene(
        world,
        {
            "one": told(Trainer(world, "one").start),
            "two": told(Trainer(world, "two").start),
        },
    )


def two_starts_over_debris(world: World) -> Scene:
    """The same where nothing can be committed: both clear away."""
    old = trained(world, 100, num_ranks=2)
    old.write(old.begin(200), 0)
    old.die(with_writers=True)
    return Scene(
        world,
        {
            "one": told(Trainer(world, "one").start),
            "two": told(Trainer(world, "two").start),
        },
    )


def starts_and_saves(world: World) -> Scene:
    """Of two starts at once the later one also saves, at the step that both clear away first."""
    old = trained(world)
    old.writers[0].storage.put("step-00000200/__0_0.e0001-s000001.distcp", b"cut short")
    old.die(with_writers=True)
    two = Trainer(world, "two", keep=None)
    return Scene(
        world,
        {
            "one": told(Trainer(world, "one").start),
            "two": told(in_turn(two.start, lambda: two.save(200))),
        },
    )


def removal_and_save_of_the_same_step(world: World) -> Scene:
    """An owner removes a step while the next one goes back and saves that step again."""
    old = trained(world, 100, 200, 300)
    old.keep_only(LatestN(1))
    old.janitor.protect(StepDir(100), "resumed from")
    new = Trainer(world, "new", num_ranks=2, keep=None)
    return Scene(
        world,
        {
            "old": old.janitor.tidy,
            "new": told(in_turn(start_and_load(new, 100), lambda: new.save(200))),
        },
    )


def prune_and_commit(world: World) -> Scene:
    """A person insists on pruning beside a live owner."""
    old = trained(world, 100, 200)
    save = old.begin(300)
    old.write(save, 0)
    return Scene(
        world,
        {
            "old": lambda: old.conclude(save),
            "prune": told(lambda: world.command_prune("prune", LatestN(1), force=True)),
        },
    )


def recover_and_commit(world: World) -> Scene:
    """A person insists on recovering beside a live owner."""
    old = trained(world, 100)
    save = old.begin(200)
    old.write(save, 0)
    return Scene(
        world,
        {
            "old": lambda: old.conclude(save),
            "recover": told(lambda: world.command_recover("recover", force=True)),
        },
    )


def prune_and_start(world: World) -> Scene:
    """A person prunes, without insisting, while a training starts, which must not be fenced by that."""
    old = trained(world, 100)
    old.die(with_writers=True)
    new = Trainer(world, "new")
    return Scene(
        world,
        {
            "new": in_turn(new.start, lambda: require_newest(new.process.storage, new.claim.epoch)),
            "prune": told(lambda: world.command_prune("prune", LatestN(1))),
        },
    )


def prune_and_prune(world: World) -> Scene:
    """Two persons prune; one pins."""
    old = trained(world, 100, 200, 300)
    old.close()
    return Scene(
        world,
        {
            "one": told(lambda: world.command_prune("one", LatestN(1), force=True)),
            "two": told(lambda: world.command_prune("two", LatestN(2), force=True)),
        },
    )


def three_claims(world: World) -> Scene:
    """Three starts of an empty run at the same moment."""
    names = ("one", "two", "three")
    return Scene(world, {name: Trainer(world, name).take_over for name in names})


QUICK: tuple[Callable[[World], Scene], ...] = (
    commit_and_start,
    first_commit_and_start,
    failure_and_writer,
    removal_and_pin,
    sharing_and_retention,
)

LONG: tuple[Callable[[World], Scene], ...] = (
    removal_and_start,
    failure_and_start,
    writer_and_start,
    removal_and_start_from_it,
    removal_and_save_of_the_same_step,
    sharing_and_removal_by_the_next,
    sharing_and_start,
    two_starts,
    two_starts_over_debris,
    starts_and_saves,
    prune_and_commit,
    recover_and_commit,
    prune_and_start,
    prune_and_prune,
    three_claims,
)
