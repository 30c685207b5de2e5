"""Whether the tables of one fragment agree with each other: what no type of a single field can say.

Pure, and quick enough for the tens of thousands of entries of a large model: what many entries have in
common is looked at once. Whoever reads a fragment relies on it: indices lead somewhere, rank lists are as
long as they say, and no chunk's bytes lie outside of its file or inside of another's. Called when a fragment
is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.boxes import Placement, expand_ranks
from dcp_ckpt.format.dtypes import DTYPES, shape_problem

if TYPE_CHECKING:
    from dcp_ckpt.format.fragment import ChunkEntry, Fragment, MeshEntry, TensorEntry

__all__ = ["chunk_problem", "ranks_problem", "tables_problem"]


def tables_problem(fragment: Fragment) -> str | None:
    """What contradicts itself in a fragment's meshes, tensors, chunks and containers; the field is named."""
    return (
        _meshes_problem(fragment.meshes, fragment.world_size)
        or _copies_problem(fragment)
        or _paths_problem(fragment)
        or _tensors_problem(fragment)
        or _aliases_problem(fragment)
        or _chunks_problem(fragment)
        or _containers_problem(fragment)
    )


def ranks_problem(runs: Sequence[Sequence[int]], world_size: int) -> str | None:
    """Why these runs do not list each of some ranks of a world once, or None. Nothing is expanded."""
    for first, count in runs:
        if first + count > world_size:
            return f"[{first}, {count}] is out of range in a world of {world_size}"
    for (first, stop), (later, _) in pairwise(_stretches(runs)):
        if later < stop:
            return f"a rank is repeated: {later} is in the run that begins with {first}, too"
    return None


def _stretches(runs: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Of each run that is not empty: its first rank, and the one behind its last. Ascending."""
    return sorted((first, first + count) for first, count in runs if count > 0)


def _are_among(ranks: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> bool:
    """Whether all ranks of some runs are in other runs, in which no rank is repeated."""
    joined: list[tuple[int, int]] = []
    for first, stop in _stretches(others):
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((first, stop))
    return all(
        any(outer <= first and stop <= end for outer, end in joined) for first, stop in _stretches(ranks)
    )


def chunk_problem(entry: TensorEntry, chunk: ChunkEntry) -> str | None:
    """Why this cannot be a chunk of that tensor, or None."""
    shape, offsets, sizes = entry.shape, chunk.offsets, chunk.sizes
    if len(sizes) != len(shape) or any(
        offset + size > limit for offset, size, limit in zip(offsets, sizes, shape, strict=True)
    ):
        return f"chunk at {offsets} with sizes {sizes} lies outside of {shape}"
    item_bytes = DTYPES[entry.dtype].item_bytes
    num_bytes = prod(sizes) * item_bytes
    if chunk.payload_offset % item_bytes:
        return f"chunk at {offsets}: an element of {entry.dtype} cannot begin at byte {chunk.payload_offset}"
    if chunk.payload_offset + num_bytes > chunk.container_offset + chunk.container_bytes:
        return f"chunk at {offsets}: {num_bytes} bytes of {entry.dtype} do not fit into its container"
    return None


def _meshes_problem(meshes: Sequence[MeshEntry], world_size: int) -> str | None:
    for index, mesh in enumerate(meshes):
        if problem := ranks_problem(mesh.ranks, world_size):
            return f"meshes[{index}].ranks: {problem}"
        num_ranks = sum(count for _, count in mesh.ranks)
        if num_ranks == 0 or prod(mesh.shape) != num_ranks:
            return f"meshes[{index}].shape: {mesh.shape} is not that of {num_ranks} ranks"
    return None


def _copies_problem(fragment: Fragment) -> str | None:
    for index, entry in enumerate(fragment.copies):
        if problem := ranks_problem(entry.ranks, fragment.world_size):
            return f"copies[{index}].ranks: {problem}"
        if fragment.rank not in expand_ranks(entry.ranks):
            return f"copies[{index}].ranks: without rank {fragment.rank} itself"
    return None


def _paths_problem(fragment: Fragment) -> str | None:
    """Everything has a place in the state, whose first part tells which component's it is."""
    for index, tensor in enumerate(fragment.tensors):
        if not tensor.path:
            return f"tensors[{index}].path: it is empty"
    for name, value in fragment.values.items():
        if not value.path:
            return f"values[{name!r:.80}].path: it is empty"
    for name, paths in fragment.aliases.items():
        if [] in paths:
            return f"aliases[{name!r:.80}]: a path is empty"
    return None


def _tensors_problem(fragment: Fragment) -> str | None:
    names: set[str] = set()
    good: set[tuple[object, ...]] = set()
    for index, entry in enumerate(fragment.tensors):
        name = entry.name
        if name in names:
            return f"tensors[{index}].path: {name!r:.80} is there twice"
        names.add(name)
        if problem := shape_problem(entry.dtype, entry.shape):
            return f"tensors[{index}].shape: {problem}"
        layout = (entry.mesh, len(entry.shape), *entry.placements, *map(tuple, entry.owners))
        if layout not in good:
            if problem := _layout_problem(entry, fragment.meshes, fragment.world_size):
                return f"tensors[{index}].{problem}"
            good.add(layout)
    return None


def _aliases_problem(fragment: Fragment) -> str | None:
    names = {entry.name for entry in fragment.tensors}
    taken = {*names, *fragment.values}
    for name, paths in fragment.aliases.items():
        if name not in names:
            return f"aliases[{name!r:.80}]: this fragment describes no such tensor"
        for alias in map(".".join, paths):
            if alias in taken:
                return f"aliases[{name!r:.80}]: {alias!r:.80} is there twice"
            taken.add(alias)
    return None


def _layout_problem(entry: TensorEntry, meshes: Sequence[MeshEntry], world_size: int) -> str | None:
    """Which of the fields `mesh`, `placements` and `owners` cannot be, and why."""
    if problem := ranks_problem(entry.owners, world_size):
        return f"owners: {problem}"
    if entry.mesh is None:
        return "placements: there is no mesh" if entry.placements else None
    if entry.mesh >= len(meshes):
        return f"mesh: {entry.mesh} of {len(meshes)}"
    mesh = meshes[entry.mesh]
    if len(entry.placements) != len(mesh.shape):
        return f"placements: {len(entry.placements)} for a mesh of {len(mesh.shape)} dimensions"
    for text in entry.placements:
        try:
            placement = Placement.parse(text)
        except ConfigError as error:
            return f"placements: {error.message}"
        if placement.dim is not None and placement.dim >= len(entry.shape):
            return f"placements: {text} of a tensor of {len(entry.shape)} dimensions"
    if not _are_among(entry.owners, mesh.ranks):
        return "owners: not all are ranks of its mesh"
    return None


def _chunks_problem(fragment: Fragment) -> str | None:
    sizes_bytes = [file.size_bytes for file in fragment.files]
    for index, chunk in enumerate(fragment.chunks):
        if len(chunk.offsets) != len(chunk.sizes):
            return f"chunks[{index}].offsets: not as many as sizes, in the chunk of {chunk.tensor!r:.80}"
        start, stop = chunk.container_offset, chunk.container_offset + chunk.container_bytes
        if not start <= chunk.payload_offset <= stop:
            return f"chunks[{index}].payload_offset: outside of the container of {chunk.tensor!r:.80}"
        if chunk.file < len(sizes_bytes):
            if stop > sizes_bytes[chunk.file]:
                return f"chunks[{index}].container_bytes: {chunk.tensor!r:.80} lies outside of its file"
        elif prod(chunk.sizes):
            return f"chunks[{index}].file: the chunk of {chunk.tensor!r:.80} is in file {chunk.file}"
    return None


def _containers_problem(fragment: Fragment) -> str | None:
    """Containers do not overlap, whatever is in them."""
    spans = [
        (chunk.file, chunk.container_offset, chunk.container_offset + chunk.container_bytes, chunk.tensor)
        for chunk in fragment.chunks
    ]
    for name, value in fragment.values.items():
        if (value.container_offset is None) != (value.container_bytes is None):
            return f"values[{name!r:.80}]: only one of container_offset and container_bytes is stated"
        if value.container_offset is not None and value.container_bytes is not None:
            spans.append((0, value.container_offset, value.container_offset + value.container_bytes, name))
            if not fragment.files or spans[-1][2] > fragment.files[0].size_bytes:
                return f"values[{name!r:.80}].container_bytes: lies outside of its file"
    spans.sort()
    for before, after in pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            return f"the containers of {before[3]!r:.80} and {after[3]!r:.80} overlap"
    return None
