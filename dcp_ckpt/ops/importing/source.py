"""The seam between an import and the kinds of files that it reads, and what several of these have in common.

Implemented by the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from dcp_ckpt.ops.new_state import NewTensor, NewValue
from dcp_ckpt.wording import shown_names

if TYPE_CHECKING:
    import torch

__all__ = ["ImportSource", "contradiction"]


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


def contradiction(index: Mapping[str, str], held: Mapping[str, str]) -> str | None:
    """What an index says that its files do not, or the other way round; None when they agree. Pure.

    Args:
        index, held: name of each tensor -> its file.
    """
    missing = sorted(name for name, file in index.items() if held.get(name) != file)
    if missing:
        return f"the index names tensors that are not in their files: {shown_names(missing)}"
    unlisted = sorted(held.keys() - index.keys())
    return f"tensors that the index does not name: {shown_names(unlisted)}" if unlisted else None
