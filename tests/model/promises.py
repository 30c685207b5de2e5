"""The promises of a run, checked against what is stored and what its processes were told.

`broken_now` looks at any moment; `broken_at_the_end` after one last start, all others being dead.
Both say in words what is wrong, or nothing. Must not know how the state came about.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dcp_ckpt.errors import LoadError
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.fragment import decode_fragment
from dcp_ckpt.format.manifest import FragmentRef, Manifest, decode_manifest
from dcp_ckpt.format.names import (
    DCP_METADATA,
    EPOCHS,
    MANIFEST,
    MARKS,
    RUN_JSON,
    TRASH,
    StepDir,
    data_file_name,
    fragment_name,
    parse_epoch_name,
)
from dcp_ckpt.lifecycle.catalogue import CheckpointEntry
from tests.model.places import Place

__all__ = [
    "Attempt",
    "Ledger",
    "attempt_in",
    "attempt_of",
    "broken_at_the_end",
    "broken_now",
    "damaged_in",
    "problem_of",
    "visible_in",
]


@dataclass(frozen=True, order=True)
class Attempt:
    """One attempt in its place; `order` is that of checkpoints."""

    order: tuple[int, int]
    directory: str
    attempt: str


@dataclass
class Ledger:
    """What processes were told, and what they are about to do. Promises are about these.

    Args:
        committed, failed: verdicts.
        removed: taken back by an owner whose look afterwards agreed.
        removing: by name of the process: what it is taking back now, or was when it died.
        put_back: taken away, and put back by an owner that found itself fenced.
        retracting: by name of the process: the failed attempt that it is clearing away.
        damaged: by the model.
        rotten: the attempts that wrote the files which the model damaged: what shares these is damaged, too.
        pinned: the pin was confirmed and not taken back.
        resumed: by epoch of a trainer: what it resumed from, None before.
        claimed: epochs that trainers hold or held.
        foreign: files of somebody else, by name.
    """

    committed: set[Attempt] = field(default_factory=set)
    failed: set[Attempt] = field(default_factory=set)
    removed: set[Attempt] = field(default_factory=set)
    put_back: set[Attempt] = field(default_factory=set)
    removing: dict[str, Attempt] = field(default_factory=dict)
    retracting: dict[str, Attempt] = field(default_factory=dict)
    damaged: set[Attempt] = field(default_factory=set)
    rotten: set[str] = field(default_factory=set)
    pinned: set[Attempt] = field(default_factory=set)
    resumed: dict[int, Attempt | None] = field(default_factory=dict)
    claimed: set[int] = field(default_factory=set)
    foreign: dict[str, bytes] = field(default_factory=dict)

    def key(self) -> Hashable:
        """Equal for equal ledgers."""
        told = (self.committed, self.failed, self.removed, self.damaged, self.pinned, self.put_back)
        maps: tuple[Mapping[Any, Any], ...] = (self.removing, self.retracting, self.resumed, self.foreign)
        return (
            tuple(map(frozenset, told)),
            frozenset(self.claimed),
            frozenset(self.rotten),
            tuple(frozenset(items.items()) for items in maps),
        )

    def copy(self) -> Ledger:
        return Ledger(**{name: copy.copy(value) for name, value in vars(self).items()})


def attempt_of(directory: str, manifest: bytes) -> Attempt:
    decoded = decode_manifest(manifest, path=directory)
    return Attempt(decoded.order, directory, decoded.attempt)


def attempt_in(entry: CheckpointEntry) -> Attempt:
    return Attempt(entry.manifest.order, str(entry.directory), entry.manifest.attempt)


def visible_in(place: Place) -> dict[Attempt, bytes]:
    """All checkpoints that a reader finds, with their manifests."""
    found = {}
    for key, data in place.objects.items():
        directory, _, name = key.rpartition("/")
        if name != MANIFEST or StepDir.parse(directory) is None or is_tombstone(data, path=key):
            continue
        found[attempt_of(directory, data)] = data
    return found


def damaged_in(place: Place, ledger: Ledger) -> set[Attempt]:
    """All visible checkpoints that the model damaged, or that share a file which it damaged."""
    found = set(ledger.damaged)
    for attempt, data in visible_in(place).items():
        manifest = decode_manifest(data, path=attempt.directory)
        for rank in range(manifest.world_size) if ledger.rotten else ():
            key = f"{attempt.directory}/{fragment_name(rank, manifest.attempt_id)}"
            files = decode_fragment(place.objects[key], path=key).files if key in place.objects else []
            writers = [file.origin.attempt if file.origin else attempt.attempt for file in files]
            if not ledger.rotten.isdisjoint(writers):
                found.add(attempt)
    return found


def problem_of(manifest: Manifest, files: Mapping[str, bytes]) -> str | None:
    """Why a checkpoint is not whole, or not of one attempt; None when it is.

    Args:
        files: those of its directory, by name.
    """
    for rank, ref in enumerate(manifest.fragments):
        name = fragment_name(rank, manifest.attempt_id)
        if name not in files:
            return f"{name} is missing"
        problem = _fragment_problem(manifest, rank, ref, files[name], files)
        if problem:
            return problem
    return None


def broken_now(place: Place, ledger: Ledger) -> Iterator[str]:
    """What must not be at any moment, whoever is in the middle of whatever."""
    visible = visible_in(place)
    # The windows of docs/format.md, sections 8 and 10: a newer owner comes between two looks.
    excused = damaged_in(place, ledger) | set(ledger.retracting.values())
    if not place.capabilities.directories:
        excused |= ledger.put_back - {max(visible, default=None)}
    for attempt, manifest in visible.items():
        problem = _problem_in(place, attempt.directory, manifest)
        if problem and attempt not in excused:
            yield f"{attempt} is visible and not complete: {problem}"
    # Damage of which nobody knows yet is no reason to keep others.
    if ledger.committed and not visible:
        yield "there was a commit, and there is no checkpoint"
    kept = {key.rpartition("/")[2]: data for key, data in place.objects.items()}
    for name, data in ledger.foreign.items():
        if kept.get(name) != data:
            yield f"{name}, which is not ours, was touched"


def broken_at_the_end(place: Place, ledger: Ledger) -> Iterator[str]:
    """What must be when everybody has died, and one start has cleared up after them."""
    visible = visible_in(place).keys()
    excused = ledger.removed | set(ledger.removing.values())
    for attempt in sorted(ledger.committed - excused - visible):
        yield f"{attempt} was committed, nobody removed it, and it is gone"
    for attempt in sorted(ledger.removed & visible - ledger.put_back - set(ledger.removing.values())):
        yield f"{attempt} was removed and is back"
    for attempt in sorted(ledger.failed & visible):
        yield f"{attempt} was reported as failed and is committed"
    for attempt in sorted(ledger.pinned - visible - set(ledger.removing.values())):
        yield f"{attempt} is pinned and gone"
    resumed = ledger.resumed.get(max(ledger.resumed, default=0))
    if resumed is not None and resumed not in visible | set(ledger.removing.values()):
        yield f"{resumed} was resumed from and is gone"
    newest = max((attempt.order for attempt in visible), default=(0, 0))
    for attempt in sorted(ledger.committed):
        if attempt.order > newest:
            yield f"{attempt} was committed, and {newest} is the newest now"
    yield from _debris(place, ledger)
    yield from _gaps(place)


def _debris(place: Place, ledger: Ledger) -> Iterator[str]:
    attempts = {attempt.directory: attempt.attempt for attempt in visible_in(place)}
    for key in sorted([*place.objects, *(f"{name}/" for name in place.empty_directories())]):
        top, _, name = key.partition("/")
        if key == RUN_JSON or top == MARKS or key.rpartition("/")[2] in ledger.foreign:
            continue
        if top == EPOCHS and not name.endswith(".tmp"):
            continue
        if key == f"{TRASH}/":
            continue
        if StepDir.parse(top) is not None:
            if top in attempts and (name in (MANIFEST, DCP_METADATA) or f".{attempts[top]}." in name):
                continue
            if top not in attempts and name == MANIFEST:
                continue
        yield f"{key} is left"


def _gaps(place: Place) -> Iterator[str]:
    names = [key.partition("/")[2] for key in place.objects if key.startswith(f"{EPOCHS}/")]
    epochs = sorted(epoch for name in names if (epoch := parse_epoch_name(name)) is not None)
    if epochs != list(range(1, len(epochs) + 1)):
        yield f"the epochs have a gap: {epochs}"


def _problem_in(place: Place, directory: str, manifest: bytes) -> str | None:
    prefix = f"{directory}/"
    files = {key[len(prefix) :]: data for key, data in place.objects.items() if key.startswith(prefix)}
    return _problem_of_bytes(manifest, tuple(sorted(files.items())))


@cache
def _problem_of_bytes(manifest: bytes, files: tuple[tuple[str, bytes], ...]) -> str | None:
    return problem_of(decode_manifest(manifest, path=""), dict(files))


def _fragment_problem(
    manifest: Manifest, rank: int, ref: FragmentRef, data: bytes, files: Mapping[str, bytes]
) -> str | None:
    try:
        fragment = decode_fragment(data, path="")
    except LoadError as error:
        return str(error)
    if FragmentRef.of(fragment, data) != ref:
        return f"the fragment of rank {rank} is another one"
    if (fragment.attempt, fragment.epoch_id, fragment.step) != (
        manifest.attempt,
        manifest.epoch_id,
        manifest.step,
    ):
        return f"the fragment of rank {rank} is of {fragment.attempt}"
    for index, file in enumerate(fragment.files):
        name = data_file_name(rank, index, manifest.attempt_id)
        if _digests(files.get(name, b"")) != file.block_digests:
            return f"{name} is missing or has other bytes"
    return None


def _digests(data: bytes) -> str:
    return "".join(digest(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES))
