"""The systems that are compared, behind one interface: this project and its peers, as they come.

A peer uses its defaults wherever they work on this machine. Knows neither rounds nor clocks. Every method is
called on all ranks that hold the state.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.file_peers import TorchSnapshot, safetensors_files, torch_save_files
from benchmarks.ratios import (
    OURS,
    PLAN_CACHED,
    PROCESS,
    SAFETENSORS,
    SHARED,
    SNAPSHOT,
    STOCK_SAVE,
    SUCCESSOR,
    THREAD,
    TORCH_SAVE,
)
from benchmarks.workload import State
from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, LoadReport, TrainState, load_checkpoint

__all__ = [
    "DEADLINE_SECONDS",
    "Ours",
    "StockAsync",
    "StockSave",
    "System",
    "TorchCheckpointing",
    "load_ours",
    "load_stock",
    "make_system",
]

DEADLINE_SECONDS = 120.0
"""Of every wait of a system; longer means that it hangs."""

Overlap = Literal["step", "off"]


class System(Protocol):
    """One way to save and load, with at most one save at a time.

    Args of the attributes:
        name: in rows and tables.
        note: what a reader must know about its numbers, or "".
    """

    name: str
    note: str

    def begin(self, state: State) -> None:
        """Start a save; returns when the trainer may go on."""

    def fence(self) -> None:
        """Wait until the tensors may be changed."""

    def finish(self) -> None:
        """Wait until the save is as durable as it will be."""

    def load(self, state: State) -> None:
        """Load the newest save in place."""

    def discard(self) -> None:
        """Remove the newest save, where nothing else will. On one rank only, when no other rank needs it."""

    def close(self) -> None:
        """End what belongs to the system. Idempotent."""


class Ours:
    """This project: digests, fsync and commit in every save, every block checked in every load.

    It gets a TrainState, as in training: only of that it knows what the optimizer writes, and may copy late.
    """

    note = ""

    def __init__(
        self,
        directory: Path | str,
        overlap: Overlap,
        group: dist.ProcessGroup | None = None,
        *,
        num_kept: int = 1,
    ) -> None:
        self.name = OURS
        self._overlap = overlap
        self.report: LoadReport | None = None
        self._known: tuple[State, TrainState] | None = None
        config = CheckpointConfig(
            keep=LatestN(num_kept), grace_seconds=0.0, overlap=overlap, timeout_seconds=DEADLINE_SECONDS
        )
        self._checkpointer = Checkpointer(directory, config=config, process_group=group)
        self._step = 0
        self.path = Path(directory)

    def begin(self, state: State) -> None:
        self._step += 1
        self._handle = self._checkpointer.save(self._train_state(state), step=self._step)

    def fence(self) -> None:
        if self._overlap == "step":  # else save() returns when the tensors are free
            self._checkpointer.fence()

    def finish(self) -> None:
        self.path = Path(self._handle.result(DEADLINE_SECONDS).path)

    def load(self, state: State) -> None:
        self.report = self._checkpointer.load(self._train_state(state))

    def discard(self) -> None:
        """Retention removes it after the next save."""

    def close(self) -> None:
        self._checkpointer.close()

    def _train_state(self, state: State) -> TrainState:
        """Made once, as a training loop does."""
        if self._known is None or self._known[0] is not state:
            self._known = state, _train_state(state)
        return self._known[1]


class StockSave:
    """`dcp.save`, which returns when files are fsynced and `.metadata` is there."""

    note = ""

    def __init__(self, directory: Path, group: dist.ProcessGroup | None = None) -> None:
        self.name = STOCK_SAVE
        self._directory = directory
        self._group = group
        self._number = 0

    @property
    def path(self) -> Path:
        """Of the newest save."""
        return self._directory / f"{self._number}"

    def begin(self, state: State) -> None:
        self._number += 1
        dcp_save(state.tensors, checkpoint_id=self.path, process_group=self._group)

    def fence(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def load(self, state: State) -> None:
        dcp_load(state.tensors, checkpoint_id=self.path, process_group=self._group)

    def discard(self) -> None:
        shutil.rmtree(self.path)

    def close(self) -> None:
        pass


class StockAsync(StockSave):
    """`dcp.async_save`. Its upload runs collectives on `group` in the background: nobody else may use it.

    Args:
        kind: in a thread (the default of stock DCP) or in a process.
        shared_memory: stage asynchronously into shared memory that is reused.
        plan_cached: keep the plan of the first save. The cache is one of the process: for one system only.
    """

    def __init__(
        self,
        directory: Path,
        group: dist.ProcessGroup | None,
        *,
        kind: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
        shared_memory: bool = False,
        plan_cached: bool = False,
    ) -> None:
        super().__init__(directory, group)
        in_process = PROCESS if not shared_memory else SHARED
        in_thread = PLAN_CACHED if plan_cached else THREAD
        self.name = in_thread if kind is AsyncCheckpointerType.THREAD else in_process
        self._kind = kind
        self._plan_cached = plan_cached
        self._staged: Future[None] | None = None
        self._uploaded: Future[Any] | None = None
        self._stager: DefaultStager | None = None
        if shared_memory:
            # The defaults ask for pinned memory, which needs an accelerator.
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=True,
                    use_async_staging=True,
                    use_non_blocking_copy=False,
                )
            )

    def begin(self, state: State) -> None:
        self._number += 1
        saved = dcp_async_save(
            state.tensors,
            checkpoint_id=self.path,
            planner=DefaultSavePlanner(enable_plan_caching=self._plan_cached),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        if isinstance(saved, AsyncSaveResponse):
            self._staged, self._uploaded = saved.staging_completion, saved.upload_completion
        else:
            self._staged, self._uploaded = None, saved

    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result(DEADLINE_SECONDS)

    def finish(self) -> None:
        assert self._uploaded is not None, "a save was begun"
        self._uploaded.result(DEADLINE_SECONDS)

    def close(self) -> None:
        stager, self._stager = self._stager, None
        if stager is not None:
            stager.close()


class TorchCheckpointing:
    """`torch_checkpointing`, which stages in a thread and writes in a process, without fsync.

    Its direct I/O, the default, writes unaligned pieces, which ext4 refuses; so it is off here. It gets the
    local tensors, since its process can only warn about the device meshes of DTensors.

    Raises:
        ImportError: it is not installed.
    """

    note = "not durable: it does not fsync"

    def __init__(self, directory: Path) -> None:
        manager = importlib.import_module("torch_checkpointing").CheckpointManager
        storage = importlib.import_module("torch_checkpointing.storage.filesystem")
        self.name = SUCCESSOR
        self._directory = directory
        self._number = 0
        buffered = storage.LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager: Any = manager(manager.Config(storage_config=buffered))
        self._written: Future[Any] | None = None

    @property
    def _path(self) -> str:
        return str(self._directory / f"{self._number}")

    def begin(self, state: State) -> None:
        self._number += 1
        self._written = self._manager.save(self._path, _items(state))

    def fence(self) -> None:
        with self._manager.lock():
            pass

    def finish(self) -> None:
        assert self._written is not None, "a save was begun"
        self._written.result(DEADLINE_SECONDS)

    def load(self, state: State) -> None:
        self._manager.load(self._path, into=_items(state))

    def discard(self) -> None:
        shutil.rmtree(self._path)

    def close(self) -> None:
        self._manager.close()


def _train_state(state: State) -> TrainState:
    return TrainState(model=state.model, optimizer=state.optimizer, rng=False)


def _items(state: State) -> dict[str, Any]:
    return {"model": dict(zip(state.tensors, state.locals, strict=True))}


def load_ours(path: Path, state: State, group: dist.ProcessGroup | None) -> LoadReport:
    """Load a checkpoint of this project on the ranks of `group`, whoever saved it."""
    config = CheckpointConfig(timeout_seconds=DEADLINE_SECONDS)
    return load_checkpoint(path, _train_state(state), config=config, process_group=group)


def load_stock(path: Path, state: State, group: dist.ProcessGroup | None) -> None:
    """As `load_ours`, with stock DCP."""
    dcp_load(state.tensors, checkpoint_id=path, process_group=group)


def make_system(name: str, directory: Path, overlap: Overlap, group: dist.ProcessGroup) -> System:
    """Start the system of this name. Called on all ranks.

    Args:
        directory: its own.
        group: of all ranks, used by nothing else.

    Raises:
        ImportError: it is not installed.
    """
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    makers: dict[str, Callable[[], System]] = {
        OURS: lambda: Ours(directory, overlap),
        STOCK_SAVE: lambda: StockSave(directory, group),
        THREAD: lambda: StockAsync(directory, group, kind=thread),
        PLAN_CACHED: lambda: StockAsync(directory, group, kind=thread, plan_cached=True),
        PROCESS: lambda: StockAsync(directory, group, kind=process),
        SHARED: lambda: StockAsync(directory, group, kind=process, shared_memory=True),
        SUCCESSOR: lambda: TorchCheckpointing(directory),
        SNAPSHOT: lambda: TorchSnapshot(directory, group),
        TORCH_SAVE: lambda: torch_save_files(directory),
        SAFETENSORS: lambda: safetensors_files(directory),
    }
    return makers[name]()
