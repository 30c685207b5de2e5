"""Where an export goes: into which directory, as which file, and what of it may be there already.

Called by `ops.export`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.errors import ConfigError, StorageExists, StorageFull
from dcp_ckpt.format.names import (
    DCP_METADATA,
    MANIFEST,
    RUN_JSON,
    parse_data_file_name,
    parse_fragment_name,
)
from dcp_ckpt.format.safetensors import is_model_file
from dcp_ckpt.ops.exporting.files import PlannedFile
from dcp_ckpt.ops.exporting.request import ExportFormat
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.wording import shown_names

__all__ = ["ExportPlace", "outdated_files", "place_of", "require_room"]


@dataclass(frozen=True, kw_only=True)
class ExportPlace:
    """The directory or URL `root`, and the name of the one file in it; None for those of the format."""

    root: str
    name: str | None
    format: ExportFormat

    def is_own(self, name: str) -> bool:
        """Whether a file of this name would be a part of what is exported here."""
        if self.name is not None:
            return name == self.name
        if self.format == "safetensors":
            return is_model_file(name)
        return name == DCP_METADATA or name.endswith(".distcp")


def place_of(out: str | os.PathLike[str], format: ExportFormat) -> ExportPlace:
    """Understand OUT: a file for torch, and for safetensors where it is called so; else a directory.

    Raises:
        ConfigError: a directory where a file is needed.
    """
    text = os.fspath(out)
    if format == "dcp" or (format == "safetensors" and not text.endswith(".safetensors")):
        return ExportPlace(root=text, name=None, format=format)
    root, slash, name = text.rpartition("/")
    if not name or root.endswith(":/") or os.path.isdir(text):
        raise ConfigError(
            f"{text} is a directory: name the file to export to, as in {text.rstrip('/')}/model.pt"
        )
    return ExportPlace(root=root or slash or ".", name=name, format=format)


def outdated_files(
    storage: Storage, place: ExportPlace, files: Sequence[PlannedFile], *, source: str, force: bool
) -> list[str]:
    """What is there of an earlier export and must go, since it would be taken for a part of the new one.

    Args:
        storage: at `place.root`.
        files: the new ones.
        source: path or URL of the checkpoint that is exported.
        force: replace what is there.

    Raises:
        ConfigError: a checkpoint, finished or not, is there, which is no place for other files, or the one
            that is exported, or a run, which is no place for a checkpoint of another format.
        StorageExists: something is there, and nothing may be replaced.
    """
    names = storage.list_names("")
    if _is_same(storage.url, source):
        raise ConfigError(f"{source} is the checkpoint that is exported: choose another place")
    if ours := _what_it_is(names, place.format):
        raise ConfigError(
            f"{storage.url} is {ours}, where retention and other readers expect no other files: choose "
            "another place"
        )
    found = [name for name in names if place.is_own(name)]
    if found and not force:
        raise StorageExists(
            f"{shown_names(found)} is there already; choose another place, or replace it with force",
            path=storage.url,
        )
    return sorted(set(found) - {file.name for file in files})


def _is_same(url: str, source: str) -> bool:
    """Whether two paths or URLs are one place, by whatever symbolic links."""
    return url.rstrip("/") == source or os.path.realpath(url) == os.path.realpath(source)


def _what_it_is(names: Sequence[str], format: ExportFormat) -> str | None:
    """What a directory with these files is that an export would harm, if anything."""
    if MANIFEST in names:
        return "a checkpoint"
    # Other files do no harm beside a run's, but this makes a stock checkpoint of its directory.
    if RUN_JSON in names and format == "dcp":
        return "a run"
    # Those of stock DCP name no attempt.
    is_attempt = any(parse_fragment_name(name) or parse_data_file_name(name) for name in names)
    return "a checkpoint that is not finished" if is_attempt else None


def require_room(storage: Storage, files: Sequence[PlannedFile]) -> None:
    """Look whether everything fits, before anything is written.

    Raises:
        StorageFull: it does not, as far as storage says.
    """
    needed_bytes = sum(file.num_bytes for file in files)
    free_bytes = storage.free_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        raise StorageFull(
            f"no room for the export: {needed_bytes} bytes needed, {free_bytes} bytes free; delete "
            "something, export fewer tensors or a smaller dtype, or use a larger disk",
            path=storage.url,
            errno=errno.ENOSPC,
        )
