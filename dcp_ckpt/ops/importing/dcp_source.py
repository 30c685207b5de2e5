"""A checkpoint as a source: a stock DCP directory, or one of ours.

Called by `ops.import_checkpoint` and `ops.average`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.ops.checkpoint import Checkpoint
from dcp_ckpt.ops.new_state import NewTensor, NewValue
from dcp_ckpt.ops.windows import WindowReader, batches

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointSource"]

_LAYOUT_VALUE = "mesh_roles"
"""The places of the ranks that saved (docs/format.md, section 7); what one process writes has one rank."""


class CheckpointSource:
    """All that ranks of a checkpoint had in common.

    Args:
        checkpoint: open; closed with this object.
    """

    kind = "dcp"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tables = checkpoint.source()
        values = {name: entry for name, entry in checkpoint.values.items() if name != _LAYOUT_VALUE}
        self.tensors = [self._tensor(name) for name in checkpoint.tensors]
        self.values = [NewValue(path=tuple(entry.path), encoded=entry.value) for entry in values.values()]
        self.left_out = self._left_out(values)

    @property
    def unverified(self) -> str:
        return self.checkpoint.unverified

    def windows(self, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        names = [self.tensors[number].name for number in numbers]
        reader = WindowReader(self.tables, names)
        for batch in batches(self.tables.tensors[name] for name in names):
            yield from reader.read(batch)

    def close(self) -> None:
        self.checkpoint.close()

    def _tensor(self, name: str) -> NewTensor:
        entry = self.tables.tensors[name]
        others: Sequence[TensorEntry] = [
            self.tables.tensors[other] for other in self.checkpoint.aliases.get(name, ())
        ]
        return NewTensor(
            path=tuple(entry.path),
            dtype=entry.dtype,
            shape=tuple(entry.shape),
            aliases=tuple(tuple(other.path) for other in others),
        )

    def _left_out(self, values: Mapping[str, object]) -> dict[str, str]:
        left_out = dict(self.checkpoint.unreadable)
        for name in self.tables.names():
            if name not in values and name not in self.tables.tensors and name != _LAYOUT_VALUE:
                left_out.setdefault(name, "not a value that stands alone: tensors are inside of it")
        return left_out | dict.fromkeys(self.checkpoint.per_rank_names, "of single ranks")
