"""Marks: written once, taken back by name, never in the way of a read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.marks import Mark, MarkKind, active_marks, is_pinned, read_marks, write_mark
from dcp_ckpt.storage import Storage, open_storage

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
