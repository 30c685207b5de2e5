"""The next start after a crash: what it must find of what was told before, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.local import LocalStorage
from tests.crash.owner import Fact, Owner
from tests.crash.run_files import committed_manifests, debris, require_all_verify

__all__ = ["on_disk", "require_next_start"]

Checkpoint = tuple[str, str]


def on_disk(storage: Storage, copy: Path) -> Path:
    """Where the files of a storage are: its own directory, or a copy of what is in memory."""
    if isinstance(storage, LocalStorage):
        return Path(storage.url)
    target = LocalStorage(copy)
    for info in storage.list(""):
        target.put(info.key, storage.read(info.key))
    return copy


def require_next_start(storage: Storage, facts: Sequence[Fact], seen: Path) -> None:
    """Start anew twice: everything told still holds, nothing else is there, and the run goes on.

    Args:
        storage: the run as the crash left it; no faults in it any more.
        seen: a directory for copies of what is not on a disk.
    """
    before = _standing(storage, seen / "before")
    with Owner(storage) as owner:
        _require_claimed(facts, owner)
        after = _standing(storage, seen / "after")
        _require_told(facts, before, after)
        _require_pins(facts, storage)
        _require_no_debris(storage, seen / "recovered")
        step = owner.resumed + 1
        assert owner.save(step) == "committed"
        again = _standing(storage, seen / "again")
        (new,) = again - after
        assert after < again
        assert new[0] in _places(storage, after, step, owner.claim.epoch)
    with Owner(storage) as owner:
        assert owner.resumed == step
        report = owner.report
        assert (report.committed, report.debris, report.removed) == ([], [], [])
        _require_no_debris(storage, seen / "end")


def _standing(storage: Storage, copy: Path) -> set[Checkpoint]:
    """Every committed checkpoint, each whole to the last byte."""
    root = on_disk(storage, copy)
    require_all_verify(root)
    return {(directory, manifest.attempt) for directory, manifest in committed_manifests(root).items()}


def _require_no_debris(storage: Storage, copy: Path) -> None:
    assert debris(on_disk(storage, copy)) == []


def _places(storage: Storage, standing: set[Checkpoint], step: int, epoch: int) -> set[str]:
    """Where a step may be saved: under its plain name, or that of the epoch where it is taken."""
    plain, own = str(StepDir(step)), str(StepDir(step, epoch))
    if any(directory == plain for directory, _ in standing):
        return {own}
    # Where there are no directories, a tombstone may have the plain name for good.
    return {plain} if storage.capabilities.directories else {plain, own}


def _require_claimed(facts: Sequence[Fact], owner: Owner) -> None:
    claims = [fact for fact in facts if fact.kind == "claimed"]
    assert all(claim.run_id == owner.claim.run_id for claim in claims), "it is another run now"
    assert all(claim.epoch < owner.claim.epoch for claim in claims), "a number came twice"


def _require_pins(facts: Sequence[Fact], storage: Storage) -> None:
    entries = read_catalogue(storage).entries
    pinned = {(str(entry.directory), entry.manifest.attempt) for entry in entries if entry.is_pinned}
    assert _told(facts, "pinned") <= pinned, "a pinned checkpoint, or its pin, is gone"


def _require_told(facts: Sequence[Fact], before: set[Checkpoint], after: set[Checkpoint]) -> None:
    """Compare what was told with what stands before and after the recovery."""
    committed, let_go = _told(facts, "committed"), _told(facts, "letting_go")
    decided = committed | _told(facts, "failed") | _told(facts, "unknown")
    assert committed - let_go <= before, "what was told to be committed is gone"
    assert _told(facts, "written") - decided <= after, "what was durable on all ranks was not committed"
    gone = _told(facts, "removed") | _told(facts, "failed")
    assert not gone & (before | after), "what was told to be removed or to have failed is there"
    assert after <= _told(facts, "begun"), "nobody saved this"
    assert before <= after, "the recovery lost a checkpoint"
    assert not (after - before) & let_go, "what was un-committed came back"
    assert not committed or max(committed, key=_order) not in let_go, "retention removes the newest"


def _told(facts: Sequence[Fact], kind: str) -> set[Checkpoint]:
    return {(fact.directory, fact.attempt) for fact in facts if fact.kind == kind}


def _order(checkpoint: Checkpoint) -> tuple[int, int]:
    directory, attempt = StepDir.parse(checkpoint[0]), AttemptId.parse(checkpoint[1])
    assert directory is not None
    assert attempt is not None
    return attempt.epoch, directory.step
