"""The seam between an import and the kinds of files that it reads.

Implemented by the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dcp_ckpt.ops.new_state import NewTensor, NewValue

if TYPE_CHECKING:
    import torch

__all__ = ["ImportSource"]


class ImportSource(Protocol):
    """An open source, whose tables are read. Used by one thread; closed by whoever opened it."""

    @property
    def kind(self) -> str:
        """`dcp`, `safetensors` or `torch`."""
        ...

    @property
    def tensors(self) -> Sequence[NewTensor]:
        """All tensors under the names that they have there."""
        ...

    @property
    def values(self) -> Sequence[NewValue]:
        """All values that typed JSON can hold."""
        ...

    @property
    def left_out(self) -> Mapping[str, str]:
        """What cannot be imported, by name, with the reason."""
        ...

    @property
    def unverified(self) -> str:
        """What cannot be checked when it is read; empty where everything is."""
        ...

    def windows(self, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        """The contents of these tensors, in this order, in windows of bounded size.

        Raises:
            CorruptCheckpoint: the source is damaged.
            StorageError: a read failed.
        """
        ...

    def close(self) -> None:
        """Release files. Idempotent."""
        ...
