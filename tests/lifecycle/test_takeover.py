"""An owner that is being replaced: what it commits counts, and it destroys nothing of its successor."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dcp_ckpt import load_checkpoint
from dcp_ckpt.coordination import SoloChannel
from dcp_ckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    Fenced,
    StorageUnsuitable,
)
from dcp_ckpt.format.manifest import Manifest, summarize
from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.commit import publish_manifest, read_fragments
from dcp_ckpt.lifecycle.epochs import claim_epoch, require_newest
from dcp_ckpt.lifecycle.leftovers import sweep_leftovers
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.sweep import delete_files, delete_tree, seal, uncommit
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, to_message
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.base import Lease
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.storage.listed import listed_once
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

DIRECTORY = StepDir(200)
ATTEMPT = AttemptId(1, 2)
BOTH = pytest.mark.parametrize("kind", ["files", "store"])


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Storage]:
    """A run whose epoch 1 has committed step 100."""

    def make(kind: str) -> Storage:
        storage = open_storage(tmp_path if kind == "files" else f"memory://{uuid.uuid4().hex}")
        claim(storage)
        write(storage, 100, 1)
        return storage

    return make


def claim(storage: Storage, *, hold: Callable[[str | None], None] = lambda key: None) -> int:
    run = ensure_run(storage)
    return claim_epoch(
        storage, run_id=run.run_id, world_size=1, purpose="train", hold=hold, wait_seconds=0.0
    ).epoch


def write(storage: Storage, step: int, save: int, *, commit: bool = True) -> Manifest:
    run_id = ensure_run(storage).run_id
    return write_tiny_checkpoint(
        storage, step=step, epoch=1, save=save, ranks=1, run_id=run_id, commit=commit
    )


def conclude(storage: Storage) -> Verdict:
    """What epoch 1 concludes about step 200, which its only rank has written."""
    (info,) = [info for info in storage.list(f"{DIRECTORY}/") if "/rank-" in info.key]
    ((fragment, data),) = read_fragments(storage, DIRECTORY, ATTEMPT, [0], [info.size_bytes])
    channel, keys = SoloChannel(), SaveKeys(2)
    channel.put(keys.report(0), to_message(Report(summary=summarize(fragment, data))))
    coordinator = Coordinator(storage, channel, epoch=1)
    return coordinator.conclude(
        keys, step=200, directory=DIRECTORY, attempt=ATTEMPT, deadline=time.monotonic() + 5.0
    )


@pytest.mark.parametrize("uploaded_before", [False, True])
def test_what_a_live_owner_commits_until_the_claim_stands_is_seen(make, uploaded_before: bool) -> None:
    storage = make("store")
    manifest = write(storage, 200, 2, commit=False) if uploaded_before else None

    def commit_while_the_lease_is_taken(key: str | None) -> None:
        require_newest(storage, 1)
        if manifest is None:
            write(storage, 200, 2)
        else:
            publish_manifest(storage, DIRECTORY, manifest)

    with storage.hold_lease("epochs/00000001.lease"):
        view = listed_once(storage)
        epoch = claim(view, hold=commit_while_the_lease_is_taken)
    catalogue, report = recover_older_epochs(view, epoch=epoch)
    assert report.committed == []
    assert catalogue.latest is not None
    assert catalogue.latest.directory == DIRECTORY


@BOTH
def test_an_owner_that_finds_itself_fenced_deletes_nothing(make, kind: str) -> None:
    storage = make(kind)
    write(storage, 200, 2, commit=False)
    epoch = claim(storage)

    class Recovering(ForwardingStorage):
        """The newer owner recovers at the moment when the older one would clear away."""

        recovered: list[str] | None = None

        def delete(self, keys: Iterable[str]) -> None:
            if self.recovered is None:
                self.recovered = recover_older_epochs(storage, epoch=epoch)[1].committed
            super().delete(keys)

    verdict = conclude(Recovering(storage))
    assert verdict.error is not None
    assert (verdict.outcome, verdict.error["kind"]) == ("unknown", "Fenced")
    recover_older_epochs(storage, epoch=epoch)
    latest = read_catalogue(storage).latest
    assert latest is not None
    assert latest.directory == DIRECTORY
    StoredCheckpoint(storage, DIRECTORY, latest.manifest)


def test_a_publisher_that_finds_the_name_closed_has_failed(make) -> None:
    storage = make("store")
    write(storage, 200, 2, commit=False)

    class Closing(ForwardingStorage):
        def create_exclusive(self, key: str, data: bytes | bytearray | memoryview) -> None:
            if key.endswith("manifest.json"):
                seal(storage, DIRECTORY, epoch=claim(storage))
            super().create_exclusive(key, data)

    verdict = conclude(Closing(storage))
    assert verdict.error is not None
    # Fenced by now: whoever closed the name also decides about the files.
    assert verdict.outcome == "unknown"
    assert verdict.error["kind"] == "SaveFailed"
    assert "removed before it was committed" in verdict.error["message"]


@BOTH
def test_a_removal_that_goes_on_after_the_newer_owner_removed_the_same_brings_nothing_back(
    make, kind
) -> None:
    storage = make(kind)
    newest = write(storage, 200, 2)

    class Overtaken(ForwardingStorage):
        """A newer owner claims and removes the checkpoint at the moment when the older one begins to."""

        epoch: int | None = None

        def delete(self, keys: Iterable[str]) -> None:
            if self.epoch is None:
                self.epoch = claim(storage)
                assert uncommit(storage, StepDir(100), epoch=self.epoch)
                sealed = seal(storage, StepDir(100), epoch=self.epoch)
                assert sealed is not None
                delete_tree(storage, sealed)
            super().delete(keys)

    with pytest.raises(Fenced):
        uncommit(Overtaken(storage), StepDir(100), epoch=1)
    catalogue = read_catalogue(storage)
    assert [entry.manifest for entry in catalogue.entries] == [newest]
    assert all(rejected.state == "removed" for rejected in catalogue.rejected)


@BOTH
def test_who_spares_the_living_spares_also_whom_it_lost_the_race_against(make, kind) -> None:
    storage = make(kind)
    leases: list[Lease] = []

    class Racing(ForwardingStorage):
        """Another start claims the number just before, and lives."""

        def create_exclusive(self, key: str, data: bytes | bytearray | memoryview) -> None:
            if key == "epochs/00000002.json" and not leases:
                claim(storage, hold=lambda key: leases.append(storage.hold_lease(key)))
            super().create_exclusive(key, data)

    with pytest.raises(ConfigError, match=r"epoch\(s\) 2 of this run are still live"):
        claim_epoch(
            Racing(storage),
            run_id=ensure_run(storage).run_id,
            world_size=1,
            purpose="recover",
            hold=lambda key: None,
            wait_seconds=0.0,
            spare_live=True,
        )
    (lease,) = leases
    lease.close()
    assert not [name for name in storage.list_names("epochs/") if name.startswith("00000003")]


def test_a_removed_checkpoint_is_told_as_removed(make) -> None:
    storage = make("store")
    latest = read_catalogue(storage).latest
    assert latest is not None
    assert uncommit(storage, StepDir(100), epoch=1)
    delete_files(storage, StepDir(100), latest.manifest)
    with pytest.raises(CorruptCheckpoint, match="deleted while it was being read"):
        StoredCheckpoint(storage, StepDir(100), latest.manifest)
    with pytest.raises(CheckpointNotFound, match="removed"):
        load_checkpoint(f"{storage.url}/step-00000100", {})


def test_a_store_that_lists_no_uploads_stops_no_start(make) -> None:
    storage = make("store")

    class Denying(ForwardingStorage):
        asked = False

        def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> list[str]:
            self.asked = True
            raise StorageUnsuitable("ListMultipartUploads failed: NotImplemented")

    storage.put("epochs/00000001.lease", b"left behind")
    denying = Denying(storage)
    epoch = claim(denying)
    assert sweep_leftovers(denying, read_catalogue(denying), epoch=epoch) == []
    assert denying.asked
