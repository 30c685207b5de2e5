"""A run of the model, the processes in it, and what a person does to it from the command line or by accident.

Owns the ledger of what everybody was told, for the promises to be checked against. Must not know trainers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import decode_fragment
from dcp_ckpt.format.names import (
    EPOCHS,
    RUN_JSON,
    AttemptId,
    StepDir,
    fragment_name,
    parse_data_file_name,
    parse_epoch_name,
)
from dcp_ckpt.lifecycle import janitor, prune, sweep
from dcp_ckpt.lifecycle import retract as lifecycle_retract
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.pins import pin, unpin
from dcp_ckpt.lifecycle.recover import recover_run
from dcp_ckpt.lifecycle.runs import RunDocument
from dcp_ckpt.policies import KeepPolicy
from dcp_ckpt.save import coordinator
from dcp_ckpt.testing.tiny import TINY_RUN_ID
from tests.model.places import Place
from tests.model.promises import Attempt, Ledger, attempt_in, visible_in
from tests.model.stepping import Process, SteppedStorage

__all__ = ["World", "follow_removals"]

_RUN = encode_json(
    RunDocument(
        run_id=TINY_RUN_ID,
        number=1,
        name=None,
        created_at="2026-01-01T00:00:00.000000Z",
        config={},
        parent=None,
        host="model",
        git=None,
        versions={},
    )
)


class World:
    """Everything of one history.

    Args:
        place: where the run is; empty.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        if RUN_JSON not in place.objects:
            place.put(RUN_JSON, _RUN)
        self.ledger = Ledger()
        self.processes: dict[str, Process] = {}

    def process(self, name: str) -> Process:
        assert name not in self.processes
        self.processes[name] = Process(self.place, name, is_settled=_is_settled, is_watched=_is_watched)
        return self.processes[name]

    def visible(self) -> dict[Attempt, bytes]:
        """All checkpoints that a reader finds now, with their manifests."""
        return visible_in(self.place)

    def command_recover(self, name: str, *, force: bool = False) -> object:
        """`dcp-ckpt recover`."""
        return recover_run(self.process(name).storage, force=force, wait_seconds=0.0)

    def command_prune(self, name: str, keep: KeepPolicy, *, force: bool = False) -> object:
        """`dcp-ckpt prune`."""
        return prune.prune_run(self.process(name).storage, keep, grace_seconds=0.0, force=force)

    def command_pin(self, name: str, step: int) -> bool:
        """`dcp-ckpt pin`."""
        storage = self.process(name).storage
        entry = read_catalogue(storage).at_step(step)
        if entry is None:
            return False
        pin(storage, entry)
        self.ledger.pinned.add(attempt_in(entry))
        return True

    def command_unpin(self, name: str, step: int) -> None:
        """`dcp-ckpt unpin`."""
        storage = self.process(name).storage
        entry = read_catalogue(storage).at_step(step)
        if entry is not None:
            self.ledger.pinned.discard(attempt_in(entry))
            unpin(storage, entry)

    def leave_foreign_file(self, directory: str, name: str) -> None:
        """Somebody puts a note where we keep our files."""
        self.ledger.foreign[name] = name.encode()
        self.place.put(f"{directory}/{name}", name.encode())

    def damage(self, attempt: Attempt) -> None:
        """The disk loses a byte of a data file, whatever names it has."""
        objects = self.place.objects
        key = min(key for key, data in objects.items() if key.startswith(f"{attempt.directory}/__") and data)
        rotten = objects[key]
        # No two attempts write equal bytes.
        for name in [name for name, data in objects.items() if data == rotten]:
            objects[name] = bytes([rotten[0] ^ 1]) + rotten[1:]
        self.ledger.damaged.add(attempt)
        self.ledger.rotten.add(self._writer_of(key))

    def _writer_of(self, key: str) -> str:
        """The attempt that wrote a data file, whatever names it has got since."""
        directory, _, name = key.rpartition("/")
        parsed = parse_data_file_name(name)
        assert parsed is not None
        rank, index, attempt = parsed
        fragment = f"{directory}/{fragment_name(rank, attempt)}"
        origin = decode_fragment(self.place.objects[fragment], path=fragment).files[index].origin
        return str(attempt) if origin is None else origin.attempt


def follow_removals(patch: pytest.MonkeyPatch, world: Callable[[], World]) -> None:
    """Write into the ledger what owners take back, and what they are in the middle of taking back."""

    def uncommit(storage: SteppedStorage, directory: StepDir, *, epoch: int) -> bool:
        ledger, name = world().ledger, storage.process.name
        # One that is away right now may be put back before it is looked at.
        there = {attempt for attempt in ledger.committed if attempt.directory == str(directory)}
        there |= {attempt for attempt in world().visible() if attempt.directory == str(directory)}
        if there:
            ledger.removing[name] = max(there)
        try:
            removed = sweep.uncommit(storage, directory, epoch=epoch)
        except CheckpointError:
            attempt = ledger.removing.get(name)
            if attempt is not None and attempt in world().visible():
                ledger.put_back.add(ledger.removing.pop(name))
            raise
        # Not reached by who died in it, or was fenced and could not put it back.
        attempt = ledger.removing.pop(name, None)
        if removed and attempt is not None:
            ledger.removed.add(attempt)
        return removed

    def retract(
        storage: SteppedStorage, directory: StepDir, attempt: AttemptId, *, epoch: int, all_done: bool
    ) -> bool:
        ledger, name = world().ledger, storage.process.name
        ledger.retracting[name] = Attempt((attempt.epoch, directory.step), str(directory), str(attempt))
        done = lifecycle_retract.retract(storage, directory, attempt, epoch=epoch, all_done=all_done)
        del ledger.retracting[name]
        return done

    patch.setattr(janitor, "uncommit", uncommit)
    patch.setattr(prune, "uncommit", uncommit)
    patch.setattr(coordinator, "retract", retract)


def _is_settled(key: str) -> bool:
    """Nobody deletes or changes the run's identity and the claims."""
    directory, _, name = key.rpartition("/")
    return key == RUN_JSON or (directory == EPOCHS and parse_epoch_name(name) is not None)


def _is_watched(key: str) -> bool:
    """What stands in step directories moves with them, and is swept."""
    return StepDir.parse(key.partition("/")[0]) is not None
