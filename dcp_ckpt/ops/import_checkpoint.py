"""Import: what other programs saved becomes a committed checkpoint of a run.

Owns which kind of source a path is, and the names in the checkpoint. Called by the command line and by users'
own scripts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from dcp_ckpt.errors import CheckpointNotFound, ConfigError, StateMismatch, StorageNotFound
from dcp_ckpt.format.names import DCP_METADATA, MANIFEST
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.ops.importing.dcp_source import CheckpointSource
from dcp_ckpt.ops.importing.safetensors_source import SafetensorsSource, index_names
from dcp_ckpt.ops.importing.source import ImportSource
from dcp_ckpt.ops.importing.torch_source import TorchSource
from dcp_ckpt.ops.new_checkpoint import WriteProgress, write_checkpoint
from dcp_ckpt.ops.new_state import NewState, NewTensor, NewValue
from dcp_ckpt.ops.refs import parse_ref, split_location
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.wording import shown_names

__all__ = ["ImportReport", "import_checkpoint"]

_TAG = "import"
_FILE = ".safetensors"
_INDEX = ".safetensors.index.json"
_TORCH_FILE = ".bin"
_TORCH_INDEX = ".bin.index.json"

_Path = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was imported, and where it is now.

    Args:
        path: of the checkpoint.
        step, epoch: its own.
        kind: of the source: `dcp`, `safetensors` or `torch`.
        num_tensors, num_values: what it holds.
        num_bytes: written.
        prefix: what the names have gained.
        left_out: reason -> how many tensors and values.
        unverified: what could not be checked when it was read.
    """

    path: str
    step: int
    epoch: int
    kind: str
    num_tensors: int
    num_values: int
    num_bytes: int
    prefix: str
    left_out: Mapping[str, int]
    unverified: str


def import_checkpoint(
    src: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    step: int,
    prefix: str = "",
    force: bool = False,
    wait_seconds: float = 0.0,
    progress: WriteProgress | None = None,
) -> ImportReport:
    """Make a committed checkpoint of a run out of files of other programs. One process; blocks.

    No pickle is executed. Nothing is overwritten: `step` has to be greater than that of every checkpoint of
    the run, which is made if nothing is there. If it fails, nothing of it counts. Memory: some windows of
    16 MiB; for files that `torch.save` of before torch 1.6 wrote, the whole file.

    Args:
        src: the directory of a stock DCP checkpoint, or any reference as in `open_checkpoint`; a safetensors
            file, its index, or a directory with one of them; a local `torch.save` file with a dictionary of
            tensors and values, nested or not, or the index of several.
        run: directory or URL of the run.
        prefix: what all names begin with in the checkpoint: `model.` for the bare tensors of a model, since
            `TrainState` stores those of its model so.
        force: go on although a live owner holds the run; it is fenced then, and cannot save any more.
        wait_seconds: how long to wait for an owner that lives.
        progress: told how far it is; what it raises ends the import.

    Raises:
        CheckpointNotFound: nothing that can be imported is at `src`.
        ConfigError: it is not clear what to import, `run` is no run, or a live owner holds it.
        StepAlreadySaved: the run has a checkpoint of this step or a later one.
        LoadError: only executing a pickle could read it.
        StateMismatch: a dtype or kind of tensor that cannot be stored, by name, or two things of one name.
        CorruptCheckpoint: the source is damaged.
        StorageFull: there is no room; found before anything is written.
        StorageError: a read or write failed.
    """
    with closing(_open(os.fspath(src))) as source:
        names = _Names(prefix)
        state = NewState(
            tensors=[names.tensor(tensor) for tensor in source.tensors],
            values=[names.value(value) for value in source.values],
            tags=[_TAG],
        )
        _refuse_shared_names(state, os.fspath(src))
        with closing(open_storage(os.fspath(run))) as storage:
            written = write_checkpoint(
                storage,
                state,
                source.windows,
                step=step,
                purpose="import",
                force=force,
                wait_seconds=wait_seconds,
                progress=progress,
            )
            path = f"{storage.url.rstrip('/')}/{written.directory}"
        return ImportReport(
            path=path,
            step=step,
            epoch=written.epoch,
            kind=source.kind,
            num_tensors=len(state.tensors),
            num_values=len(state.values),
            num_bytes=written.num_bytes,
            prefix=names.prefix,
            left_out=dict(sorted(Counter(source.left_out.values()).items())),
            unverified=source.unverified,
        )


class _Names:
    """What everything is called in the checkpoint.

    Args:
        prefix: with or without a dot at its end; may be empty.
    """

    def __init__(self, prefix: str) -> None:
        self._parts = tuple(prefix.rstrip(".").split(".")) if prefix else ()
        if not all(self._parts):
            raise ConfigError(f"prefix {prefix!r}: names separated by dots, as in model.")
        self.prefix = "".join(f"{part}." for part in self._parts)

    def tensor(self, tensor: NewTensor) -> NewTensor:
        aliases = tuple((*self._parts, *alias) for alias in tensor.aliases)
        return replace(tensor, path=(*self._parts, *tensor.path), aliases=aliases)

    def value(self, value: NewValue) -> NewValue:
        return replace(value, path=(*self._parts, *value.path))


def _refuse_shared_names(state: NewState, src: str) -> None:
    if not state.tensors and not state.values:
        raise StateMismatch(f"{src} holds nothing that can be imported")
    paths: Iterable[_Path] = (
        *(path for tensor in state.tensors for path in (tensor.path, *tensor.aliases)),
        *(value.path for value in state.values),
    )
    counts = Counter(".".join(path) for path in paths)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise StateMismatch(f"{src} holds several things of one name: {shown_names(twice)}")


def _open(src: str) -> ImportSource:
    """Find out what `src` is, and read its tables."""
    if parse_ref(src) is not None:
        return _checkpoint(src)
    if os.path.isfile(src) and not src.endswith((_FILE, _INDEX)):
        return _torch(src)
    root, name = split_location(src)
    if src.endswith((_FILE, _INDEX)):
        return _safetensors(open_storage(root), name)
    storage = open_storage(src)
    try:
        names = storage.list_names("")
        if MANIFEST not in names and DCP_METADATA not in names:
            name = _main_file(names, src)
            if name.endswith((_FILE, _INDEX)):
                return _safetensors(storage, name)
            storage.close()
            return _torch(os.path.join(src, name))
    except BaseException:
        storage.close()
        raise
    storage.close()
    return _checkpoint(src)


def _checkpoint(ref: str) -> ImportSource:
    checkpoint = open_checkpoint(ref)
    try:
        return CheckpointSource(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _safetensors(storage: Storage, name: str) -> ImportSource:
    """One file, or those of an index; the storage is closed with it, or at once if this fails."""
    try:
        if not name.endswith(_INDEX):
            return SafetensorsSource(storage, [name])
        index = index_names(storage, name)
        return SafetensorsSource(storage, sorted(set(index.values())), index)
    except StorageNotFound as error:
        storage.close()
        raise CheckpointNotFound("no such file", path=f"{storage.url}/{name}") from error
    except BaseException:
        storage.close()
        raise


def _torch(path: str) -> ImportSource:
    """One local file, or those of an index."""
    if "://" in path:
        raise ConfigError(f"{path} is not on this machine; torch.save files are read there only: fetch them")
    if not path.endswith(_TORCH_INDEX):
        return TorchSource([path])
    directory, name = os.path.split(os.path.abspath(path))
    with closing(open_storage(directory)) as storage:
        index = index_names(storage, name)
    return TorchSource([os.path.join(directory, name) for name in sorted(set(index.values()))], index)


def _main_file(names: Sequence[str], src: str) -> str:
    """What to begin with in a directory: its index, or the one file of a model."""
    for ending in (_INDEX, _FILE, _TORCH_INDEX, _TORCH_FILE):
        found = [name for name in names if name.endswith(ending)]
        if len(found) > 1:
            raise ConfigError(f"{src} holds several models; name the file: {shown_names(found)}")
        if found:
            return found[0]
    held = shown_names(names) or "nothing"
    raise CheckpointNotFound(
        f"nothing to import: neither a checkpoint (it has no {DCP_METADATA}) nor a model in safetensors or "
        f"*{_TORCH_FILE} files; it holds {held}. Another torch.save file is named itself",
        path=src,
    )
