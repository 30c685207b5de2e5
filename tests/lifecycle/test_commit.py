"""The commit: what is published, what is refused, and that nothing is deleted while the outcome is open."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its __all__

from dcp_ckpt.coordination import Channel, SoloChannel, StoreChannel
from dcp_ckpt.errors import (
    CommitUnknown,
    Fenced,
    SaveFailed,
    StorageError,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.format.fragment import CopiesEntry, Fragment, ValueEntry, decode_fragment
from dcp_ckpt.format.manifest import FragmentSummary, Manifest, build_manifest, summarize
from dcp_ckpt.format.names import AttemptId, StepDir, fragment_name
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.commit import check_layouts, check_summaries, parts_agree, publish_manifest
from dcp_ckpt.lifecycle.epochs import claim_epoch, require_newest
from dcp_ckpt.lifecycle.recover import recover_run
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, to_message
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.faults import FaultyStorage, fail_nth
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.failing_calls import failing

DIRECTORY = StepDir(7)
ATTEMPT = AttemptId(1, 1)
KEYS = SaveKeys(1)


def write_attempt(storage: Storage, *, ranks: int = 1, **fields: Any) -> Manifest:
    """A run whose epoch 1 has written step 7 and not committed it."""
    run = ensure_run(storage)
    if not storage.list_names("epochs/"):
        claim(storage)
    return write_tiny_checkpoint(storage, step=7, ranks=ranks, run_id=run.run_id, commit=False, **fields)


def claim(storage: Storage) -> int:
    run = ensure_run(storage)
    return claim_epoch(
        storage,
        run_id=run.run_id,
        world_size=1,
        purpose="train",
        hold=lambda key: None,
        wait_seconds=0.0,
    ).epoch


def summaries(root: Path, ranks: int) -> list[FragmentSummary]:
    found = []
    for rank in range(ranks):
        path = root / str(DIRECTORY) / fragment_name(rank, ATTEMPT)
        found.append(summarize(decode_fragment(path.read_bytes(), path=str(path)), path.read_bytes()))
    return found


def files(root: Path) -> list[str]:
    directory = root / str(DIRECTORY)
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def conclude(
    storage: Storage,
    root: Path,
    *,
    channel: Channel | None = None,
    ranks: int = 1,
    reporting: int | None = None,
) -> Verdict:
    """What rank 0 concludes when the first `reporting` ranks say that they are done."""
    channel = channel or SoloChannel()
    for summary in summaries(root, ranks)[:reporting]:
        channel.put(KEYS.report(summary.rank), to_message(Report(summary=summary)))
    deadline = time.monotonic() + (0.2 if reporting is not None else 20.0)
    with closing(Coordinator(storage, channel, epoch=1)) as coordinator:
        return coordinator.conclude(KEYS, step=7, directory=DIRECTORY, attempt=ATTEMPT, deadline=deadline)


def test_reports_of_another_attempt_do_not_count(tmp_path):
    """They are complete, and agree with each other."""
    storage = open_storage(tmp_path)
    write_attempt(storage, ranks=2)
    channel = SoloChannel()
    channel.world_size = 2
    for summary in summaries(tmp_path, 2):
        channel.put(KEYS.report(summary.rank), to_message(Report(summary=summary)))
    with closing(Coordinator(storage, channel, epoch=1)) as coordinator:
        verdict = coordinator.conclude(
            KEYS, step=7, directory=DIRECTORY, attempt=AttemptId(1, 2), deadline=time.monotonic() + 20.0
        )
    assert verdict.outcome == "failed"
    assert verdict.error is not None
    assert "rank 0 of e0001-s000001, rank 1 of e0001-s000001" in verdict.error["message"]
    assert "manifest.json" not in files(tmp_path)


# publish_manifest


def test_publishing_twice_is_publishing_once(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_attempt(storage)
    publish_manifest(storage, DIRECTORY, manifest)
    before = (tmp_path / "step-00000007" / "manifest.json").read_bytes()
    publish_manifest(storage, DIRECTORY, manifest)
    assert (tmp_path / "step-00000007" / "manifest.json").read_bytes() == before
    other = replace(manifest, attempt="e0001-s000002")
    with pytest.raises(SaveFailed, match="committed by another attempt, e0001-s000001"):
        publish_manifest(storage, DIRECTORY, other)


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_directory_that_does_not_sync_leaves_it_open(tmp_path, times):
    storage = open_storage(tmp_path)
    manifest = write_attempt(storage)
    step = tmp_path / str(DIRECTORY)
    only_if = (step / "manifest.json").exists
    with (
        failing("fsync", str(step), errno.EIO, times=times, only_if=only_if),
        pytest.raises(CommitUnknown, match="did not say whether") as caught,
    ):
        publish_manifest(storage, DIRECTORY, manifest)
    assert (caught.value.step, caught.value.phase) == (7, "commit")
    publish_manifest(storage, DIRECTORY, manifest)


class Unreadable(LocalStorage):
    """A file server that takes what is written, and then answers no more."""

    def read(self, key: str) -> bytes:
        if key.endswith("manifest.json"):
            raise StorageError("cannot read: permission denied", path=key, errno=errno.EACCES)
        return super().read(key)


def test_a_manifest_that_cannot_be_read_back_leaves_it_open(tmp_path):
    manifest = write_attempt(open_storage(tmp_path))
    storage = FaultyStorage(
        Unreadable(tmp_path), fail_nth(1, StorageTransient("no answer")), answer_lost=True
    )
    with pytest.raises(CommitUnknown, match="permission denied"):
        publish_manifest(storage, DIRECTORY, manifest)


def test_no_answer_at_all_leaves_it_open_and_a_refusal_does_not(tmp_path):
    local = open_storage(tmp_path)
    manifest = write_attempt(local)
    silent = FaultyStorage(local, lambda *_: StorageTransient("no answer"))
    with pytest.raises(CommitUnknown, match="no answer"):
        publish_manifest(silent, DIRECTORY, manifest)
    refusing = FaultyStorage(local, lambda *_: StorageError("no"))
    with pytest.raises(StorageError, match="no"):
        publish_manifest(refusing, DIRECTORY, manifest)
    once = FaultyStorage(local, fail_nth(1, StorageTransient("no answer")))
    publish_manifest(once, DIRECTORY, manifest)


def test_a_refusal_after_no_answer_proves_nothing(tmp_path):
    local = open_storage(tmp_path)
    manifest = write_attempt(local)
    answers: list[Exception] = [StorageTransient("no answer"), StorageError("full of files")]
    storage = FaultyStorage(local, lambda number, *_: answers[number - 1])
    with pytest.raises(CommitUnknown, match="full of files"):
        publish_manifest(storage, DIRECTORY, manifest)


def test_publishing_never_makes_a_directory(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_attempt(storage)
    (tmp_path / str(DIRECTORY)).rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        publish_manifest(storage, DIRECTORY, manifest)
    assert not (tmp_path / str(DIRECTORY)).exists()


# The coordinator: what becomes of an attempt


def test_a_whole_attempt_is_committed(tmp_path):
    storage = open_storage(tmp_path)
    manifest = write_attempt(storage)
    verdict = conclude(storage, tmp_path)
    assert (verdict.outcome, verdict.total_bytes) == ("committed", manifest.total_bytes)
    assert read_catalogue(storage).latest is not None


def test_nothing_is_deleted_while_its_manifest_stands(tmp_path):
    """The manifest was created, and the storage says that it was not, for good."""
    local = open_storage(tmp_path)
    write_attempt(local)
    before = files(tmp_path)
    storage = FaultyStorage(local, fail_nth(1, StorageError("refused")), answer_lost=True)
    verdict = conclude(storage, tmp_path)
    assert verdict.outcome == "unknown"
    assert files(tmp_path) == sorted([*before, "manifest.json"])


def test_a_failed_attempt_is_cleared_away(tmp_path):
    local = open_storage(tmp_path)
    write_attempt(local)
    storage = FaultyStorage(local, fail_nth(1, StorageError("refused")))
    assert conclude(storage, tmp_path).outcome == "failed"
    assert files(tmp_path) == []


def test_a_failure_that_cannot_be_made_durable_is_unknown(tmp_path):
    local = open_storage(tmp_path)
    write_attempt(local)
    before = files(tmp_path)
    storage = FaultyStorage(local, lambda *_: StorageError("refused"))
    assert conclude(storage, tmp_path).outcome == "unknown"
    assert files(tmp_path) == before


@pytest.fixture
def two_ranks() -> Iterator[StoreChannel]:
    """Rank 0's channel in a world of two."""
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    with closing(StoreChannel(store, 0, 2, host_ranks=(0, 1), close_seconds=0.1)) as channel:
        yield channel


def test_a_silent_rank_whose_writer_finished_is_committed(tmp_path, two_ranks):
    storage = open_storage(tmp_path)
    write_attempt(storage, ranks=2)
    assert conclude(storage, tmp_path, channel=two_ranks, ranks=2, reporting=1).outcome == "committed"
    assert read_catalogue(storage).latest is not None


def test_what_was_reported_as_failed_is_never_completed(tmp_path, two_ranks):
    """Rank 1's writer publishes its fragment after the verdict."""
    storage = open_storage(tmp_path)
    write_attempt(storage, ranks=2)
    late = tmp_path / str(DIRECTORY) / fragment_name(1, ATTEMPT)
    data = late.read_bytes()
    late.unlink()
    verdict = conclude(storage, tmp_path, channel=two_ranks, ranks=1, reporting=1)
    late.write_bytes(data)
    assert verdict.outcome == "failed"
    assert verdict.error is not None
    assert "rank(s) 1 did not finish the save in time" in verdict.error["message"]
    assert fragment_name(0, ATTEMPT) not in files(tmp_path)
    report = recover_run(storage, force=False, wait_seconds=0.0)
    assert report.committed == []
    assert read_catalogue(storage).entries == ()


def test_a_newer_epoch_or_a_lost_claim_stops_the_commit(tmp_path):
    storage = open_storage(tmp_path)
    write_attempt(storage)
    require_newest(storage, 1)
    assert claim(storage) == 2
    with pytest.raises(Fenced, match="epoch 2 has taken over this run from epoch 1"):
        require_newest(storage, 1)
    verdict = conclude(storage, tmp_path)
    assert verdict.error is not None
    # Whoever took over decides about what lies there; nothing of it was deleted.
    assert (verdict.outcome, verdict.error["kind"]) == ("unknown", "Fenced")


def test_a_run_that_was_deleted_and_made_anew_is_not_ours(tmp_path):
    storage = open_storage(tmp_path)
    write_attempt(storage)
    (tmp_path / "epochs" / "00000001.json").unlink()
    with pytest.raises(StorageUnsuitable, match="the claim of epoch 1 is gone"):
        require_newest(storage, 1)
    verdict = conclude(storage, tmp_path)
    assert verdict.error is not None
    assert (verdict.outcome, verdict.error["kind"]) == ("failed", "StorageUnsuitable")
    assert "manifest.json" not in files(tmp_path)


# The pure checks


def test_summaries_of_one_whole_attempt_pass_and_others_are_named(tmp_path):
    storage = open_storage(tmp_path)
    write_attempt(storage, ranks=3)
    good = summaries(tmp_path, 3)
    assert check_summaries(good) is None
    assert build_manifest(good).world_size == 3
    assert check_summaries([]) == "no fragments"
    assert check_summaries(good[:2]) == "rank(s) 2 published no fragment"
    stranger = replace(good[1], epoch_id="0" * 32)
    assert "rank 1 published a fragment of another attempt" in str(
        check_summaries([good[0], stranger, good[2]])
    )
    drifted = replace(good[2], replicated="0" * 32)
    assert check_summaries([*good[:2], drifted]) == "rank(s) 2 hold other replicated state than rank 0"


def test_layouts_tile_every_tensor_or_the_tensor_is_named(tmp_path):
    write_attempt(open_storage(tmp_path), ranks=2)
    first, second = (
        decode_fragment((tmp_path / str(DIRECTORY) / fragment_name(rank, ATTEMPT)).read_bytes(), path="")
        for rank in (0, 1)
    )
    assert check_layouts([first, second]) is None
    assert "model." in str(check_layouts([first]))
    assert "which the lowest rank of its mesh does not have" in str(check_layouts([second]))
    doubled = replace(second, tensors=first.tensors)
    assert "is described by rank 0 and by rank 1" in str(check_layouts([first, doubled]))
    misled = [
        replace(entry, owners=[[0, 1]]) if entry.name == "model.weight" else entry for entry in first.tensors
    ]
    assert "model.weight: rank(s) 1 store parts of it" in str(
        check_layouts([replace(first, tensors=misled), second])
    )
    also_called = replace(second, aliases={"other": [["model", "bias"]]})
    assert "model.bias is described by rank 0 and by rank 1" in str(check_layouts([first, also_called]))
    assert summarize(also_called, b"").aliases != summarize(second, b"").aliases


def test_ranks_that_hold_one_part_of_a_model_hold_the_same_or_are_named(tmp_path):
    write_attempt(open_storage(tmp_path), ranks=3)
    first, second, third = summaries(tmp_path, 3)
    held = [CopiesEntry(ranks=[[1, 2]], digest="1" * 32)]
    drifted = [CopiesEntry(ranks=[[1, 2]], digest="2" * 32)]
    assert check_summaries([first, replace(second, copies=held), replace(third, copies=held)]) is None
    for other in (drifted, []):
        problem = check_summaries([first, replace(second, copies=held), replace(third, copies=other)])
        assert problem == "rank(s) 2 hold other state of their part of the model than rank 1"


def test_values_in_parts_make_one_or_the_setting_is_named(tmp_path):
    write_attempt(open_storage(tmp_path), ranks=2)
    found = [
        decode_fragment((tmp_path / str(DIRECTORY) / fragment_name(rank, ATTEMPT)).read_bytes(), path="")
        for rank in (0, 1)
    ]

    def with_groups(fragment: Fragment, **settings: Any) -> Fragment:
        groups = [{"params": [f"layer{fragment.rank}"], **settings}]
        entry = ValueEntry(path=["optim", "groups"], value=groups, join="params")
        return replace(fragment, values={**fragment.values, "optim.groups": entry})

    def agree(fragments: list[Fragment]) -> bool:
        return parts_agree([summarize(fragment, b"") for fragment in fragments])

    equal = [with_groups(fragment, lr=1) for fragment in found]
    assert agree(equal)
    assert check_layouts(equal) is None
    different = [with_groups(fragment, lr=fragment.rank) for fragment in found]
    assert not agree(different)
    assert "optim.groups[0].lr differs between rank 0 and rank 1" in str(check_layouts(different))
