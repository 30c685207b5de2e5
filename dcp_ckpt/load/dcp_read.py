"""The read items of a DCP plan, served from any checkpoint that this package reads.

Owns the way from DCP's plan to ranges and back into the planner. Knows no process group. Called by
`dcp.Reader`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from dcp_ckpt.errors import LoadError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.containers import value_container
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.format.references import referenced_names
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.load.fill import fill_requests
from dcp_ckpt.load.read_plan import Request, Target
from dcp_ckpt.load.stock import StockSource
from dcp_ckpt.load.stored import StoredCheckpoint

__all__ = ["describe_source", "read_items"]


def describe_source(source: StoredCheckpoint | StockSource) -> Metadata:
    """What DCP's load planner needs to know: tensors, chunks, values and paths. Reads all tables."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in source.tensors}
    for name, box in _stored_boxes(source):
        chunks[name].append(
            ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
        )
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=chunks[name],
        )
        for name, entry in source.tensors.items()
    }
    if isinstance(source, StockSource):
        described |= dict.fromkeys(source.metadata.values, BytesStorageMetadata())
        return Metadata(state_dict_metadata=described, planner_data=dict(source.metadata.paths))
    # A value with tensors inside has no form that a stock planner takes.
    values = [
        name
        for name, entry in source.values.items()
        if not referenced_names(decode_value(entry.value, path=name))
    ]
    described |= dict.fromkeys(values, BytesStorageMetadata())
    paths = {name: tuple(entry.path) for name, entry in source.tensors.items()}
    paths |= {name: tuple(source.values[name].path) for name in values}
    return Metadata(state_dict_metadata=described, planner_data=paths)


def _stored_boxes(source: StoredCheckpoint | StockSource) -> list[tuple[str, Box]]:
    if isinstance(source, StockSource):
        return [
            (name, chunk.box) for name, tensor in source.metadata.tensors.items() for chunk in tensor.chunks
        ]
    names = {name: [name] for name in source.tensors}
    for alias, name in source.aliases.items():
        names[name].append(alias)
    chunks = [chunk for fragment in source.all_fragments() for chunk in fragment.chunks]
    return [(name, chunk.box) for chunk in chunks for name in names[chunk.tensor]]


def read_items(
    source: StoredCheckpoint | StockSource,
    items: Sequence[ReadItem],
    planner: LoadPlanner,
    *,
    concurrency: int,
) -> list[str]:
    """Serve all items of this rank's plan. Blocks; several reads are under way at once.

    Returns:
        Names of the tensors that were cast into targets of another dtype.

    Raises:
        CorruptCheckpoint: a block differs from its digest, a file is missing or too short.
        LoadError: a value can only be restored by executing its pickle.
    """
    tensors = [item for item in items if item.type == LoadItemType.TENSOR]
    boxes = {item.storage_index.fqn: Box.whole(_shape(source, item.storage_index.fqn)) for item in tensors}
    chunks = {
        (name, tuple(chunk.offsets)): (rank, chunk)
        for name, found in source.chunks(boxes).items()
        for rank, chunk in found
    }
    requests: list[Request] = []
    commits: list[tuple[ReadItem, torch.Tensor]] = []
    cast: set[str] = set()
    for item in tensors:
        target = planner.resolve_tensor(item).detach()
        requests.append(_request(item, target, chunks))
        commits.append((item, target))
        if str(target.dtype) != f"torch.{source.tensors[item.storage_index.fqn].dtype}":
            cast.add(item.storage_index.fqn)
    fill_requests(source, requests, verify=True, concurrency=concurrency)
    for item, target in commits:
        planner.commit_tensor(item, target)
    for item in items:
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(_container(source, item.storage_index.fqn)))
    return sorted(cast)


def _shape(source: StoredCheckpoint | StockSource, name: str) -> tuple[int, ...]:
    return tuple(source.tensors[name].shape)


def _request(
    item: ReadItem, target: torch.Tensor, chunks: dict[tuple[str, tuple[int, ...]], tuple[int, ChunkEntry]]
) -> Request:
    index: MetadataIndex = item.storage_index
    offsets = tuple(index.offset) if index.offset is not None else (0,) * len(item.storage_offsets)
    rank, chunk = chunks[index.fqn, offsets]
    start = tuple(a + b for a, b in zip(offsets, item.storage_offsets, strict=True))
    sizes = tuple(item.lengths)
    if tuple(target.shape) != sizes:
        raise LoadError(
            f"{index.fqn}: the planner gives a target of shape {list(target.shape)} for {list(sizes)}",
            phase="read",
        )
    return Request(name=index.fqn, target=Target(local=target, box=Box(start, sizes)), chunks=[(rank, chunk)])


def _container(source: StoredCheckpoint | StockSource, name: str) -> bytes:
    """A container that is safe to load in any way: made here from a decoded value."""
    if isinstance(source, StoredCheckpoint):
        return value_container(decode_value(source.values[name].value, path=name))
    values = source.values()
    if name not in values:
        raise LoadError(f"{name} cannot be read: {source.unreadable[name]}", phase="read")
    buffer = io.BytesIO()
    torch.save(values[name], buffer)
    return buffer.getvalue()
