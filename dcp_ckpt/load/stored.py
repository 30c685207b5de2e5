"""A committed checkpoint as a load sees it: its tables, read from as few fragments as possible.

Torch-free in what it decides: which fragments hold parts of a box follows from placements and owners alone,
so a rank that resumes on the same layout reads the indexing fragments and its own (docs/format.md, section
5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dcp_ckpt.errors import CorruptCheckpoint, StorageError, StorageNotFound
from dcp_ckpt.format.boxes import Box, Mesh, Placement, expand_ranks, holding_ranks, intersect
from dcp_ckpt.format.consistency import chunk_problem
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.fragment import ChunkEntry, Fragment, TensorEntry, ValueEntry
from dcp_ckpt.format.joining import join_values
from dcp_ckpt.format.manifest import Manifest, decode_listed_fragment
from dcp_ckpt.format.names import MANIFEST, StepDir, data_file_name, fragment_name
from dcp_ckpt.format.stock_metadata import DCP_SAVE_TAG, FlatPath
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.load.source import Origin
from dcp_ckpt.storage.base import ByteRange, Storage
from dcp_ckpt.storage.os_errors import is_no_file

if TYPE_CHECKING:
    from dcp_ckpt.state.component import StoredState

__all__ = ["StoredCheckpoint", "was_removed"]

_CONCURRENT_READS = 8


class StoredCheckpoint:
    """The tables of one committed checkpoint. Local to a rank; reads fragments when they are asked for.

    Args:
        storage: the run, or the parent of the step directory.
        directory: the name of the step directory.
        manifest: decoded and valid.
    """

    has_digests = True

    def __init__(self, storage: Storage, directory: StepDir | str, manifest: Manifest) -> None:
        self.storage = storage
        self.directory = str(directory)
        self.manifest = manifest
        self._fragments: dict[int, Fragment] = {}
        self._meshes: dict[str, Mesh | None] = {}
        self._holders: dict[object, list[int]] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self.aliases: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self._metrics = {name: decode_value(value, path=name) for name, value in manifest.metrics.items()}
        index = expand_ranks(manifest.index)
        self._require(index)
        for rank in index:
            self._add_index(self._fragments[rank])
        self.values = self._joined(index)
        self._stored_by = {name: rank for rank in index for name in self._fragments[rank].values}

    @property
    def flat_paths(self) -> Mapping[str, FlatPath] | None:
        if DCP_SAVE_TAG not in self.manifest.tags:
            return None
        tensors = {name: tuple(entry.path) for name, entry in self.tensors.items()}
        return tensors | {name: tuple(entry.path) for name, entry in self.values.items()}

    @property
    def origin(self) -> Origin:
        return Origin(
            step=self.manifest.step,
            epoch=self.manifest.epoch,
            world_size=self.manifest.world_size,
            metrics=self._metrics,
        )

    def state(self, *, rank: int, world_size: int) -> StoredState:
        import torch

        from dcp_ckpt.state.component import StoredState, StoredTensor
        from dcp_ckpt.state.keying import take_keying

        manifest = self.manifest
        values = self._decoded(self.values, self._stored_by)
        keying = take_keying(values, manifest.world_size)
        return StoredState(
            tensors={
                name: StoredTensor(
                    path=tuple(entry.path), dtype=getattr(torch, entry.dtype), shape=tuple(entry.shape)
                )
                for name, entry in self.tensors.items()
            },
            aliases=self.aliases,
            values=values,
            value_paths={name: tuple(self.values[name].path) for name in values},
            keying=keying,
            per_rank_of=self._per_rank_of,
            step=manifest.step,
            saved_world_size=0 if DCP_SAVE_TAG in manifest.tags else manifest.world_size,
            rank=rank,
            world_size=world_size,
            seed_material=f"{manifest.run_id}/{manifest.attempt}/{manifest.step}",
        )

    def _per_rank_of(self, rank: int) -> Mapping[str, object]:
        values = self.per_rank(rank)
        return self._decoded(values, dict.fromkeys(values, rank))

    def per_rank(self, rank: int) -> Mapping[str, ValueEntry]:
        """The values of one saved rank."""
        self._require([rank])
        return self._fragments[rank].per_rank

    def chunks(self, wanted: Mapping[str, Box]) -> dict[str, list[tuple[int, ChunkEntry]]]:
        """For each tensor: the chunks that intersect the wanted box, with the rank that stored them.

        Reads the fragments it needs, all at once.

        Raises:
            CorruptCheckpoint: a fragment is missing or damaged.
        """
        holders = {name: self.holders(name, box) for name, box in wanted.items() if box.num_elements}
        needed = sorted({rank for ranks in holders.values() for rank in ranks})
        self._require(needed)
        by_name: dict[str, list[tuple[int, ChunkEntry]]] = {name: [] for name in wanted}
        names: dict[str, list[str]] = {}
        for name in wanted:
            names.setdefault(self.aliases.get(name, name), []).append(name)
        for rank in needed:
            for chunk in self._fragments[rank].chunks:
                if chunk.tensor not in names:
                    continue
                if problem := chunk_problem(self.tensors[chunk.tensor], chunk):
                    raise self._damaged(rank, f"{chunk.tensor}: {problem}")
                for name in names[chunk.tensor]:
                    if intersect(chunk.box, wanted[name]):
                        by_name[name].append((rank, chunk))
        return by_name

    def all_fragments(self) -> list[Fragment]:
        """The fragments of all ranks, in rank order."""
        ranks = range(self.manifest.world_size)
        self._require(ranks)
        return [self._fragments[rank] for rank in ranks]

    def holders(self, name: str, box: Box) -> list[int]:
        """The ranks whose fragments may hold chunks of a tensor's box."""
        entry, mesh = self.tensors[name], self._meshes[name]
        if mesh is None:
            return list(expand_ranks(entry.owners))
        # The layers of a model are laid out alike.
        layout = (*entry.shape,), mesh, (*entry.placements,), (*map(tuple, entry.owners),), box
        if layout not in self._holders:
            placements = [Placement.parse(text) for text in entry.placements]
            self._holders[layout] = holding_ranks(entry.shape, mesh, placements, entry.owners, box)
        return self._holders[layout]

    def block_digest(self, rank: int, file: int, block: int) -> str:
        """The stored digest of one block of a data file."""
        return self._fragments[rank].files[file].block_digest(block)

    def file_bytes(self, rank: int, file: int) -> int:
        return self._fragments[rank].files[file].size_bytes

    def file_key(self, rank: int, file: int) -> str:
        """The storage key of a data file; computed, never taken from the checkpoint."""
        return f"{self.directory}/{data_file_name(rank, file, self.manifest.attempt_id)}"

    def file_note(self, rank: int, file: int) -> str:
        return self._fragments[rank].files[file].shared_note

    def _require(self, ranks: Sequence[int]) -> None:
        """Read the fragments of `ranks` that are not here yet, and check them against the manifest."""
        missing = [rank for rank in ranks if rank not in self._fragments]
        if not missing:
            return
        attempt = self.manifest.attempt_id
        keys = [f"{self.directory}/{fragment_name(rank, attempt)}" for rank in missing]
        refs = [self.manifest.fragments[rank] for rank in missing]
        found: dict[int, bytes] = {}
        try:
            self.storage.read_ranges(
                [
                    ByteRange(key=key, offset=0, num_bytes=ref.size_bytes)
                    for key, ref in zip(keys, refs, strict=True)
                ],
                lambda position, data: found.__setitem__(position, bytes(data)),
                concurrency=min(_CONCURRENT_READS, len(keys)),
            )
        except StorageError as error:
            stated = {key: ref.size_bytes for key, ref in zip(keys, refs, strict=True)}
            if damage := self.damage(error, stated):
                raise damage from error
            raise
        for position, (rank, key) in enumerate(zip(missing, keys, strict=True)):
            self._fragments[rank] = decode_listed_fragment(found[position], self.manifest, rank, path=key)

    def damage(self, error: StorageError, stated: Mapping[str, int]) -> CorruptCheckpoint | None:
        """What a failed read says of the checkpoint; None when it says something of the storage only.

        Args:
            stated: the keys that were read, and the sizes that the checkpoint states for them.
        """
        if isinstance(error, StorageNotFound):
            return self._gone(error)
        if is_no_file(error):
            return CorruptCheckpoint(error.message, phase="read", path=error.path)
        for key, size_bytes in stated.items():
            try:
                found_bytes = self.storage.size(key)
            except StorageNotFound as gone:
                return self._gone(gone)
            except StorageError:
                return None
            if found_bytes < size_bytes:
                return CorruptCheckpoint(
                    f"truncated: {found_bytes} of {size_bytes} bytes", phase="read", path=key
                )
        return None

    def _gone(self, error: StorageNotFound) -> CorruptCheckpoint:
        """What a missing file of a committed checkpoint means."""
        if was_removed(self.storage, self.directory):
            return CorruptCheckpoint(
                "the checkpoint was deleted while it was being read", phase="read", path=error.path
            )
        return CorruptCheckpoint("a file of the checkpoint is missing", phase="read", path=error.path)

    def _add_index(self, fragment: Fragment) -> None:
        meshes = [Mesh(tuple(entry.shape), expand_ranks(entry.ranks)) for entry in fragment.meshes]
        for entry in fragment.tensors:
            aliases = [replace(entry, path=path) for path in fragment.aliases.get(entry.name, ())]
            for named in (entry, *aliases):
                if named.name in self.tensors:
                    raise self._damaged(
                        fragment.rank, f"tensor {named.name} is described by another rank, too"
                    )
                self.tensors[named.name] = named
                self._meshes[named.name] = None if entry.mesh is None else meshes[entry.mesh]
            self.aliases.update((alias.name, entry.name) for alias in aliases)

    def _joined(self, ranks: Sequence[int]) -> dict[str, ValueEntry]:
        try:
            return join_values((rank, self._fragments[rank].values) for rank in ranks)
        except CorruptCheckpoint as error:
            error.path = self.directory
            raise

    def _damaged(self, rank: int, problem: str) -> CorruptCheckpoint:
        """What is wrong with the tables of one rank."""
        key = f"{self.directory}/{fragment_name(rank, self.manifest.attempt_id)}"
        return CorruptCheckpoint(
            f"the fragment is inconsistent: {problem}", rank=rank, phase="read", path=key
        )

    def _decoded(self, entries: Mapping[str, ValueEntry], stored_by: Mapping[str, int]) -> dict[str, object]:
        """Values by name; damage names the fragment of the rank that stored the value."""
        found = {}
        for name, entry in entries.items():
            try:
                found[name] = decode_value(entry.value, path=name)
            except CorruptCheckpoint as error:
                raise self._damaged(stored_by[name], error.message) from error
        return found

    def names(self) -> Iterable[str]:
        """All stored names: tensors, then replicated values."""
        return (*self.tensors, *self.values)


def was_removed(storage: Storage, directory: str) -> bool:
    """Whether a committed checkpoint was taken back: its manifest is gone, or a tombstone."""
    key = f"{directory}/{MANIFEST}"
    try:
        return is_tombstone(storage.read(key), path=key)
    except StorageNotFound:
        return True
