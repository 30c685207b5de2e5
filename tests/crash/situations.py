"""What stands and what is cut short: the operations that crash tests stop at every moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.names import EPOCHS, RUN_JSON
from dcp_ckpt.lifecycle.recover import recover_run
from dcp_ckpt.lifecycle.runs import RunDocument
from dcp_ckpt.policies import LatestN
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.testing.tiny import TINY_RUN_ID
from tests.crash.owner import Owner, Tell

__all__ = ["SITUATIONS", "Situation"]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One operation of a run.

    Args:
        prepare: makes the run; returns the owner that acts, if that is one who was there before.
        act: what is cut short. Returns the owner that lives on when it is not.
    """

    prepare: Callable[[Storage, Tell], Owner | None]
    act: Callable[[Storage, Owner | None, Tell], Owner | None]


def _name_run(storage: Storage) -> None:
    """Its `run.json`, without the looks at git and packages that `ensure_run` takes."""
    document = RunDocument(
        run_id=TINY_RUN_ID,
        number=0,
        name=None,
        created_at="2026-01-01T00:00:00.000000Z",
        config={},
        parent=None,
        host="here",
        git=None,
        versions={},
    )
    storage.make_directory(EPOCHS)
    storage.create_exclusive(RUN_JSON, encode_json(document))


def _two_steps(storage: Storage, tell: Tell) -> Owner:
    _name_run(storage)
    owner = Owner(storage, keep=LatestN(2), tell=tell)
    for step in (1, 2):
        assert owner.save(step) == "committed"
    return owner


def _save(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    """With its removal of step 1."""
    assert owner is not None
    owner.save(3)
    return owner


def _save_after_failure(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    assert owner is not None
    owner.save(3, broken_rank=1)
    owner.save(3)
    return owner


def _five_steps(storage: Storage, tell: Tell) -> Owner:
    _name_run(storage)
    with Owner(storage, tell=tell) as owner:
        for step in range(1, 6):
            assert owner.save(step) == "committed"
        owner.mark(3, "bad")
    return Owner(storage, keep=LatestN(1), tell=tell)


def _retention(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    """Keeps the newest, the bad and the pinned one."""
    assert owner is not None
    owner.mark(2, "pin")
    owner.prune()
    return owner


def _crashed(storage: Storage, tell: Tell) -> None:
    """Step 1 is taken back and not deleted, 2 committed, 3 complete without a manifest, 4 incomplete."""
    _name_run(storage)
    with ExitStack() as at_end:
        owner = Owner(storage, keep=LatestN(1), tell=tell)
        at_end.callback(owner.die)
        owner.save(1)
    with ExitStack() as at_end:
        owner = Owner(storage, tell=tell)
        at_end.callback(owner.die)
        owner.save(2)
    with ExitStack() as at_end:
        owner = Owner(storage, keep=LatestN(1), tell=tell)
        at_end.callback(owner.die)
        owner.take_back()
        owner.write(3)
        owner.write(4, num_ranks=1)
        storage.put("epochs/.00000003.resumed.json.0123456789abcdef.tmp", b"x")


def _start(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    return Owner(storage, keep=LatestN(2), tell=tell)


def _recover(storage: Storage, owner: Owner | None, tell: Tell) -> None:
    recover_run(storage, force=True, wait_seconds=0.0)


def _two_sharing_steps(storage: Storage, tell: Tell) -> Owner:
    """Step 2 shares a file with step 1, which is gone."""
    _name_run(storage)
    owner = Owner(storage, keep=LatestN(1), reuse=True, tell=tell)
    for step in (1, 2):
        assert owner.save(step) == "committed"
    assert bool(owner.shared_bytes) == storage.capabilities.links
    return owner


def _sharing_saves(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    """Each removes the step that it shares a file with; one fails in between."""
    assert owner is not None
    owner.save(3)
    owner.save(4, broken_rank=0)
    owner.save(4)
    return owner


def _crashed_while_sharing(storage: Storage, tell: Tell) -> None:
    """Step 1 is gone, 2 committed, 3 complete without a manifest; it shares a file with both. 4 is not."""
    with ExitStack() as at_end:
        owner = _two_sharing_steps(storage, tell)
        at_end.callback(owner.die)
        owner.write(3)
        owner.write(4, num_ranks=1)


def _sharing_start(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    """Completes step 3, and saves another one that shares its file."""
    owner = Owner(storage, keep=LatestN(1), reuse=True, tell=tell)
    try:
        owner.save_next()
    except BaseException:
        owner.die()
        raise
    return owner


def _first_save(storage: Storage, owner: Owner | None, tell: Tell) -> Owner:
    owner = Owner(storage, tell=tell)
    try:
        owner.save(1)
    except BaseException:
        owner.die()
        raise
    return owner


SITUATIONS = {
    "save": Situation(prepare=_two_steps, act=_save),
    "save-after-failure": Situation(prepare=_two_steps, act=_save_after_failure),
    "retention": Situation(prepare=_five_steps, act=_retention),
    "start": Situation(prepare=_crashed, act=_start),
    "recover": Situation(prepare=_crashed, act=_recover),
    "sharing-saves": Situation(prepare=_two_sharing_steps, act=_sharing_saves),
    "sharing-start": Situation(prepare=_crashed_while_sharing, act=_sharing_start),
    "first-save": Situation(prepare=lambda storage, tell: None, act=_first_save),
}
