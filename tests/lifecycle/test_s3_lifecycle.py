"""The life of a run on S3: claims, recovery, removal and zombies, on a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from dcp_ckpt import verify
from dcp_ckpt.errors import CheckpointNotFound, Fenced, SaveFailed
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, data_file_name, fragment_name
from dcp_ckpt.lifecycle.catalogue import Catalogue, read_catalogue
from dcp_ckpt.lifecycle.commit import publish_manifest
from dcp_ckpt.lifecycle.epochs import claim_epoch, require_newest
from dcp_ckpt.lifecycle.pins import pin
from dcp_ckpt.lifecycle.prune import prune_run
from dcp_ckpt.lifecycle.recover import RecoverReport, recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.sweep import delete_files, delete_tree, seal, uncommit
from dcp_ckpt.policies import LatestN
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

MIB = 1 << 20

CLAIM = """\
import sys
from dcp_ckpt.errors import Fenced
from dcp_ckpt.lifecycle.epochs import claim_epoch, require_newest
from dcp_ckpt.storage import open_storage
storage = open_storage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
leases = []

def hold(key):
    while leases:
        leases.pop().close()
    if key is not None:
        leases.append(storage.hold_lease(key))

claim = claim_epoch(
    storage, run_id=sys.argv[2], world_size=1, purpose="train", hold=hold, wait_seconds=0.0
)
print(claim.epoch, flush=True)
sys.stdin.readline()
try:
    require_newest(storage, claim.epoch)
    print("owner", flush=True)
except Fenced:
    print("fenced", flush=True)
hold(None)
storage.close()
"""


@dataclass(frozen=True)
class Owner:
    """One start of the run, with a storage of its own."""

    storage: Storage
    epoch: int
    run_id: str

    def save(self, step: int, *, commit: bool = True) -> Manifest:
        return write_tiny_checkpoint(
            self.storage, step=step, epoch=self.epoch, save=step, run_id=self.run_id, commit=commit
        )

    def recover(self) -> tuple[Catalogue, RecoverReport]:
        return recover_older_epochs(self.storage, epoch=self.epoch)


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


@pytest.fixture
def opened(s3_prefix: str, proxy: FaultProxy) -> Iterator[Callable[[], Storage]]:
    with ExitStack() as stack:

        def open_it() -> Storage:
            storage = open_storage(s3_prefix)
            stack.callback(storage.close)
            return storage

        yield open_it


@pytest.fixture
def start(opened: Callable[[], Storage]) -> Callable[[], Owner]:
    """Starts the run once more, and leaves the starts before as zombies. No lease is held."""

    def start_it() -> Owner:
        storage = opened()
        run_id = ensure_run(storage).run_id
        claim = claim_epoch(
            storage, run_id=run_id, world_size=1, purpose="train", hold=lambda key: None, wait_seconds=0.0
        )
        return Owner(storage, claim.epoch, run_id)

    return start_it


def steps(catalogue: Catalogue) -> list[int]:
    return [entry.step for entry in catalogue.entries]


def keys(storage: Storage, prefix: str) -> list[str]:
    return [info.key for info in storage.list(prefix)]


def fragment_of(rank: int, step: int, epoch: int = 1) -> str:
    return f"{StepDir(step)}/{fragment_name(rank, AttemptId(epoch, step))}"


def test_what_the_last_start_finished_is_committed_and_the_rest_is_closed(start, opened):
    first = start()
    first.save(1)
    first.save(2, commit=False)
    incomplete = first.save(3, commit=False)
    first.storage.delete([fragment_of(1, 3)])

    catalogue, report = start().recover()
    assert report.committed == ["step-00000002"]
    assert [reason for reason in report.debris if "step-00000003" in reason]
    assert steps(catalogue) == [1, 2]
    assert [checked.step for checked in verify(opened().url).checkpoints] == [1, 2]
    # The name is closed by a tombstone, and nothing else is left below it.
    assert keys(first.storage, "step-00000003/") == [f"step-00000003/{MANIFEST}"]

    # The zombie wakes up, and finishes what it had begun.
    first.storage.create_exclusive(fragment_of(1, 3), b"late")
    with pytest.raises(SaveFailed, match="removed"):
        publish_manifest(first.storage, StepDir(3), incomplete)
    with pytest.raises(Fenced):
        require_newest(first.storage, first.epoch)
    catalogue, report = start().recover()
    assert steps(catalogue) == [1, 2]
    assert fragment_of(1, 3) in report.removed, "what came late goes at the next start"
    assert keys(first.storage, "step-00000003/") == [f"step-00000003/{MANIFEST}"]


def test_a_removed_checkpoint_leaves_a_tombstone_that_nobody_reads(start, proxy):
    owner = start()
    manifests = {step: owner.save(step) for step in (1, 2, 3)}
    for step in (1, 2):
        assert uncommit(owner.storage, StepDir(step), epoch=owner.epoch)
        assert not uncommit(owner.storage, StepDir(9), epoch=owner.epoch), "there is no such checkpoint"
    assert steps(read_catalogue(owner.storage)) == [3]
    assert is_tombstone(owner.storage.read(f"step-00000001/{MANIFEST}"), path=""), "the name stays taken"
    assert len(keys(owner.storage, "step-00000001/")) > 1, "readers under way find the data"
    for step in (1, 2):
        assert seal(owner.storage, StepDir(step), epoch=owner.epoch) == f"step-{step:08}"
    delete_files(owner.storage, StepDir(1), manifests[1])
    delete_tree(owner.storage, "step-00000002")
    for step in (1, 2):
        assert keys(owner.storage, f"step-{step:08}/") == [f"step-{step:08}/{MANIFEST}"]
        assert is_tombstone(owner.storage.read(f"step-{step:08}/{MANIFEST}"), path="")
    with pytest.raises(SaveFailed):
        publish_manifest(owner.storage, StepDir(1), manifests[1])

    proxy.reset_log()
    catalogue, report = start().recover()
    assert steps(catalogue) == [3]
    assert not report.removed
    asked = [request.path for request in proxy.requests() if "/step-" in request.path]
    assert asked, "the remaining checkpoint is read"
    assert all("/step-00000003/" in path for path in asked)
    assert proxy.counts()["LIST"] <= 2, "one listing to claim, one to recover"


def test_a_removal_that_was_cut_short_is_finished_by_the_next_start(start):
    owner = start()
    for step in (1, 2):
        owner.save(step)
    assert uncommit(owner.storage, StepDir(1), epoch=owner.epoch)
    catalogue, report = start().recover()
    assert steps(catalogue) == [2]
    assert fragment_of(0, 1) in report.removed
    assert keys(owner.storage, "step-00000001/") == [f"step-00000001/{MANIFEST}"]


def test_the_uploads_and_the_lease_of_a_dead_start_go_at_the_next(start, opened, proxy):
    first = start()
    first.save(1)
    # As a crash leaves them: a lease that nobody gave up, and uploads that nobody ends.
    first.storage.put("epochs/00000001.lease", b"dead")
    dead = f"step-00000002/{data_file_name(0, 0, AttemptId(1, 2))}"
    own = f"step-00000002.e2/{data_file_name(0, 0, AttemptId(2, 1))}"
    foreign = "notes/video.mp4"
    second = start()
    uploads = [begin_upload(second.storage, key) for key in (dead, own, foreign)]
    _, report = second.recover()
    assert dead in report.removed
    assert unfinished(second.storage) == sorted([own, foreign])
    assert "epochs/00000001.lease" not in keys(second.storage, "epochs/")
    for upload in uploads:
        upload.abort()
    assert unfinished(second.storage) == []

    # After an orderly end there is nothing to look for.
    proxy.reset_log()
    start().recover()
    assert not proxy.counts()["LIST_UPLOADS"]


def begin_upload(storage, key):
    upload = storage.open_writer(key, size_bytes=16 * MIB, direct=False)
    upload.write_segment(0, memoryview(bytes(8 * MIB)))
    return upload


def unfinished(storage: Storage) -> list[str]:
    found: list[str] = []

    def look(key: str) -> bool:
        found.append(key)
        return False

    storage.abort_uploads("", look)
    return sorted(found)


class PinningStorage(ForwardingStorage):
    """Somebody else pins, right before the first deletion."""

    def __init__(self, inner: Storage, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self._act: Callable[[], object] | None = act

    def delete(self, keys):
        if self._act is not None:
            act, self._act = self._act, None
            act()
        super().delete(keys)


def test_a_pin_between_the_look_and_the_removal_is_respected(start, opened):
    owner = start()
    for step in (1, 2):
        owner.save(step)
    manifest = owner.storage.read(f"step-00000001/{MANIFEST}")
    other = opened()
    entry = read_catalogue(other).entries[0]
    assert not uncommit(
        PinningStorage(owner.storage, lambda: pin(other, entry)), StepDir(1), epoch=owner.epoch
    )
    assert owner.storage.read(f"step-00000001/{MANIFEST}") == manifest
    assert [(entry.step, entry.is_pinned) for entry in read_catalogue(opened()).entries] == [
        (1, True),
        (2, False),
    ]


def test_a_pin_that_comes_too_late_says_so(start, opened):
    owner = start()
    for step in (1, 2):
        owner.save(step)
    other = opened()
    entry = read_catalogue(other).entries[0]
    assert uncommit(owner.storage, StepDir(1), epoch=owner.epoch)
    with pytest.raises(CheckpointNotFound, match="removed"):
        pin(other, entry)


def test_a_newer_start_between_the_look_and_the_removal_gets_the_checkpoint_back(start):
    owner = start()
    for step in (1, 2):
        owner.save(step)
    manifest = owner.storage.read(f"step-00000001/{MANIFEST}")
    with pytest.raises(Fenced):
        uncommit(PinningStorage(owner.storage, start), StepDir(1), epoch=owner.epoch)
    assert owner.storage.read(f"step-00000001/{MANIFEST}") == manifest


def test_prune_keeps_what_it_shall(start, opened):
    owner = start()
    for step in (1, 2, 3, 4):
        owner.save(step)
    pin(owner.storage, read_catalogue(owner.storage).entries[0])
    report = prune_run(opened(), LatestN(1), grace_seconds=0.0)
    assert [item.step for item in report.removed] == [2, 3]
    assert [checked.step for checked in verify(opened().url).checkpoints] == [1, 4]
    assert keys(owner.storage, "step-00000002/") == [f"step-00000002/{MANIFEST}"]


def test_two_starts_at_the_same_moment_get_two_epochs(opened, s3_prefix):
    run_id = ensure_run(opened()).run_id
    command = [sys.executable, "-c", CLAIM, s3_prefix, run_id]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with ExitStack() as stack:
        starts = []
        for _ in range(2):
            started = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                    env=environment,
                )
            )
            stack.callback(started.kill)
            starts.append(started)
        assert say(starts, None) == ["ready", "ready"]
        epochs = [int(line) for line in say(starts, "go")]
        assert len(set(epochs)) == 2
        verdicts = say(starts, "look")
        assert all(started.wait(30) == 0 for started in starts)
    newest = epochs.index(max(epochs))
    assert verdicts[newest] == "owner"
    assert verdicts[1 - newest] == "fenced"


def say(starts, line):
    """Tell all, then hear all: what each answers."""
    for started in starts:
        if line is not None:
            print(line, file=started.stdin, flush=True)
    return [started.stdout.readline().strip() for started in starts]


def test_an_epoch_that_was_never_claimed_hides_no_newer_start(start):
    first = start()
    # As it is left by a start that died between its lease and its claim.
    first.storage.put("epochs/00000004.lease", b"dead")
    second = start()
    assert second.epoch == 5
    with pytest.raises(Fenced, match="epoch 2"):
        require_newest(first.storage, first.epoch)
    require_newest(second.storage, second.epoch)
    names = [key for key in keys(first.storage, "epochs/") if key.endswith(".json")]
    assert names == [f"epochs/{number:08}.json" for number in (1, 2, 3, 4, 5)]
