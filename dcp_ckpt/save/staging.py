"""Staging: copying one state's bytes into the arena, so that training may go on while they are written.

Called on the main thread of every rank, at an optimizer-step boundary. It reads the live state exactly as it
is now; what it returns shares memory with it only in the copies that are left for later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, value_container
from dcp_ckpt.format.fragment import FileEntry, ValueEntry
from dcp_ckpt.format.joining import EQUAL
from dcp_ckpt.save.arena import Arena, arena_bytes
from dcp_ckpt.save.host_copy import copy_to_host
from dcp_ckpt.save.late_copy import LateCopy, LateTensor, can_be_late
from dcp_ckpt.save.layout import SEGMENT_BYTES, round_up
from dcp_ckpt.save.memory import require_memory
from dcp_ckpt.save.payloads import Comparer
from dcp_ckpt.save.plan import LayoutKey, SavePlan, layout_key, make_plan
from dcp_ckpt.save.replicas import ReplicaSet, replica_sets, sample_of
from dcp_ckpt.save.reuse import Base
from dcp_ckpt.save.selection import Selection, Selector
from dcp_ckpt.state.component import Captured, Component, Path
from dcp_ckpt.state.mesh_roles import Holders
from dcp_ckpt.state.placements import local_tensor
from dcp_ckpt.state.tensors import once_each
from dcp_ckpt.writer.messages import FileSource, Payload

__all__ = ["Size", "Staged", "Stager", "capture"]


@dataclass(frozen=True, kw_only=True)
class Staged:
    """One rank's staged state.

    Args:
        plan: its layout.
        selection: what of it is written.
        shared: the files that are not, and their keys in the run.
        payloads: for each chunk, where payloads are digested.
        arena: holds the bytes of the data files that are written, once `rest` has run.
        rest: the copies that are left to do.
        written_bytes: how much of the arena is written; 0 when this rank writes nothing.
        aliases: the other paths of tensors that were found under several.
        values: those that this rank stores, with the place of their containers.
        per_rank: values of this rank.
        equal_values: values by path, encoded, that other ranks have, too.
        samples: by name, of the tensors that other ranks hold, too; without those in `rest`.
        held_by: name -> ranks, of the values and samples that not all ranks have.
    """

    plan: SavePlan
    selection: Selection
    shared: tuple[tuple[FileEntry, str], ...]
    payloads: list[Payload]
    arena: Arena
    rest: LateCopy
    written_bytes: int
    aliases: Mapping[Path, tuple[Path, ...]]
    values: dict[str, ValueEntry]
    per_rank: dict[str, ValueEntry]
    equal_values: Mapping[Path, Any]
    samples: dict[str, bytes]
    held_by: Mapping[str, tuple[int, ...]]

    def replicas(self, late_samples: Mapping[str, bytes]) -> tuple[ReplicaSet, ...]:
        """All that must be equal on several ranks; `late_samples` are those of `rest`."""
        samples, held_by = {**self.samples, **late_samples}, dict(self.held_by)
        # By all its names, so that a key that only one rank has is found.
        for path, others in self.aliases.items():
            name, names = ".".join(path), [".".join(other) for other in others]
            if name in samples:
                samples.update(dict.fromkeys(names, samples[name]))
            if name in held_by:
                held_by.update(dict.fromkeys(names, held_by[name]))
        return replica_sets(self.equal_values, samples, held_by)

    @property
    def indexed_aliases(self) -> dict[str, list[list[str]]]:
        """The other paths of the tensors that this rank indexes, by name."""
        return {
            entry.name: list(map(list, self.aliases[tuple(entry.path)]))
            for entry in self.plan.tensors
            if tuple(entry.path) in self.aliases
        }

    @property
    def files(self) -> list[tuple[FileEntry, FileSource]]:
        """The data files and where they come from; the writer fills in the digests of what is written."""
        settled_bytes = self.selection.settled_bytes
        written = [(self.written_bytes - settled_bytes, settled_bytes)] if self.selection.has_fresh else []
        written += [(settled_bytes, 0)] if settled_bytes else []
        return [
            *(
                (FileEntry(size_bytes=size, block_digests=""), FileSource(arena_offset=offset))
                for size, offset in written
            ),
            *((entry, FileSource(shared_key=key)) for entry, key in self.shared),
        ]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What saving one state takes on one rank.

    Args:
        memory_bytes: beyond what the arena holds already.
        file_bytes: size of the data file when everything is written.
    """

    memory_bytes: int
    file_bytes: int


@dataclass
class _Bound:
    """A plan bound to an arena, which has the framing of a selection."""

    plan: SavePlan
    arena: Arena
    selection: Selection
    views: list[torch.Tensor] = field(default_factory=list)


def capture(components: Sequence[Component]) -> Captured:
    """What all components hold now; tensors sorted by path, each of them once.

    Raises:
        StateError: two leaves have the same path, or one cannot be stored.
    """
    tensors: dict[Path, torch.Tensor] = {}
    values: dict[Path, Any] = {}
    per_rank: dict[Path, Any] = {}
    stock: dict[Path, Any] = {}
    optimizers: list[torch.optim.Optimizer] = []
    step_writes: set[int] = set()
    holders: dict[Path, Holders] = {}
    joins: dict[Path, str] = {}
    for component in components:
        captured = component.capture()
        tensors.update(captured.tensors)
        values.update(captured.values)
        per_rank.update(captured.per_rank)
        stock.update(captured.stock)
        optimizers += captured.optimizers
        step_writes |= captured.step_writes
        holders.update(captured.holders)
        joins.update(captured.joins)
    tensors, aliases = once_each(tensors)
    return Captured(
        tensors=dict(sorted(tensors.items())),
        aliases=aliases,
        values=values,
        per_rank=per_rank,
        stock=stock,
        optimizers=tuple(optimizers),
        step_writes=frozenset(step_writes),
        holders=holders,
        joins=joins,
    )


class Stager:
    """Owns the arena and the plan of one Checkpointer on one rank.

    Args:
        reuse: saves may share files of earlier ones, and digest payloads for later ones.
    """

    def __init__(
        self, *, rank: int, world_size: int, global_ranks: Sequence[int], reuse: bool = False
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._global_ranks = tuple(global_ranks)
        self._reuse = reuse
        self._bound: _Bound | None = None
        self._planned: tuple[LayoutKey, SavePlan] | None = None
        self._positions = {global_rank: position for position, global_rank in enumerate(global_ranks)}
        self._ranks_of: dict[Holders, tuple[int, ...]] = {}
        self._comparer = Comparer()
        self._selector = Selector()

    def measure(self, captured: Captured) -> Size:
        """What `stage` will take for this state. Copies and allocates nothing.

        Raises:
            StateError: the state cannot be stored.
        """
        containers = self._value_containers(captured)
        plan = self._plan(captured)
        values = sum(round_up(len(data), SLAB_ALIGNMENT_BYTES) for data in containers.values())
        fits = self._fits(plan, containers)
        held = 0 if self._bound is None else self._bound.arena.size_bytes
        return Size(
            memory_bytes=0 if fits else max(arena_bytes(self._most_bytes(plan, containers)) - held, 0),
            file_bytes=round_up(plan.layout.tensor_bytes + values, SEGMENT_BYTES),
        )

    # What is made in the inference mode of a caller could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, captured: Captured) -> None:
        """Make plan and arena for this state, so that the first `stage` costs what later ones do.

        The arena must be free. Blocks while its memory is taken; a moment when all is there already.

        Raises:
            StateError: the state cannot be stored.
            StorageFull: no memory for the arena.
        """
        containers = self._value_containers(captured)
        plan = self._plan(captured)
        selected = self._selector.select(plan, None, {}, has_values=bool(containers))
        bound = self._bind(plan, containers, selected.selection)
        bound.arena.pin_for(captured.tensors.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def stage(self, captured: Captured, *, overlap: bool, base: Base | None = None) -> Staged:
        """Copy the captured state into the arena, which must be free. Blocks for the copy.

        Args:
            overlap: leave what only optimizer steps write for `Staged.rest`.
            base: what is unchanged since then is not copied. What is left for `Staged.rest` always is.

        Raises:
            StateError: the state cannot be stored.
            StorageFull: no memory for the arena.
        """
        containers = self._value_containers(captured)
        plan = self._plan(captured)
        live = list(captured.tensors.values())
        locals_ = [local_tensor(tensor) for tensor in live]
        is_late = [
            overlap and id(tensor) in captured.step_writes and can_be_late(local)
            for tensor, local in zip(live, locals_, strict=True)
        ]
        unchanged = {} if base is None else self._comparer.find_unchanged(plan, locals_, is_late, base)
        selected = self._selector.select(plan, base, unchanged, has_values=bool(containers))
        bound = self._bind(plan, containers, selected.selection)
        bound.arena.pin_for(captured.tensors.values())
        rest = self._rest(bound, live, locals_, is_late)
        early = [
            (view, plan.part(number, locals_))
            for view, number in zip(bound.views, bound.selection.numbers, strict=True)
            if not is_late[plan.sources[number][0]]
        ]
        if early:
            copy_to_host(*zip(*early, strict=True))
        sampled = [] if self._world_size == 1 else [i for i in plan.replicas if not is_late[i]]
        values, written_bytes = self._lay_values(captured, bound, containers)
        return Staged(
            plan=plan,
            selection=selected.selection,
            shared=selected.shared,
            payloads=self._payloads(plan, selected.digests),
            arena=bound.arena,
            rest=rest,
            written_bytes=written_bytes,
            aliases=captured.aliases,
            values=values,
            per_rank=_entries(captured.per_rank),
            equal_values=captured.values if self._world_size > 1 else {},
            samples={plan.names[index]: sample_of(locals_[index]) for index in sampled},
            held_by={plan.names[index]: ranks for index, ranks in plan.replicas.items()}
            | {".".join(path): ranks for path, ranks in self._value_ranks(captured).items()},
        )

    def _payloads(self, plan: SavePlan, digests: Mapping[int, str]) -> list[Payload]:
        if not self._reuse:
            return []
        return [
            Payload(dtype=plan.dtype_name(number), digest=digests.get(number, ""))
            for number in range(len(plan.chunks))
        ]

    def _rest(
        self,
        bound: _Bound,
        live: Sequence[torch.Tensor],
        locals_: Sequence[torch.Tensor],
        is_late: Sequence[bool],
    ) -> LateCopy:
        parts: dict[int, list[tuple[tuple[slice, ...] | None, torch.Tensor]]] = {}
        for view, number in zip(bound.views, bound.selection.numbers, strict=True):
            index, part = bound.plan.sources[number]
            parts.setdefault(index, []).append((part, view))
        sampled = frozenset(bound.plan.replicas if self._world_size > 1 else ())
        return LateCopy(
            [
                LateTensor(
                    name=bound.plan.names[index],
                    live=live[index],
                    local=locals_[index],
                    is_sampled=index in sampled,
                    parts=parts.get(index, ()),
                )
                for index, late in enumerate(is_late)
                if late and (index in parts or index in sampled)
            ]
        )

    def close(self) -> None:
        """Release the arena. Idempotent."""
        if self._bound is not None:
            self._bound.views.clear()
            self._bound.arena.close()
            self._bound = None

    def _plan(self, captured: Captured) -> SavePlan:
        """The plan of this layout; the newest one is kept."""
        key = layout_key(captured)
        if self._planned is None or self._planned[0] != key:
            plan = make_plan(
                captured,
                rank=self._rank,
                world_size=self._world_size,
                global_ranks=self._global_ranks,
            )
            _refuse_shared_names(plan, captured)
            self._planned = key, plan
        return self._planned[1]

    def _fits(self, plan: SavePlan, containers: Mapping[Path, bytes]) -> bool:
        """Whether the arena takes this state: it is made anew when layouts change or values outgrow it."""
        bound = self._bound
        return (
            bound is not None
            and bound.plan is plan
            and self._tensor_bytes(plan) + _value_bytes(containers) <= bound.arena.size_bytes
        )

    def _bind(self, plan: SavePlan, containers: Mapping[Path, bytes], selection: Selection) -> _Bound:
        """An arena for this plan, with this selection's framing in it."""
        bound = self._bound
        if bound is not None and self._fits(plan, containers):
            if bound.selection is not selection:
                bound.selection, bound.views = selection, selection.lay_out(plan, bound.arena)
            return bound
        if self._bound is not None:
            # The writer maps it until it gets the next one: both at a time would not fit where one does.
            self._bound.arena.discard()
        self.close()
        size_bytes = self._most_bytes(plan, containers)
        arena = Arena(size_bytes, require=partial(require_memory, rank=self._rank))
        self._bound = _Bound(plan, arena, selection, selection.lay_out(plan, arena))
        return self._bound

    def _tensor_bytes(self, plan: SavePlan) -> int:
        """What tensors may take in the arena; two files end in a part of a page each."""
        return plan.layout.tensor_bytes + (SEGMENT_BYTES if self._reuse else 0)

    def _most_bytes(self, plan: SavePlan, containers: Mapping[Path, bytes]) -> int:
        """The arena to make: values may take twice what they need now.

        They grow (loss histories), and a new arena costs fresh pages.
        """
        return self._tensor_bytes(plan) + 2 * _value_bytes(containers)

    def _value_ranks(self, captured: Captured) -> dict[Path, tuple[int, ...]]:
        """The ranks that hold each of the values which not all ranks hold, in order."""
        found = {}
        for path in captured.values:
            if (held_by := captured.holders.get(path)) is None:
                continue
            if held_by not in self._ranks_of:
                self._ranks_of[held_by] = self._holding(held_by)
            if len(self._ranks_of[held_by]) < self._world_size:
                found[path] = self._ranks_of[held_by]
        return found

    def _holding(self, held_by: Holders) -> tuple[int, ...]:
        """The ranks of the saving group that hold what this rank holds whole, in order."""
        ranks = [rank for (rank,) in held_by.copies((self._global_ranks[self._rank],))]
        outside = [rank for rank in ranks if rank not in self._positions]
        if outside:
            raise StateError(
                f"the mesh of MeshRoles holds rank(s) {outside} outside of the process group that saves"
            )
        return tuple(sorted(self._positions[rank] for rank in ranks))

    def _stored_values(self, captured: Captured) -> dict[Path, ValueEntry]:
        """The values that this rank stores: the lowest of those that hold them does."""
        ranks = self._value_ranks(captured)
        return {
            path: ValueEntry(
                path=list(path), value=value, join=captured.joins.get(path, EQUAL) if path in ranks else None
            )
            for path, value in captured.values.items()
            if self._rank == (ranks[path][0] if path in ranks else 0)
        }

    def _value_containers(self, captured: Captured) -> dict[Path, bytes]:
        """For stock readers, on rank 0: what it stores whole."""
        if self._rank != 0:
            return {}
        return {
            path: value_container(captured.stock[path])
            for path, entry in self._stored_values(captured).items()
            if path in captured.stock and entry.join in (None, EQUAL)
        }

    def _lay_values(
        self, captured: Captured, bound: _Bound, containers: Mapping[Path, bytes]
    ) -> tuple[dict[str, ValueEntry], int]:
        position, start = bound.selection.tensor_bytes, bound.selection.settled_bytes
        entries = self._stored_values(captured)
        for path, data in containers.items():
            bound.arena.write(position, data)
            entries[path] = replace(
                entries[path], container_offset=position - start, container_bytes=len(data)
            )
            gap = -len(data) % SLAB_ALIGNMENT_BYTES
            bound.arena.write(position + len(data), bytes(gap))
            position += len(data) + gap
        end = round_up(position, SEGMENT_BYTES)
        bound.arena.write(position, bytes(end - position))
        return {".".join(path): entry for path, entry in entries.items()}, end


def _value_bytes(containers: Mapping[Path, bytes]) -> int:
    return sum(len(data) + SEGMENT_BYTES for data in containers.values())


def _entries(values: Mapping[Path, Any]) -> dict[str, ValueEntry]:
    return {".".join(path): ValueEntry(path=list(path), value=value) for path, value in values.items()}


def _refuse_shared_names(plan: SavePlan, captured: Captured) -> None:
    taken = set(plan.names)
    others = [path for paths in captured.aliases.values() for path in paths]
    for path in (*others, *captured.values, *captured.per_rank):
        name = ".".join(path)
        if name in taken:
            raise StateError(f"two entries have the same name {name!r}; rename one of them")
        taken.add(name)
