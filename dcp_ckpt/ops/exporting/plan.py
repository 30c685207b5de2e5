"""What an export holds, under which names and as which dtypes: a pure function of a checkpoint's tables.

Returns a plan with a reason for everything that is left out. Reads no payload. Called by `ops.export`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from dcp_ckpt.errors import StateMismatch
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.ops.exporting.lora import Adapter, Merging, has_adapters, plan_merging
from dcp_ckpt.ops.exporting.request import ExportRequest
from dcp_ckpt.ops.exporting.selection import choose_prefix, select

__all__ = ["Contents", "ExportPlan", "ExportTensor", "ExportValue", "plan_export"]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds, by stored name.

    Args:
        paths: of every tensor and value in the nested state.
        values: the names of those that can be exported at all.
        left_out: values that cannot, with the reason.
        aliases: the further names of tied tensors -> the name that each is stored under.
    """

    tensors: Mapping[str, TensorEntry]
    values: tuple[str, ...]
    paths: Mapping[str, FlatPath]
    left_out: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportTensor:
    """One tensor of the export.

    Args:
        name: in the export.
        path: where it belongs in a nested state.
        stored: its name in the checkpoint.
        dtype: in the export.
        adapter: what is added to it.
    """

    name: str
    path: FlatPath
    stored: str
    stored_dtype: str
    dtype: str
    shape: tuple[int, ...]
    adapter: Adapter | None = None

    @property
    def num_bytes(self) -> int:
        """In the export."""
        return math.prod(self.shape) * dtype_info(self.dtype).item_bytes

    @property
    def stored_tensors(self) -> tuple[str, ...]:
        """The names of the stored tensors that it is made of."""
        return (self.stored, *(self.adapter.tensors if self.adapter else ()))


@dataclass(frozen=True, kw_only=True)
class ExportValue:
    """One value of the export; arguments as those of a tensor."""

    name: str
    path: FlatPath
    stored: str


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything that is exported; tensors by name, numbers in names by size.

    Args:
        prefix: what the names have lost.
        left_out: stored name -> why it is not exported.
        notes: what the user should know.
    """

    tensors: tuple[ExportTensor, ...]
    values: tuple[ExportValue, ...]
    prefix: str
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def converted(self) -> Mapping[tuple[str, str], int]:
        """Stored and exported dtype -> how many tensors are converted."""
        pairs = ((tensor.stored_dtype, tensor.dtype) for tensor in self.tensors)
        return Counter((stored, exported) for stored, exported in pairs if stored != exported)

    @property
    def num_fused(self) -> int:
        """Weights that an adapter is added to."""
        return sum(tensor.adapter is not None for tensor in self.tensors)


def plan_export(contents: Contents, request: ExportRequest) -> ExportPlan:
    """Decide what is exported. Pure.

    Raises:
        StateMismatch: the checkpoint does not fit the request: nothing matches, adapters cannot be fused, or
            two tensors would have one name.
    """
    paths = contents.paths
    selection = select(
        {name: paths[name] for name in contents.tensors},
        {name: paths[name] for name in contents.values},
        request,
    )
    names = _without_repetition(selection.tensors, contents.aliases, request)
    merging = Merging(adapters={}, names={}, consumed={})
    if request.fuse_lora:
        chosen = {name: contents.tensors[name] for name in names}
        shapes = {name: (entry.dtype, tuple(entry.shape)) for name, entry in chosen.items()}
        merging = plan_merging(shapes, request.lora_alpha)
    stored = [name for name in sorted(names, key=_in_order) if name not in merging.consumed]
    prefix = choose_prefix({name: paths[name] for name in contents.tensors}, stored, request)
    tensors = tuple(_tensor(name, contents, request, merging, prefix.text) for name in stored)
    values = tuple(
        ExportValue(name=_without(prefix.text, name), path=_path(name, paths[name], prefix.text), stored=name)
        for name in selection.values
    )
    _refuse_shared_names((*tensors, *values))
    notes = [prefix.note] if prefix.note else []
    if not request.fuse_lora and has_adapters(stored):
        notes.append(
            "there are LoRA adapters, exported as they are: fuse_lora merges them into their weights"
        )
    return ExportPlan(
        tensors=tensors,
        values=values,
        prefix=prefix.text,
        left_out={**selection.left_out, **merging.consumed, **contents.left_out},
        notes=tuple(notes),
    )


def _without_repetition(
    names: Collection[str], aliases: Mapping[str, str], request: ExportRequest
) -> list[str]:
    """Tied tensors under each of their names, as `state_dict()` has them, or once.

    Once where loaders tie them again, and where what is merged into one would be missing from the others.
    """
    if request.format != "safetensors" and not request.fuse_lora:
        return list(names)
    chosen = set(names)
    return [name for name in names if aliases.get(name) not in chosen]


def _in_order(name: str) -> list[tuple[int, str]]:
    """For sorting: layer 2 before layer 10, so that a shard holds layers that follow each other."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", name)]


def _tensor(
    stored: str, contents: Contents, request: ExportRequest, merging: Merging, prefix: str
) -> ExportTensor:
    entry, path = contents.tensors[stored], contents.paths[stored]
    name = merging.names.get(stored, stored)
    if name != stored:
        path = _renamed(path, name)
    is_floating = "float" in entry.dtype
    return ExportTensor(
        name=_without(prefix, name),
        path=_path(name, path, prefix),
        stored=stored,
        stored_dtype=entry.dtype,
        dtype=request.dtype if request.dtype and is_floating else entry.dtype,
        shape=tuple(entry.shape),
        adapter=merging.adapters.get(stored),
    )


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) or name


def _path(name: str, path: FlatPath, prefix: str) -> FlatPath:
    """That of an exported tensor or value; names that have lost their beginning are flat."""
    return (_without(prefix, name),) if prefix else path


def _renamed(path: FlatPath, name: str) -> FlatPath:
    """The path of a merged tensor: all its parts but the last are those of the state around the model."""
    around = ".".join(map(str, path[:-1]))
    return (
        (*path[:-1], name.removeprefix(f"{around}.")) if around and name.startswith(f"{around}.") else (name,)
    )


def _refuse_shared_names(exported: Iterable[ExportTensor | ExportValue]) -> None:
    taken: dict[str, str] = {}
    for one in exported:
        other = taken.setdefault(one.name, one.stored)
        if other != one.stored:
            raise StateMismatch(f"{other} and {one.stored} would both be called {one.name}: exclude one")
