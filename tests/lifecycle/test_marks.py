"""Marks: written once, taken back by name, never in the way of a read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.names import EPOCHS, StepDir, epoch_name
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.leftovers import sweep_leftovers
from dcp_ckpt.lifecycle.marks import Mark, MarkKind, active_marks, is_pinned, read_marks, write_mark
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.interposition import SystemCall, interposed, watched_calls

STEP = StepDir(10)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def mark(storage: Storage, kind: MarkKind, **fields: object) -> Mark:
    return write_mark(storage, STEP, kind=kind, epoch=1, step=10, attempt="e0001-s000001", **fields)  # type: ignore[arg-type]


def test_what_was_written_is_read(storage: Storage, tmp_path: Path) -> None:
    written = mark(storage, "metrics", detail={"acc": 0.5})
    assert read_marks(storage) == {STEP: (written,)}
    (path,) = (tmp_path / "marks" / "step-00000010").iterdir()
    assert path.name == f"metrics-{written.id}.json"
    assert sorted(json.loads(path.read_bytes())) == [
        "attempt", "cancels", "created_at", "detail", "epoch", "format", "format_version", "kind", "step",
    ]  # fmt: skip


def test_an_unpin_takes_back_the_pins_it_names_and_no_others(storage: Storage) -> None:
    first = mark(storage, "pin")
    mark(storage, "unpin", cancels=[first.id])
    assert not is_pinned(read_marks(storage)[STEP])
    second = mark(storage, "pin")
    marks = read_marks(storage)[STEP]
    assert is_pinned(marks)
    assert active_marks(marks, "pin") == (second,)


def test_what_cannot_be_read_is_logged_and_left_out(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = mark(storage, "bad")
    folder = tmp_path / "marks" / "step-00000010"
    (folder / f"bad-{'0' * 32}.json").write_bytes(b"{")
    (folder / f"pin-{'1' * 32}.json").write_bytes(b'{"format":"dcp_ckpt.mark","format_version":99}')
    (folder / "notes.txt").write_bytes(b"not ours")
    (tmp_path / "marks" / "elsewhere").mkdir()
    (tmp_path / "marks" / "elsewhere" / f"pin-{'2' * 32}.json").write_bytes(b"{}")
    assert read_marks(storage) == {STEP: (good,)}
    assert len(caplog.records) == 2


def test_an_unknown_kind_is_refused(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'best'"):
        mark(storage, "best")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_mark_is_written_though_a_start_sweeps_its_temporary_file(tmp_path: Path) -> None:
    """Marks are written beside the owner of the run, who takes what is temporary for a dead process's."""
    storage = LocalStorage(tmp_path, calls=watched_calls())
    swept: list[str] = []

    def sweep(call: SystemCall) -> None:
        if call.name == "link" and call.matches("*/marks/*") and not call.after and not swept:
            swept.extend(sweep_leftovers(LocalStorage(tmp_path), read_catalogue(storage), epoch=1))

    storage.make_directory(EPOCHS)
    storage.create_exclusive(f"{EPOCHS}/{epoch_name(1)}", b"claimed")
    with interposed(sweep):
        written = mark(storage, "pin")
    assert len(swept) == 1, "the temporary file was there, and was swept"
    assert read_marks(storage) == {STEP: (written,)}
