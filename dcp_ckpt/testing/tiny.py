"""A tiny checkpoint, made by hand from the format alone: committed, valid, the same bytes each time.

For tests of everything that reads: no torch, no trainer, no writer process. Its data files are readable for
stock DCP readers like any other. Knows the format, and no code that saves.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcp_ckpt.format.boxes import Box, Placement, compress_ranks, shard_box
from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, tensor_framing, value_container
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import (
    ChunkEntry,
    FileEntry,
    Fragment,
    MeshEntry,
    TensorEntry,
    ValueEntry,
    encode_fragment,
    layout_digest,
)
from dcp_ckpt.format.manifest import Manifest, build_manifest, encode_manifest, summarize
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, data_file_name, fragment_name
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.storage.base import Storage

__all__ = ["TINY_RUN_ID", "tiny_weight", "write_tiny_checkpoint"]

TINY_RUN_ID = "0123456789abcdef0123456789abcdef"

_SEGMENT_BYTES = 4096
_LARGE_BYTES = 256 << 10
_BIAS = (0.5, -1.0, 2.0)
_COUNT = struct.pack("<q", 7)
_VALUES: dict[str, Any] = {"betas": (0.9, 0.999), "lr": 0.001, "schedule": {"epoch": 2, "warm": True}}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What all ranks of one checkpoint have in common."""

    world_size: int
    shape: tuple[int, int]
    shard_dim: int
    run_id: str
    attempt: AttemptId
    step: int
    created_at: str
    metrics: dict[str, Any]
    tags: list[str]


@dataclass(kw_only=True)
class _DataFile:
    """One rank's data file in the making."""

    data: bytearray = field(default_factory=bytearray)
    chunks: list[ChunkEntry] = field(default_factory=list)

    def add_chunk(self, tensor: str, dtype: str, box: Box, payload: bytes) -> None:
        large = len(payload) >= _LARGE_BYTES
        framing = tensor_framing(dtype, box.sizes, _SEGMENT_BYTES if large else SLAB_ALIGNMENT_BYTES)
        if large:
            self.pad(_SEGMENT_BYTES)
        container_offset = self.add_container(framing.prefix + payload + framing.suffix)
        if large:
            self.pad(_SEGMENT_BYTES)
        self.chunks.append(
            ChunkEntry(
                tensor=tensor,
                offsets=list(box.offsets),
                sizes=list(box.sizes),
                file=0,
                payload_offset=container_offset + len(framing.prefix),
                container_offset=container_offset,
                container_bytes=framing.container_bytes,
            )
        )

    def add_container(self, container: bytes) -> int:
        self.pad(SLAB_ALIGNMENT_BYTES)
        offset = len(self.data)
        self.data += container
        return offset

    def pad(self, alignment: int) -> None:
        self.data += bytes(-len(self.data) % alignment)

    def entry(self) -> FileEntry:
        blocks = range(0, len(self.data), BLOCK_BYTES)
        digests = [digest(self.data[start : start + BLOCK_BYTES]) for start in blocks]
        return FileEntry(size_bytes=len(self.data), block_digests="".join(digests))


def write_tiny_checkpoint(
    storage: Storage,
    *,
    step: int,
    ranks: int = 2,
    epoch: int = 1,
    save: int = 1,
    shape: tuple[int, int] = (6, 4),
    shard_dim: int = 0,
    run_id: str = TINY_RUN_ID,
    created_at: str = "2026-01-01T00:00:00.000000Z",
    metrics: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    directory: StepDir | None = None,
    commit: bool = True,
) -> Manifest:
    """Write one checkpoint into the run at the root of `storage`.

    It holds `model.weight` (float32, `shape`, sharded over all ranks, filled as `tiny_weight` tells),
    `model.bias` (bfloat16, 3 elements, replicated), `model.count` (int64, 0-dim, replicated), `model.empty`
    (float32, no elements), the values `optim.betas`, `optim.lr` and `optim.schedule`, and for each rank
    `rng.seed`, its rank.

    Args:
        shard_dim: the dimension of `model.weight` that is sharded.
        metrics: plain numbers by name.
        directory: where to put it; by default the plain name of the step.
        commit: publish the manifest; without it everything else is written.

    Returns:
        The manifest, published or not.

    Raises:
        StorageExists: the step is there already.
    """
    attempt = AttemptId(epoch, save)
    plan = _Plan(
        world_size=ranks,
        shape=shape,
        shard_dim=shard_dim,
        run_id=run_id,
        attempt=attempt,
        step=step,
        created_at=created_at,
        metrics={name: encode_value(value, path=name) for name, value in (metrics or {}).items()},
        tags=list(tags),
    )
    target = directory or StepDir(step)
    storage.make_directory(str(target))
    summaries = []
    for rank in range(ranks):
        file = _DataFile()
        _add_tensors(file, plan, rank)
        values = _add_values(file) if rank == 0 else {}
        if file.data:
            _write_file(storage, f"{target}/{data_file_name(rank, 0, attempt)}", bytes(file.data))
        fragment = _fragment(file, values, plan, rank)
        data = encode_fragment(fragment)
        storage.create_exclusive(f"{target}/{fragment_name(rank, attempt)}", data)
        summaries.append(summarize(fragment, data))
    manifest = build_manifest(summaries)
    if commit:
        storage.create_exclusive(f"{target}/{MANIFEST}", encode_manifest(manifest))
    return manifest


def tiny_weight(shape: tuple[int, int], box: Box | None = None) -> bytes:
    """The float32 bytes of `model.weight`, or of one box of it: element (i, j) is `i * columns + j`."""
    rows, columns = shape
    whole = box or Box.whole((rows, columns))
    numbers = [
        float(i * columns + j)
        for i in range(whole.offsets[0], whole.offsets[0] + whole.sizes[0])
        for j in range(whole.offsets[1], whole.offsets[1] + whole.sizes[1])
    ]
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _add_tensors(file: _DataFile, plan: _Plan, rank: int) -> None:
    box = shard_box(plan.shape, (plan.world_size,), (Placement(plan.shard_dim),), (rank,))
    if box.num_elements:
        file.add_chunk("model.weight", "float32", box, tiny_weight(plan.shape, box))
    # What every rank holds is stored once, by different ranks.
    if rank == 0:
        file.add_chunk("model.bias", "bfloat16", Box.whole((len(_BIAS),)), _bias())
        file.add_chunk("model.empty", "float32", Box.whole((0, 2)), b"")
    if rank == plan.world_size - 1:
        file.add_chunk("model.count", "int64", Box.whole(()), _COUNT)
    file.pad(_SEGMENT_BYTES)


def _bias() -> bytes:
    # bfloat16 is the upper half of a float32.
    return b"".join(struct.pack("<f", number)[2:] for number in _BIAS)


def _add_values(file: _DataFile) -> dict[str, ValueEntry]:
    entries = {}
    for name, value in _VALUES.items():
        container = value_container(value)
        entries[f"optim.{name}"] = ValueEntry(
            path=["optim", name],
            value=encode_value(value, path=name),
            container_offset=file.add_container(container),
            container_bytes=len(container),
        )
    file.pad(_SEGMENT_BYTES)
    return entries


def _tensors(plan: _Plan) -> list[TensorEntry]:
    weight = TensorEntry(
        path=["model", "weight"],
        dtype="float32",
        shape=list(plan.shape),
        mesh=0,
        placements=[str(Placement(plan.shard_dim))],
        owners=compress_ranks(range(plan.world_size)),
    )
    replicated: tuple[tuple[str, str, list[int], int], ...] = (
        ("bias", "bfloat16", [len(_BIAS)], 0),
        ("count", "int64", [], plan.world_size - 1),
        ("empty", "float32", [0, 2], 0),
    )
    return [weight] + [
        TensorEntry(
            path=["model", name],
            dtype=dtype,
            shape=sizes,
            mesh=None,
            placements=[],
            owners=[[owner, 1]],
        )
        for name, dtype, sizes, owner in replicated
    ]


def _fragment(file: _DataFile, values: dict[str, ValueEntry], plan: _Plan, rank: int) -> Fragment:
    first = rank == 0
    everyone = compress_ranks(range(plan.world_size))
    meshes = [MeshEntry(shape=[plan.world_size], ranks=everyone, dim_names=["dp"])] if first else []
    tensors = _tensors(plan) if first else []
    return Fragment(
        run_id=plan.run_id,
        epoch=plan.attempt.epoch,
        epoch_id=digest(f"epoch {plan.attempt.epoch}".encode()),
        attempt=str(plan.attempt),
        step=plan.step,
        rank=rank,
        world_size=plan.world_size,
        files=[file.entry()] if file.data else [],
        meshes=meshes,
        tensors=tensors,
        chunks=file.chunks,
        layout=layout_digest(meshes, tensors, file.chunks),
        values=values,
        per_rank={"rng.seed": ValueEntry(path=["rng", "seed"], value=rank)},
        replicated=_replicated_digest(),
        created_at=plan.created_at if first else None,
        metrics=plan.metrics if first else {},
        tags=plan.tags if first else [],
    )


def _replicated_digest() -> str:
    """What all ranks agree on; the tensors without a mesh are the same few bytes each time."""
    tensors: tuple[tuple[str, str, list[int], bytes], ...] = (
        ("model.bias", "bfloat16", [len(_BIAS)], _bias()),
        ("model.count", "int64", [], _COUNT),
        ("model.empty", "float32", [0, 2], b""),
    )
    digests = {name: digest(encode_json([dtype, shape]) + data) for name, dtype, shape, data in tensors}
    for name, value in _VALUES.items():
        digests[f"optim.{name}"] = digest(encode_json(encode_value(value, path=name)))
    return digest(encode_json(digests))


def _write_file(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.open_writer(key, size_bytes=len(data), direct=False)
    try:
        writer.write_segment(0, memoryview(data))
        writer.finish()
    except BaseException:
        writer.abort()
        raise
