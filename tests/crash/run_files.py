"""What must hold of the files of a run after a crash and a recovery; shared by the crash tests.

A run is given as a path, or as the URL of an object store.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import dcp_ckpt
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.manifest import Manifest, decode_manifest
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    AttemptId,
    StepDir,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.storage import open_storage

__all__ = [
    "committed_manifests",
    "committed_steps",
    "contents",
    "debris",
    "files_below",
    "files_of",
    "require_all_verify",
]


def files_below(root: Path) -> list[str]:
    """All files, and with a slash all directories that hold nothing, relative to `root`."""
    found = []
    for directory, directories, files in os.walk(root):
        inside = os.path.relpath(directory, root)
        found += [os.path.normpath(os.path.join(inside, file)) for file in files]
        if not directories and not files:
            found.append(f"{inside}/")
    return sorted(found)


def files_of(run: Path | str) -> list[str]:
    """`files_below` a directory, or all objects below a URL."""
    if "://" not in str(run):
        return files_below(Path(run))
    with closing(open_storage(str(run))) as storage:
        return [info.key for info in storage.list("")]


def contents(run: Path | str) -> dict[str, bytes]:
    """The bytes of every file."""
    names = [name for name in files_of(run) if not name.endswith("/")]
    if "://" not in str(run):
        return {name: (Path(run) / name).read_bytes() for name in names}
    with closing(open_storage(str(run))) as storage:
        return {name: storage.read(name) for name in names}


def committed_steps(run: Path | str) -> list[int]:
    return sorted(manifest.step for manifest in committed_manifests(run).values())


def debris(run: Path | str) -> list[str]:
    """What belongs to no committed checkpoint and is no document of the run; every temporary file."""
    manifests = _manifests(run)
    attempts = {name: found.attempt_id for name, found in manifests.items() if found is not None}
    removed = {name for name, found in manifests.items() if found is None}
    return [name for name in files_of(run) if not _has_a_place(name, attempts, removed)]


def require_all_verify(run: Path | str) -> None:
    """Every visible checkpoint is complete, and its bytes are those that were digested."""
    manifests = committed_manifests(run)
    if not manifests:
        return
    report = dcp_ckpt.verify(run)
    assert report.ok, "\n".join(map(str, report.problems))
    assert [checked.directory for checked in report.checkpoints] == sorted(manifests)


def committed_manifests(run: Path | str) -> dict[str, Manifest]:
    """The manifest of every committed checkpoint, by the name of its directory."""
    return {name: manifest for name, manifest in _manifests(run).items() if manifest is not None}


def _manifests(run: Path | str) -> dict[str, Manifest | None]:
    """By directory; None where a tombstone stands for a removed checkpoint."""
    found: dict[str, Manifest | None] = {}
    with closing(open_storage(run)) as storage:
        for name in files_of(run):
            directory, _, file = name.partition("/")
            if file == MANIFEST and StepDir.parse(directory) is not None:
                data = storage.read(name)
                is_gone = is_tombstone(data, path=name)
                found[directory] = None if is_gone else decode_manifest(data, path=name)
    return found


def _has_a_place(name: str, attempts: dict[str, AttemptId], removed: set[str]) -> bool:
    top, _, file = name.partition("/")
    # The directory of a mark that was never written waits for the next one.
    if name in ("run.json", "trash/") or (top == "marks" and name.endswith("/")):
        return True
    if top in ("epochs", "marks"):
        return not Path(file).name.startswith(".") and Path(file).suffix in (".json", ".lease")
    if top in removed:
        return file == MANIFEST
    parsed_fragment, parsed_data = parse_fragment_name(file), parse_data_file_name(file)
    attempt = parsed_fragment[1] if parsed_fragment else parsed_data[2] if parsed_data else None
    return file in (MANIFEST, DCP_METADATA) or (attempt is not None and attempt == attempts.get(top))
