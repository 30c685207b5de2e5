"""A stock DCP checkpoint, opened for reading or checked as far as it can be.

Owns the same reading surface as `Checkpoint` over `.metadata` and `torch.save` containers. Called by
`open_checkpoint` and `verify`, when a directory has no manifest. Imports torch only when a tensor is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dcp_ckpt.errors import CheckpointNotFound, LoadError, StateError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.fragment import Fragment, MeshEntry, TensorEntry, ValueEntry
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.load.stock import STOCK_UNVERIFIED, StockSource, open_stock, stock_digest
from dcp_ckpt.ops.checkpoint import Checkpoint
from dcp_ckpt.ops.refs import parse_ref, split_location
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.wording import shown_names

if TYPE_CHECKING:
    import torch

__all__ = ["StockCheckpoint", "open_stock_checkpoint"]

_READERS = 4


def open_stock_checkpoint(path: str | os.PathLike[str]) -> StockCheckpoint | None:
    """Open the directory of a stock checkpoint; None when it has no `.metadata`.

    Raises:
        CorruptCheckpoint: `.metadata` is damaged.
        LoadError: it names a class that no stock checkpoint needs; nothing was executed.
    """
    if parse_ref(path) is not None:
        return None
    root, directory = split_location(os.fspath(path))
    storage = open_storage(root)
    try:
        if stock_digest(storage, directory) is None:
            storage.close()
            return None
        return StockCheckpoint(storage, open_stock(storage, directory))
    except BaseException:
        storage.close()
        raise


class StockCheckpoint(Checkpoint):
    """A read-only view of a stock checkpoint: tensors and values, without manifest, fragments or digests.

    Args:
        storage: holds the checkpoint; closed with this object.
        source: its tables.
    """

    unverified = STOCK_UNVERIFIED

    def __init__(self, storage: Storage, source: StockSource) -> None:
        self._storage = storage
        self._source = source
        self.directory = source.directory

    @property
    def manifest(self) -> Manifest:
        """There is none.

        Raises:
            LoadError: always.
        """
        raise LoadError("a stock DCP checkpoint has no manifest", path=self.directory)

    @property
    def step(self) -> int | None:
        """The step that the name of its directory states, if it states one."""
        return self._source.step

    @property
    def per_rank_names(self) -> list[str]:
        """None: a stock checkpoint does not say what was of one rank only."""
        return []

    def source(self) -> StockSource:
        """Its tables as a load sees them."""
        return self._source

    @property
    def num_files(self) -> int:
        """How many data files there are."""
        return len(self._source.files)

    @property
    def num_bytes(self) -> int:
        """Of all data files.

        Raises:
            CorruptCheckpoint: one is missing, or shorter than `.metadata` says.
        """
        return sum(map(self._source.found_bytes, self._source.files))

    @property
    def unreadable(self) -> Mapping[str, str]:
        """The values that only executing their pickles could restore, with the reason."""
        self._source.values()
        return self._source.unreadable

    def keys(self) -> list[str]:
        """The names of all tensors and values, sorted; also of values that cannot be read."""
        return sorted(self._source.names())

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return dict(sorted(self._source.tensors.items()))

    @cached_property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """None: it stores a tied tensor under each of its names."""
        return {}

    @cached_property
    def values(self) -> Mapping[str, ValueEntry]:
        """The values that typed JSON can hold, encoded."""
        found: dict[str, ValueEntry] = {}
        for name, value in sorted(self._source.values().items()):
            try:
                encoded = encode_value(value, path=name)
            except StateError:
                continue  # it holds tensors; `read_value` gives it
            found[name] = ValueEntry(path=list(map(str, self._source.flat_paths[name])), value=encoded)
        return found

    def mesh(self, key: str) -> MeshEntry | None:
        """None: a stock checkpoint does not say how its tensors were placed."""
        self._require(key, self.tensors)
        return None

    def read_value(self, key: str, *, rank: int | None = None) -> Any:
        """One value; tensors inside of it are tensors.

        Raises:
            CheckpointNotFound: no such value; there are none of single ranks.
            LoadError: only executing its pickle could restore it.
        """
        values = self._source.values()
        if rank is None and key in self._source.unreadable:
            raise LoadError(f"{key} cannot be read: {self._source.unreadable[key]}", path=self.directory)
        self._require(key, {} if rank is not None else values)
        return values[key]

    def read_tensor(self, key: str) -> torch.Tensor:
        """One whole tensor on the CPU, put together from all its chunks.

        Raises:
            CheckpointNotFound: no such tensor.
            CorruptCheckpoint: a file is missing or short, a container is damaged, or chunks are missing.
        """
        import torch

        from dcp_ckpt.load.fill import fill
        from dcp_ckpt.load.read_plan import Target

        self._require(key, self.tensors)
        entry = self.tensors[key]
        result = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        target = Target(local=result, box=Box.whole(entry.shape))
        fill(self._source, {key: target}, verify=False, concurrency=_READERS)
        return result

    def fragment(self, rank: int) -> Fragment:
        """There are none.

        Raises:
            LoadError: always.
        """
        raise LoadError("a stock DCP checkpoint has no fragments", rank=rank, path=self.directory)

    def check_structure(self) -> list[LoadError]:
        """Look at the size of every file and the headers of every container; no payload is read.

        Returns:
            Everything that is wrong: one error for each file, tensor or value.
        """
        return self._source.check_structure()

    def _require(self, key: str, existing: Mapping[str, object]) -> None:
        if key not in existing:
            shown = shown_names(sorted(existing), most=10) or "none"
            raise CheckpointNotFound(
                f"no {key!r} in this stock DCP checkpoint; there are: {shown}", path=self.directory
            )
