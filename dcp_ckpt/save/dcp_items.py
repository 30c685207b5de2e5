"""The write items of a DCP plan in the terms of this format: which bytes they are, and where they lie.

Pure but for looking things up in the planner. Knows no storage. Called by `save.dcp_write` and `dcp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from dcp_ckpt.errors import ConfigError, StateError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.containers import value_container
from dcp_ckpt.format.dtypes import dtype_info, dtype_name
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.save.layout import FileLayout, plan_file
from dcp_ckpt.save.placement import OwnedBox, TensorSpec
from dcp_ckpt.state.tree import holds_tensor

__all__ = ["SavedValue", "TensorItem", "divide", "lay_out", "payload_of", "tensor_items", "value_items"]


@dataclass(frozen=True, kw_only=True)
class TensorItem:
    """One chunk that this rank writes."""

    item: WriteItem
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def name(self) -> str:
        return self.item.index.fqn

    @property
    def num_bytes(self) -> int:
        return self.box.num_elements * dtype_info(self.dtype).item_bytes


@dataclass(frozen=True, kw_only=True)
class SavedValue:
    """One value: typed JSON, and its container for stock readers."""

    encoded: Any
    container: bytes


def tensor_items(items: Iterable[WriteItem]) -> list[TensorItem]:
    """The chunks among the items; those without elements are left out, since nothing of them is stored.

    Raises:
        StateError: a tensor that cannot be stored, by name and reason.
    """
    found = []
    for item in items:
        if item.type == WriteItemType.BYTE_IO:
            continue
        name, data = item.index.fqn, item.tensor_data
        if data is None:
            raise StateError(f"{name}: the planner gives no description of the tensor")
        if data.properties.layout != torch.strided:
            raise StateError(f"{name} is a {data.properties.layout} tensor; only dense tensors can be saved")
        dtype = dtype_name(data.properties.dtype)
        try:
            dtype_info(dtype)
        except StateError as error:
            raise StateError(f"{name}: {error.message}") from error
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        if box.num_elements:
            found.append(TensorItem(item=item, dtype=dtype, shape=tuple(data.size), box=box))
    return found


def divide(items: Sequence[TensorItem], num_parts: int) -> list[list[TensorItem]]:
    """Spread the chunks over at most `num_parts` files of nearly equal size; none is empty."""
    parts: list[list[TensorItem]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for item in sorted(items, key=lambda item: -item.num_bytes):
        lightest = loads.index(min(loads))
        parts[lightest].append(item)
        loads[lightest] += max(item.num_bytes, 1)
    return [part for part in parts if part]


def lay_out(items: Sequence[TensorItem]) -> FileLayout:
    """Where each chunk's container lies in a data file; `owned.tensor` is the index of the item."""
    specs = [
        TensorSpec(
            path=(item.name,),
            dtype=item.dtype,
            item_bytes=dtype_info(item.dtype).item_bytes,
            shape=item.shape,
            mesh=None,
            dim_names=(),
            placements=(),
        )
        for item in items
    ]
    owned = [
        OwnedBox(tensor=index, box=item.box, local=Box.whole(item.box.sizes), is_part=False)
        for index, item in enumerate(items)
    ]
    return plan_file(specs, owned)


def payload_of(item: TensorItem, planner: SavePlanner) -> torch.Tensor:
    """The chunk's bytes in row-major order: a one-dimensional uint8 tensor on the CPU.

    Raises:
        StateError: the planner gives something else than it planned.
    """
    tensor = planner.resolve_data(item.item)
    if not isinstance(tensor, torch.Tensor):
        raise StateError(f"{item.name}: the planner gives {type(tensor).__name__} where it planned a tensor")
    found = (dtype_name(tensor.dtype), tuple(tensor.shape))
    if found != (item.dtype, item.box.sizes):
        raise StateError(
            f"{item.name}: the planner gives {found[0]} of shape {list(found[1])} where it planned "
            f"{item.dtype} of shape {list(item.box.sizes)}"
        )
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def value_items(items: Iterable[WriteItem], planner: SavePlanner) -> dict[str, SavedValue]:
    """The values among the items, by name.

    Raises:
        StateError: an object that only pickle can hold, by name.
        ConfigError: the planner does not say which objects it saves.
    """
    values = {}
    for item in items:
        if item.type != WriteItemType.BYTE_IO:
            continue
        lookup = getattr(planner, "lookup_object", None)
        if lookup is None:
            raise ConfigError(
                f"{type(planner).__qualname__} has no lookup_object(), by which values are stored without "
                "pickling them; derive it from DefaultSavePlanner"
            )
        name, value = item.index.fqn, lookup(item.index)
        if holds_tensor(value):
            raise StateError(
                f"{name} is a {type(value).__name__} that holds tensors; use a list or a dictionary, which "
                "DCP stores leaf by leaf"
            )
        values[name] = SavedValue(encoded=encode_value(value, path=name), container=value_container(value))
    return values
