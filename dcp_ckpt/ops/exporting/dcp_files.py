"""The files of a stock DCP directory: one with a container for each tensor and value, and `.metadata`.

As one process that calls `dcp.save` would write them. The classes are those of torch 2.13
(`torch/distributed/checkpoint/metadata.py`), imported when they are needed. Called by `ops.export`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, tensor_framing
from dcp_ckpt.format.names import DCP_METADATA
from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.ops.exporting.files import PlannedFile, document, plain_framing
from dcp_ckpt.ops.exporting.plan import ExportPlan

__all__ = ["DCP_DATA_FILE", "dcp_files"]

DCP_DATA_FILE = "__0_0.distcp"


def dcp_files(plan: ExportPlan, values: Mapping[str, Any]) -> list[PlannedFile]:
    """Lay out a state; `.metadata`, without which there is no checkpoint, is the last file.

    Args:
        values: by stored name, as plain Python objects.
    """
    data = _DataFile()
    for tensor in plan.tensors:
        framing = tensor_framing(tensor.dtype, tensor.shape, SLAB_ALIGNMENT_BYTES)
        data.add(tensor.name, framing.prefix, framing.payload_bytes, framing.suffix)
    for value in plan.values:
        data.add(value.name, _container(values[value.stored]))
    pieces = list(map(bytes, data.pieces))
    file = PlannedFile(name=DCP_DATA_FILE, tensors=plan.tensors, framing=lambda: plain_framing(pieces))
    return [file, document(DCP_METADATA, _metadata(plan, data.places))]


class _DataFile:
    """The data file in the making: `pieces` stand around the tensors' bytes."""

    def __init__(self) -> None:
        self.pieces = [bytearray()]
        self.places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def add(self, name: str, prefix: bytes, payload_bytes: int | None = None, suffix: bytes = b"") -> None:
        """One container; without `payload_bytes` it is whole."""
        padding = -self._end % SLAB_ALIGNMENT_BYTES
        num_bytes = len(prefix) + (payload_bytes or 0) + len(suffix)
        self.places[name] = (self._end + padding, num_bytes)
        self._end += padding + num_bytes
        self.pieces[-1] += bytes(padding) + prefix
        if payload_bytes is not None:
            self.pieces.append(bytearray(suffix))


def _container(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _metadata(plan: ExportPlan, places: Mapping[str, tuple[int, int]]) -> bytes:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    paths: dict[str, FlatPath] = {}
    for tensor in plan.tensors:
        offsets, sizes = torch.Size([0] * len(tensor.shape)), torch.Size(tensor.shape)
        entry = TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, tensor.dtype)),
            size=sizes,
            chunks=[ChunkStorageMetadata(offsets=offsets, sizes=sizes)],
        )
        for name, path in ((tensor.name, tensor.path), *tensor.aliases):
            described[name], paths[name] = entry, path
            stored[MetadataIndex(name, offsets, 0)] = _StorageInfo(DCP_DATA_FILE, *places[tensor.name])
    for value in plan.values:
        described[value.name], paths[value.name] = BytesStorageMetadata(), value.path
        stored[MetadataIndex(value.name)] = _StorageInfo(DCP_DATA_FILE, *places[value.name])
    return pickle.dumps(Metadata(state_dict_metadata=described, planner_data=paths, storage_data=stored))
