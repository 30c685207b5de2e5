"""What must hold of the files of a run after a crash and a recovery; shared by the crash tests."""

from __future__ import annotations

import os
from pathlib import Path

import dcp_ckpt
from dcp_ckpt.errors import LoadError
from dcp_ckpt.format.documents import decode_document
from dcp_ckpt.format.epoch import TOMBSTONE_FORMAT, Tombstone
from dcp_ckpt.format.manifest import Manifest, decode_manifest
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    AttemptId,
    StepDir,
    parse_data_file_name,
    parse_fragment_name,
)

__all__ = ["committed_steps", "debris", "files_below", "require_all_verify"]


def files_below(root: Path) -> list[str]:
    """All files, and with a slash all directories that hold nothing, relative to `root`."""
    found = []
    for directory, directories, files in os.walk(root):
        inside = os.path.relpath(directory, root)
        found += [os.path.normpath(os.path.join(inside, file)) for file in files]
        if not directories and not files:
            found.append(f"{inside}/")
    return sorted(found)


def committed_steps(root: Path) -> list[int]:
    return sorted(manifest.step for manifest in _manifests(root).values())


def debris(root: Path) -> list[str]:
    """What belongs to no committed checkpoint and is no document of the run; every temporary file."""
    attempts = {name: manifest.attempt_id for name, manifest in _manifests(root).items()}
    return [name for name in files_below(root) if not _has_a_place(root, name, attempts)]


def require_all_verify(root: Path) -> None:
    """Every visible checkpoint is complete, and its bytes are those that were digested."""
    manifests = _manifests(root)
    if not manifests:
        return
    report = dcp_ckpt.verify(root)
    assert report.ok, "\n".join(map(str, report.problems))
    assert [checked.directory for checked in report.checkpoints] == sorted(manifests)


def _manifests(root: Path) -> dict[str, Manifest]:
    paths = sorted(root.glob(f"step-*/{MANIFEST}"))
    return {
        path.parent.name: decode_manifest(path.read_bytes(), path=str(path))
        for path in paths
        if not _is_tombstone(path)
    }


def _is_tombstone(path: Path) -> bool:
    try:
        decode_document(path.read_bytes(), Tombstone, format=TOMBSTONE_FORMAT, path=str(path))
    except LoadError:
        return False
    return True


def _has_a_place(root: Path, name: str, attempts: dict[str, AttemptId]) -> bool:
    top, _, file = name.partition("/")
    if name in ("run.json", "trash/"):
        return True
    if top == "epochs":
        return not file.startswith(".") and Path(file).suffix in (".json", ".lease")
    if StepDir.parse(top) is not None and top not in attempts:
        return file == MANIFEST and _is_tombstone(root / name)
    parsed_fragment, parsed_data = parse_fragment_name(file), parse_data_file_name(file)
    attempt = parsed_fragment[1] if parsed_fragment else parsed_data[2] if parsed_data else None
    return file in (MANIFEST, DCP_METADATA) or (attempt is not None and attempt == attempts.get(top))
