"""Peers that write each rank's tensors into files of their own: no other number of ranks can load them.

Used by `peers`, which makes them. They get the local tensors. Know neither rounds nor clocks.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import serialization

from benchmarks.ratios import SAFETENSORS, SNAPSHOT, TORCH_SAVE
from benchmarks.workload import State

__all__ = ["RankFiles", "TorchSnapshot", "safetensors_files", "torch_save_files"]

Tensors = dict[str, torch.Tensor]


class RankFiles:
    """One file for each rank, fsynced with its directory. Without a commit: nothing says that all are there.

    Args:
        write: makes the file.
        read: the tensors of a file, which may be mapped.
    """

    note = "a file for each rank: no commit, and no load on another number of ranks"

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        write: Callable[[Tensors, Path], None],
        read: Callable[[Path], Tensors],
    ) -> None:
        self.name = name
        self._directory = directory
        self._write = write
        self._read = read
        self._number = 0

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._number}" / f"{dist.get_rank()}"

    def begin(self, state: State) -> None:
        """Returns when it is durable."""
        self._number += 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write(_tensors(state), self._path)
        for path in (self._path, self._path.parent):
            _fsync(path)

    def fence(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def load(self, state: State) -> None:
        found = self._read(self._path)
        targets = _tensors(state)
        torch._foreach_copy_(list(targets.values()), [found[name] for name in targets])

    def discard(self) -> None:
        shutil.rmtree(self._path.parent)

    def close(self) -> None:
        pass


def torch_save_files(directory: Path) -> RankFiles:
    """`torch.save` without its CRC, which `torch.load` does not check, and `torch.load` of a mapped file."""

    def write(tensors: Tensors, path: Path) -> None:
        is_computed = serialization.get_crc32_options()
        serialization.set_crc32_options(False)
        try:
            torch.save(tensors, path)
        finally:
            serialization.set_crc32_options(is_computed)

    def read(path: Path) -> Tensors:
        found: Tensors = torch.load(path, mmap=True, weights_only=True)
        return found

    return RankFiles(directory, TORCH_SAVE, write=write, read=read)


def safetensors_files(directory: Path) -> RankFiles:
    """`save_file` and `load_file`, which maps the file.

    Raises:
        ImportError: it is not installed.
    """
    module: Any = importlib.import_module("safetensors.torch")
    return RankFiles(directory, SAFETENSORS, write=module.save_file, read=module.load_file)


class TorchSnapshot:
    """`torchsnapshot.Snapshot.async_take`, with tensors batched, its default; it restores in place.

    Args:
        group: its collectives, some of them in the background, run on it.

    Raises:
        ImportError: it is not installed.
    """

    note = "not durable: it does not fsync"

    def __init__(self, directory: Path, group: dist.ProcessGroup) -> None:
        self.name = SNAPSHOT
        self._module: Any = importlib.import_module("torchsnapshot")
        self._directory = directory
        self._group = group
        self._number = 0
        self._pending: Any = None
        self._snapshot: Any = None

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._number}"

    def begin(self, state: State) -> None:
        self._number += 1
        self._pending = self._module.Snapshot.async_take(str(self._path), self._items(state), pg=self._group)

    def fence(self) -> None:
        """It returns when everything is copied."""

    def finish(self) -> None:
        self._snapshot = self._pending.wait()

    def load(self, state: State) -> None:
        self._snapshot.restore(self._items(state))

    def discard(self) -> None:
        shutil.rmtree(self._path)

    def close(self) -> None:
        pass

    def _items(self, state: State) -> dict[str, Any]:
        return {"model": self._module.StateDict(**_tensors(state))}


def _tensors(state: State) -> Tensors:
    return dict(zip(state.tensors, state.locals, strict=True))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
