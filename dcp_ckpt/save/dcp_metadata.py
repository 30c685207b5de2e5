"""`.metadata` for stock DCP readers, derived from the manifest and the fragments of a committed checkpoint.

A function of what is committed: idempotent, may be done at any time by anyone, and never read by this project
(docs/format.md, section 12). The classes are those of torch 2.13
(`torch/distributed/checkpoint/metadata.py`).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

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

from dcp_ckpt.format.fragment import Fragment
from dcp_ckpt.format.manifest import decode_manifest
from dcp_ckpt.format.names import DCP_METADATA, MANIFEST, AttemptId, StepDir, data_file_name
from dcp_ckpt.lifecycle.commit import read_fragments
from dcp_ckpt.storage.base import Storage

__all__ = ["AUTO_MAX_CHUNKS", "build_metadata", "derive_metadata", "write_metadata"]

AUTO_MAX_CHUNKS = 100_000
"""With `dcp_metadata="auto"`, larger checkpoints get no `.metadata`: it would cost more than the save."""


def derive_metadata(storage: Storage, directory: StepDir, *, max_chunks: int | None) -> None:
    """Write `.metadata` of a committed checkpoint. Blocks; one process calls it.

    Args:
        max_chunks: do nothing when there are more; None sets no limit.

    Raises:
        StorageError, LoadError: the checkpoint could not be read, or the file not written.
    """
    key = f"{directory}/{MANIFEST}"
    manifest = decode_manifest(storage.read(key), path=key)
    sizes = [ref.size_bytes for ref in manifest.fragments]
    found = read_fragments(storage, directory, manifest.attempt_id, range(manifest.world_size), sizes)
    fragments = [fragment for fragment, _ in found]
    if max_chunks is None or sum(len(fragment.chunks) for fragment in fragments) <= max_chunks:
        write_metadata(storage, directory, fragments)


def write_metadata(storage: Storage, directory: StepDir, fragments: Sequence[Fragment]) -> None:
    """The same, of a checkpoint whose fragments are known; their digests are not needed."""
    storage.put(f"{directory}/{DCP_METADATA}", pickle.dumps(build_metadata(fragments)))


def build_metadata(fragments: Sequence[Fragment]) -> Metadata:
    """The stock description of one checkpoint."""
    attempt = fragments[0].attempt_id
    tensors: dict[str, TensorStorageMetadata] = {}
    values: dict[str, BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    paths: dict[str, tuple[str, ...]] = {}
    aliases: dict[str, list[str]] = {}
    for fragment in fragments:
        for entry in fragment.tensors:
            tensors[entry.name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
                size=torch.Size(entry.shape),
                chunks=[],
            )
            paths[entry.name] = tuple(entry.path)
            for path in fragment.aliases.get(entry.name, ()):
                aliases.setdefault(entry.name, []).append(".".join(path))
                paths[".".join(path)] = tuple(path)
        for name, value in fragment.values.items():
            if value.container_offset is not None and value.container_bytes is not None:
                values[name] = BytesStorageMetadata()
                paths[name] = tuple(value.path)
                file = data_file_name(fragment.rank, 0, attempt)
                stored[MetadataIndex(name)] = _StorageInfo(
                    file, value.container_offset, value.container_bytes
                )
    for fragment in fragments:
        _add_chunks(fragment, attempt, tensors, stored)
    _add_aliases(aliases, tensors, stored)
    return Metadata(state_dict_metadata={**tensors, **values}, planner_data=paths, storage_data=stored)


def _add_chunks(
    fragment: Fragment,
    attempt: AttemptId,
    tensors: dict[str, TensorStorageMetadata],
    stored: dict[MetadataIndex, _StorageInfo],
) -> None:
    names = [data_file_name(fragment.rank, index, attempt) for index in range(len(fragment.files))]
    for chunk in fragment.chunks:
        offsets = torch.Size(chunk.offsets)
        chunks = tensors[chunk.tensor].chunks
        chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk.sizes)))
        index = MetadataIndex(chunk.tensor, offsets, len(chunks) - 1)
        stored[index] = _StorageInfo(names[chunk.file], chunk.container_offset, chunk.container_bytes)


def _add_aliases(
    aliases: Mapping[str, Sequence[str]],
    tensors: dict[str, TensorStorageMetadata],
    stored: dict[MetadataIndex, _StorageInfo],
) -> None:
    """The other names of a tensor lead to the same bytes; `state_dict()` has tied weights under each."""
    for name, others in aliases.items():
        entry = tensors[name]
        for other in others:
            tensors[other] = entry
            for number, chunk in enumerate(entry.chunks):
                place = stored[MetadataIndex(name, chunk.offsets, number)]
                stored[MetadataIndex(other, chunk.offsets, number)] = place
