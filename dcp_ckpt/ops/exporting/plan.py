"""What an export holds, under which names and as which dtypes: a pure function of a checkpoint's tables.

Returns a plan with a reason for everything that is left out. Reads no payload. Called by `ops.export`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
        tensors: tied ones under each of their names.
        aliases: a further name of a tied tensor -> the one that it is stored under.
        paths: of every tensor and value in the nested state.
        values: the names of those that can be exported at all.
        left_out: values that cannot, with the reason.
    """

    tensors: Mapping[str, TensorEntry]
    aliases: Mapping[str, str]
    values: tuple[str, ...]
    paths: Mapping[str, FlatPath]
    left_out: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ExportTensor:
    """One tensor of the export.

    Args:
        name: in the export.
        path: where it belongs in a nested state.
        stored: its name in the checkpoint.
        dtype: in the export.
        adapter: what is added to it.
        aliases: its other names and their paths, where it is tied.
    """

    name: str
    path: FlatPath
    stored: str
    stored_dtype: str
    dtype: str
    shape: tuple[int, ...]
    adapter: Adapter | None = None
    aliases: tuple[tuple[str, FlatPath], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, `name` first."""
        return (self.name, *(name for name, _ in self.aliases))

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
    merging = Merging(adapters={}, names={}, consumed={})
    if request.fuse_lora:
        chosen = {name: contents.tensors[name] for name in selection.tensors}
        shapes = {name: (entry.dtype, tuple(entry.shape)) for name, entry in chosen.items()}
        merging = plan_merging(shapes, request.lora_alpha)
    stored = [name for name in sorted(selection.tensors, key=_in_order) if name not in merging.consumed]
    prefix = choose_prefix({name: paths[name] for name in contents.tensors}, stored, request)
    tied = _tied(stored, contents.aliases, merging)
    tensors = tuple(_tensor(names, contents, request, merging, prefix.text) for names in tied)
    values = tuple(
        ExportValue(name=_without(prefix.text, name), path=_path(name, paths[name], prefix.text), stored=name)
        for name in selection.values
    )
    _refuse_shared_names((*tensors, *values))
    notes = [prefix.note] if prefix.note else []
    notes += _untied(stored, contents.aliases, merging)
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


def _in_order(name: str) -> list[tuple[int, str]]:
    """For sorting: layer 2 before layer 10, so that a shard holds layers that follow each other."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", name)]


def _tied(stored: Sequence[str], aliases: Mapping[str, str], merging: Merging) -> list[list[str]]:
    """The names of each tensor, that which it is stored under first."""
    found: dict[tuple[str, bool], list[str]] = {}
    for name in stored:
        # What an adapter is added to is another tensor from then on.
        is_merged = name in merging.adapters
        same = name if is_merged else aliases.get(name, name)
        names = found.setdefault((same, is_merged), [])
        names.insert(0 if name == same else len(names), name)
    return list(found.values())


def _untied(stored: Sequence[str], aliases: Mapping[str, str], merging: Merging) -> list[str]:
    """What to say of tied weights that adapters make different ones."""
    sizes = Counter(aliases.get(name, name) for name in stored)
    return [
        f"{name} is tied to other names, which keep the weight without its adapter: load it untied"
        for name in merging.adapters
        if sizes[aliases.get(name, name)] > 1
    ]


def _tensor(
    names: Sequence[str], contents: Contents, request: ExportRequest, merging: Merging, prefix: str
) -> ExportTensor:
    """A tensor from its names in the checkpoint."""
    stored = names[0]
    entry = contents.tensors[stored]
    is_floating = "float" in entry.dtype
    (name, path), *aliases = (_exported(one, contents.paths[one], merging, prefix) for one in names)
    return ExportTensor(
        name=name,
        path=path,
        stored=stored,
        stored_dtype=entry.dtype,
        dtype=request.dtype if request.dtype and is_floating else entry.dtype,
        shape=tuple(entry.shape),
        adapter=merging.adapters.get(stored),
        aliases=tuple(aliases),
    )


def _exported(stored: str, path: FlatPath, merging: Merging, prefix: str) -> tuple[str, FlatPath]:
    """The name and the path in the export."""
    name = merging.names.get(stored, stored)
    if name != stored:
        path = _renamed(path, name)
    return _without(prefix, name), _path(name, path, prefix)


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
        for name in one.names if isinstance(one, ExportTensor) else (one.name,):
            other = taken.setdefault(name, one.stored)
            if other != one.stored:
                raise StateMismatch(f"{other} and {one.stored} would both be called {name}: exclude one")
