"""What one save writes of its plan, and where in the arena: all chunks, or those that cannot be shared.

The arena holds the file of settled chunks, then that of fresh ones, which ends with the values. Pure but for
laying the containers' framing into the arena. Made by staging, which keeps the newest: a training that
changes the same tensors each time selects the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from dcp_ckpt.format.fragment import ChunkEntry, FileEntry, layout_digest
from dcp_ckpt.save.arena import Arena
from dcp_ckpt.save.layout import PlacedChunk, lay_again
from dcp_ckpt.save.plan import SavePlan
from dcp_ckpt.save.reuse import Base, Split, StoredChunk, choose_shared

__all__ = ["Selected", "Selection", "Selector"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is written.

    Args:
        numbers: of the plan's chunks that are written, in the order of the arena.
        places: of each, counted from the start of the arena.
        settled_bytes: size of the file at the start of the arena; 0 when there is none.
        has_fresh: whether there is a file of fresh chunks behind it, or of values.
        tensor_bytes: where tensors end in the arena; values follow.
        chunks, digest: the fragment's table of all chunks, and the digest of all its tables.
    """

    numbers: tuple[int, ...]
    places: tuple[PlacedChunk, ...]
    settled_bytes: int
    has_fresh: bool
    tensor_bytes: int
    chunks: list[ChunkEntry]
    digest: str

    def lay_out(self, plan: SavePlan, arena: Arena) -> list[torch.Tensor]:
        """Write framing and gaps into the arena; returns one tensor per written chunk to copy into."""
        views = []
        end = 0
        for number, place in zip(self.numbers, self.places, strict=True):
            framing = place.framing
            arena.write(end, bytes(place.container_offset - end))
            arena.write(place.container_offset, framing.prefix)
            arena.write(place.payload_offset + framing.payload_bytes, framing.suffix)
            views.append(arena.view(place.payload_offset, plan.dtypes[number], place.owned.box.sizes))
            end = place.container_offset + framing.container_bytes
        arena.write(end, bytes(self.tensor_bytes - end))
        return views


@dataclass(frozen=True, kw_only=True)
class Selected:
    """What one save writes and shares.

    Args:
        shared: the files to share, and their keys in the run.
        digests: by number, of the chunks in them.
    """

    selection: Selection
    shared: tuple[tuple[FileEntry, str], ...] = ()
    digests: Mapping[int, str] = field(default_factory=dict)


class Selector:
    """Selects, and keeps the newest selection: equal ones are one object, whose framing the arena has."""

    def __init__(self) -> None:
        self._newest: tuple[object, Selection] | None = None

    def select(
        self, plan: SavePlan, base: Base | None, unchanged: Mapping[int, StoredChunk], *, has_values: bool
    ) -> Selected:
        """Decide about one save.

        Args:
            unchanged: the chunks of the plan that the base has, by their numbers.
            has_values: this rank writes values, too.
        """
        if base is not None and unchanged:
            split = choose_shared(len(plan.chunks), unchanged, [file.size_bytes for file in base.files])
            if split.shared or split.settled:
                return self._beside(plan, base, split, unchanged, has_values=has_values)
        selection = self._kept((plan, has_values), lambda: _all(plan, has_values=has_values))
        return Selected(selection=selection)

    def _beside(
        self,
        plan: SavePlan,
        base: Base,
        split: Split,
        unchanged: Mapping[int, StoredChunk],
        *,
        has_values: bool,
    ) -> Selected:
        """Write what is not in the files that are shared."""
        index = {file: position for position, file in enumerate(split.shared)}
        written = {*split.fresh, *split.settled}
        left_out = {number: stored.entry for number, stored in unchanged.items() if number not in written}
        places = tuple(
            (number, index[entry.file], entry.payload_offset) for number, entry in left_out.items()
        )
        selection = self._kept(
            (plan, has_values, split.fresh, split.settled, places),
            lambda: _part(plan, split, left_out, index, has_values=has_values),
        )
        return Selected(
            selection=selection,
            shared=tuple((base.files[file], base.keys[file]) for file in split.shared),
            digests={number: unchanged[number].digest for number in left_out},
        )

    def _kept(self, key: object, make: Callable[[], Selection]) -> Selection:
        if self._newest is None or self._newest[0] != key:
            self._newest = key, make()
        return self._newest[1]


def _all(plan: SavePlan, *, has_values: bool) -> Selection:
    """Everything, in one file."""
    return Selection(
        numbers=tuple(range(len(plan.chunks))),
        places=plan.layout.chunks,
        settled_bytes=0,
        has_fresh=has_values or bool(plan.chunks),
        tensor_bytes=plan.layout.tensor_bytes,
        chunks=plan.chunks,
        digest=plan.digest,
    )


def _part(
    plan: SavePlan,
    split: Split,
    left_out: Mapping[int, ChunkEntry],
    index: Mapping[int, int],
    *,
    has_values: bool,
) -> Selection:
    """What is fresh and what is settled, each in a file; the other chunks are where the base has them.

    Args:
        index: of the base's files, those that are shared, counted from the first of them.
    """
    settled = lay_again([plan.layout.chunks[number] for number in split.settled])
    fresh = lay_again([plan.layout.chunks[number] for number in split.fresh], start=settled.tensor_bytes)
    has_fresh = has_values or bool(split.fresh)
    num_written = has_fresh + bool(split.settled)
    chunks = list(plan.chunks)
    for number, place in zip(split.settled, settled.chunks, strict=True):
        chunks[number] = _placed(chunks[number], place, file=int(has_fresh), start=0)
    for number, place in zip(split.fresh, fresh.chunks, strict=True):
        chunks[number] = _placed(chunks[number], place, file=0, start=settled.tensor_bytes)
    for number, entry in left_out.items():
        chunks[number] = replace(entry, file=num_written + index[entry.file])
    return Selection(
        numbers=(*split.settled, *split.fresh),
        places=(*settled.chunks, *fresh.chunks),
        settled_bytes=settled.tensor_bytes,
        has_fresh=has_fresh,
        tensor_bytes=fresh.tensor_bytes,
        chunks=chunks,
        digest=layout_digest(plan.meshes, plan.tensors, chunks),
    )


def _placed(chunk: ChunkEntry, place: PlacedChunk, *, file: int, start: int) -> ChunkEntry:
    """The chunk at its place in a file that begins at `start` of the arena."""
    return replace(
        chunk,
        file=file,
        payload_offset=place.payload_offset - start,
        container_offset=place.container_offset - start,
    )
