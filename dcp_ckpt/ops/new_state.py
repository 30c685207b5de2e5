"""A state that no training holds, and the one data file that it becomes: pure, made before any write.

Called by `ops.new_checkpoint`, which writes it, and by those that have such a state: import and average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, value_container
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.references import referenced_names
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.save.layout import SEGMENT_BYTES, FileLayout, plan_file, round_up
from dcp_ckpt.save.placement import OwnedBox, TensorSpec

__all__ = ["NewFile", "NewState", "NewTensor", "NewValue", "plan_new_file"]


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """One tensor to be written.

    Args:
        path: where it belongs in the state; its name is the parts joined by dots.
        dtype: torch's name, without `torch.`.
        aliases: further paths, where it is tied.
    """

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    aliases: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, kw_only=True)
class NewValue:
    """One value to be written; `encoded` is typed JSON."""

    path: tuple[str, ...]
    encoded: Any

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, kw_only=True)
class NewState:
    """Everything that a checkpoint is to hold; names are all different.

    Args:
        metrics: encoded, by name.
        tags: beside the one that says that nobody saved it rank by rank.
    """

    tensors: Sequence[NewTensor]
    values: Sequence[NewValue]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """The one data file, as it will be: tensors in the order of `layout`, then values.

    Args:
        numbers: of the tensors, in the order of their bytes.
        containers: of values, by name, for stock readers; each at its offset in the file.
    """

    numbers: tuple[int, ...]
    layout: FileLayout
    containers: Mapping[str, tuple[int, bytes]]
    size_bytes: int


def plan_new_file(state: NewState) -> NewFile:
    """Lay out all tensors, large ones first, and behind them the values. Pure."""
    stored = [number for number, tensor in enumerate(state.tensors) if Box.whole(tensor.shape).num_elements]
    specs = [
        TensorSpec(
            path=tensor.path,
            dtype=tensor.dtype,
            item_bytes=dtype_info(tensor.dtype).item_bytes,
            shape=tensor.shape,
            mesh=None,
            dim_names=(),
            placements=(),
        )
        for tensor in state.tensors
    ]
    owned = []
    for number in stored:
        box = Box.whole(specs[number].shape)
        owned.append(OwnedBox(tensor=number, box=box, local=box, is_part=False))
    layout = plan_file(specs, owned)
    position = layout.tensor_bytes
    containers: dict[str, tuple[int, bytes]] = {}
    for value in state.values:
        decoded = decode_value(value.encoded, path=value.name)
        # An outline of tensors is not a value that stands alone; stock readers have its leaves.
        if not referenced_names(decoded):
            containers[value.name] = (position, value_container(decoded))
            position = round_up(position + len(containers[value.name][1]), SLAB_ALIGNMENT_BYTES)
    return NewFile(
        numbers=tuple(chunk.owned.tensor for chunk in layout.chunks),
        layout=layout,
        containers=containers,
        size_bytes=round_up(position, SEGMENT_BYTES),
    )
