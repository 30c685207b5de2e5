"""Who writes what and who reads what, on hundreds of random layouts, without processes.

The production functions decide; bytes go through a storage in memory. What one world stores, all others find.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from dcp_ckpt.format.boxes import Box, Mesh, Placement, compress_ranks, shard_box
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import (
    ChunkEntry,
    FileEntry,
    Fragment,
    MeshEntry,
    TensorEntry,
    decode_fragment,
    encode_fragment,
    layout_digest,
)
from dcp_ckpt.format.manifest import FragmentSummary, build_manifest, summarize
from dcp_ckpt.format.names import AttemptId, data_file_name, fragment_name
from dcp_ckpt.lifecycle.commit import check_layouts, check_summaries
from dcp_ckpt.load.fill import fill
from dcp_ckpt.load.read_plan import Target
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.save.layout import SEGMENT_BYTES, plan_file
from dcp_ckpt.save.placement import TensorSpec, assign_owners
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.storage.metered import MeteredStorage

ATTEMPT = AttemptId(1, 1)
DIRECTORY = "step-00000001"
DTYPES = {"uint8": 1, "bfloat16": 2, "float32": 4, "complex128": 16}


def name_of(spec: TensorSpec) -> str:
    return ".".join(spec.path)


def spec(
    name: str, shape: Sequence[int], dtype: str, world: int, mesh_shape: Sequence[int], placed: str
) -> TensorSpec:
    """A tensor on all ranks of a world; `placed` such as "R S0", or "" for one without a mesh."""
    mesh = Mesh(tuple(mesh_shape), tuple(range(world))) if placed else None
    return TensorSpec(
        path=(name,),
        dtype=dtype,
        item_bytes=DTYPES[dtype],
        shape=tuple(shape),
        mesh=mesh,
        dim_names=(),
        placements=tuple(Placement.parse(text) for text in placed.split()),
    )


def box_of(spec: TensorSpec, rank: int) -> Box:
    if spec.mesh is None:
        return Box.whole(spec.shape)
    coordinate = spec.mesh.coordinate(rank)
    assert coordinate is not None
    return shard_box(spec.shape, spec.mesh.shape, spec.placements, coordinate)


def part(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]


def content(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    count = torch.Size(spec.shape).numel() * spec.item_bytes
    data = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return data.view(getattr(torch, spec.dtype)).reshape(spec.shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@dataclass
class Simulated:
    """One saved world: its fragments, and a storage that holds them."""

    storage: MeteredStorage
    fragments: list[Fragment]
    summaries: list[FragmentSummary]

    def open(self) -> StoredCheckpoint:
        return StoredCheckpoint(self.storage, DIRECTORY, build_manifest(self.summaries))

    @property
    def data_bytes(self) -> int:
        return sum(file.size_bytes for fragment in self.fragments for file in fragment.files)


def save(specs: Sequence[TensorSpec], wholes: Sequence[torch.Tensor], world: int) -> Simulated:
    """What `world` ranks write, each on its own, as staging and the writer do."""
    storage = MeteredStorage(MemoryStorage())
    fragments, summaries = [], []
    for rank in range(world):
        ownership = assign_owners(specs, rank=rank, world_size=world)
        layout = plan_file(specs, ownership.owned)
        file = bytearray(layout.tensor_bytes)
        chunks = []
        for chunk in layout.chunks:
            held = part(wholes[chunk.owned.tensor], box_of(specs[chunk.owned.tensor], rank))
            payload = raw(part(held, chunk.owned.local))
            assert not any(file[chunk.payload_offset : chunk.payload_offset + len(payload)]), "written once"
            file[chunk.payload_offset : chunk.payload_offset + len(payload)] = payload
            chunks.append(
                ChunkEntry(
                    tensor=name_of(specs[chunk.owned.tensor]),
                    offsets=list(chunk.owned.box.offsets),
                    sizes=list(chunk.owned.box.sizes),
                    file=0,
                    payload_offset=chunk.payload_offset,
                    container_offset=chunk.container_offset,
                    container_bytes=chunk.framing.container_bytes,
                )
            )
        assert len(file) % SEGMENT_BYTES == 0
        fragment = fragment_of(rank, world, specs, ownership.owners, chunks, bytes(file))
        data = encode_fragment(fragment)
        storage.put(f"{DIRECTORY}/{fragment_name(rank, ATTEMPT)}", data)
        if file:
            storage.put(f"{DIRECTORY}/{data_file_name(rank, 0, ATTEMPT)}", bytes(file))
        fragments.append(decode_fragment(data, path="memory"))
        summaries.append(summarize(fragment, data))
    return Simulated(storage, fragments, summaries)


def fragment_of(
    rank: int,
    world: int,
    specs: Sequence[TensorSpec],
    owners: Sequence[tuple[int, ...]],
    chunks: list[ChunkEntry],
    file: bytes,
) -> Fragment:
    meshes, tensors = [], []
    for spec, ranks in zip(specs, owners, strict=True):
        if rank != 0:
            break
        if spec.mesh is not None:
            meshes.append(
                MeshEntry(shape=list(spec.mesh.shape), ranks=compress_ranks(spec.mesh.ranks), dim_names=[])
            )
        tensors.append(
            TensorEntry(
                path=list(spec.path),
                dtype=spec.dtype,
                shape=list(spec.shape),
                mesh=None if spec.mesh is None else len(meshes) - 1,
                placements=[str(placement) for placement in spec.placements],
                owners=compress_ranks(ranks),
            )
        )
    digests = "".join(digest(file[at : at + BLOCK_BYTES]) for at in range(0, len(file), BLOCK_BYTES))
    return Fragment(
        run_id="0" * 32,
        epoch=1,
        epoch_id="1" * 32,
        attempt=str(ATTEMPT),
        step=1,
        rank=rank,
        world_size=world,
        files=[FileEntry(size_bytes=len(file), block_digests=digests)] if file else [],
        meshes=meshes,
        tensors=tensors,
        chunks=chunks,
        layout=layout_digest(meshes, tensors, chunks),
        values={},
        per_rank={},
        replicated=digest(b""),
        created_at="2026-01-01T00:00:00.000000Z" if rank == 0 else None,
        metrics={},
        tags=[],
    )


def load(saved: Simulated, specs: Sequence[TensorSpec], wholes: Sequence[torch.Tensor], rank: int) -> int:
    """What one rank of another world reads; checks every byte, returns how many were read."""
    targets = {}
    for spec in specs:
        box = box_of(spec, rank)
        local = torch.empty(box.sizes, dtype=getattr(torch, spec.dtype))
        targets[name_of(spec)] = Target(local=local, box=box)
    num_bytes = fill(saved.open(), targets, verify=True, concurrency=1)
    for spec, whole in zip(specs, wholes, strict=True):
        target = targets[name_of(spec)]
        assert raw(target.local) == raw(part(whole, target.box)), name_of(spec)
    return num_bytes


def random_mesh(rng: random.Random, world: int) -> tuple[int, ...]:
    """One to three dimensions."""

    def divisor(number: int) -> int:
        return rng.choice([n for n in range(1, number + 1) if number % n == 0])

    outer = divisor(world)
    middle = divisor(world // outer)
    return rng.choice([(world,), (outer, world // outer), (outer, middle, world // outer // middle)])


def random_placement(rng: random.Random, num_dims: int, mesh_shape: Sequence[int]) -> str:
    """Any mix of replicated and sharded; now and then FSDP over TP, which splits the same dimension again."""
    if not num_dims:
        return rng.choice(["", " ".join("R" for _ in mesh_shape)])
    choices = ["R", *(f"S{dim}" for dim in range(num_dims))]
    found = [rng.choice(choices) for _ in mesh_shape]
    if rng.random() < 0.3:
        for index in (i for i in reversed(range(len(found))) if found[i] != "R"):
            later = zip(found[index + 1 :], mesh_shape[index + 1 :], strict=True)
            factor = math.prod(size for other, size in later if other.partition("/")[0] == found[index])
            if factor > 1 and rng.random() < 0.8:
                found[index] += f"/{factor}"
    return rng.choice(["", " ".join(found)])


def random_specs(
    rng: random.Random, tensors: Sequence[tuple[str, Sequence[int], str]], world: int
) -> list[TensorSpec]:
    specs = []
    for name, shape, dtype in tensors:
        mesh_shape = random_mesh(rng, world)
        specs.append(
            spec(name, shape, dtype, world, mesh_shape, random_placement(rng, len(shape), mesh_shape))
        )
    return specs


def random_tensors(rng: random.Random) -> list[tuple[str, tuple[int, ...], str]]:
    tensors = []
    for number in range(rng.randint(1, 6)):
        shape = tuple(rng.choice([0, 1, 2, 3, 5, 7, 16, 33]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3])))
        tensors.append((f"t{number}", shape, rng.choice(list(DTYPES))))
    return sorted(tensors)


@pytest.mark.parametrize("first_seed", range(0, 200, 20))
def test_random_layouts_tile_and_every_byte_arrives_on_another_world(first_seed):
    for seed in range(first_seed, first_seed + 20):
        try:
            check_random_worlds(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def check_random_worlds(seed: int) -> None:
    rng = random.Random(seed)
    tensors = random_tensors(rng)
    saved_world, loaded_world = rng.randint(1, 12), rng.randint(1, 12)
    specs = random_specs(rng, tensors, saved_world)
    generator = torch.Generator().manual_seed(seed)
    wholes = [content(spec, generator) for spec in specs]
    saved = save(specs, wholes, saved_world)
    assert check_summaries(saved.summaries) is None
    assert check_layouts(saved.fragments) is None
    targets = random_specs(rng, tensors, loaded_world)
    for rank in range(loaded_world):
        assert load(saved, targets, wholes, rank) <= saved.data_bytes, "no block is read twice"


def test_missing_and_doubled_chunks_are_found():
    specs = [spec("t", (12, 3), "float32", 4, (4,), "S0")]
    saved = save(specs, [content(specs[0], torch.Generator())], 4)
    first, second, *rest = saved.fragments
    assert check_layouts(saved.fragments) is None
    assert "27 of 36 elements" in str(check_layouts([first, *rest]))
    doubled = second.chunks[0]
    rest[0].chunks[0] = doubled
    assert "overlap" in str(check_layouts([first, second, *rest]))


MIB_ROWS = 1 << 8
"""Rows of 4 KiB in a MiB."""


@pytest.mark.parametrize(("saved_world", "loaded_world"), [(4, 4), (4, 3), (2, 4), (4, 1)])
def test_reshard_by_rows_reads_little_more_than_it_needs(saved_world, loaded_world):
    shape = (32 * MIB_ROWS, 1024)
    specs = [spec("t", shape, "float32", saved_world, (saved_world,), "S0")]
    wholes = [content(specs[0], torch.Generator().manual_seed(1))]
    saved = save(specs, wholes, saved_world)
    targets = [spec("t", shape, "float32", loaded_world, (loaded_world,), "S0")]
    before = saved.storage.count("read_ranges").num_bytes
    total = sum(load(saved, targets, wholes, rank) for rank in range(loaded_world))
    # At most one more block at each end of a range (docs/format.md, section 4).
    num_ranges = saved_world + loaded_world
    assert total <= wholes[0].nbytes + 2 * num_ranges * BLOCK_BYTES
    if saved_world == loaded_world:
        assert total <= 1.05 * wholes[0].nbytes
    metered = saved.storage.count("read_ranges").num_bytes - before
    assert total <= metered <= total + 100_000, "what is reported was read; the tables are small"


def test_columns_of_a_large_chunk_arrive_though_its_rows_are_read_in_groups():
    shape = (20, 1 << 20)  # more than the 16 MiB that one group of rows may take
    whole = spec("t", shape, "uint8", 1, (1,), "")
    wholes = [content(whole, torch.Generator().manual_seed(2))]
    saved = save([whole], wholes, 1)
    for rank in range(2):
        load(saved, [spec("t", shape, "uint8", 2, (2,), "S1")], wholes, rank)


def test_replica_groups_share_large_tensors_evenly():
    specs = [spec("t", (64 * MIB_ROWS, 1024), "uint8", 4, (4,), "R")]
    sizes = [
        plan_file(specs, assign_owners(specs, rank=rank, world_size=4).owned).tensor_bytes
        for rank in range(4)
    ]
    assert max(sizes) < 1.01 * min(sizes)
