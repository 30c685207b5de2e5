"""What a load asks of a checkpoint, whatever format it is in.

Owns the seam between formats on one side and diff, ranges and filling on the other. Implemented by
`load.stored` (ours) and `load.stock` (stock DCP directories).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from dcp_ckpt.errors import CorruptCheckpoint, StorageError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.fragment import ChunkEntry, TensorEntry
from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.storage.base import Storage

if TYPE_CHECKING:
    from dcp_ckpt.state.component import StoredState

__all__ = ["Origin", "Source", "StridedChunk"]


@dataclass(frozen=True, kw_only=True)
class StridedChunk(ChunkEntry):
    """A chunk that is not stored row by row; `payload_offset` is that of its first element.

    Args:
        strides: one per dimension, in elements.
    """

    strides: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a checkpoint comes from, for the report.

    Args:
        epoch: 0 where there is none.
        world_size: the number of ranks that saved; 0 where nobody knows.
        metrics: decoded.
        unverified: what cannot be checked when it is read.
        notes: what could not be read, or had to be guessed.
    """

    step: int
    epoch: int
    world_size: int
    metrics: Mapping[str, object] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """An open checkpoint. Local to a rank; a data file is named by the rank that saved it and an index."""

    @property
    def storage(self) -> Storage: ...

    @property
    def directory(self) -> str:
        """The checkpoint's directory, below the root of `storage`."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors by name."""
        ...

    @property
    def has_digests(self) -> bool:
        """Whether `block_digest` knows every block; without, ranges need not be whole blocks."""
        ...

    @property
    def flat_paths(self) -> Mapping[str, FlatPath] | None:
        """For a state that DCP flattened: the path of every tensor and value in it; else None."""
        ...

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Stored values that are left out, with the reason; known once `state` was called."""
        ...

    @property
    def origin(self) -> Origin:
        """Known once `state` was called."""
        ...

    def state(self, *, rank: int, world_size: int) -> StoredState:
        """What the components of `rank` may ask for. Reads the values.

        Raises:
            CorruptCheckpoint: something that it needs is missing or damaged.
        """
        ...

    def chunks(self, wanted: Mapping[str, Box]) -> dict[str, list[tuple[int, ChunkEntry]]]:
        """For each tensor: the chunks that intersect the wanted box, with the rank that stored them.

        Raises:
            CorruptCheckpoint: what describes them is missing or damaged.
        """
        ...

    def file_key(self, rank: int, file: int) -> str:
        """The storage key of a data file."""
        ...

    def file_bytes(self, rank: int, file: int) -> int:
        """The size that a data file has to have."""
        ...

    def file_note(self, rank: int, file: int) -> str:
        """To be added to a message about a data file; empty where there is nothing to say."""
        ...

    def block_digest(self, rank: int, file: int, block: int) -> str:
        """The stored digest of one block; only with `has_digests`."""
        ...

    def damage(self, error: StorageError, stated: Mapping[str, int]) -> CorruptCheckpoint | None:
        """What a failed read says of the checkpoint; None when it says something of the storage only.

        Args:
            stated: the keys that were read, and the sizes that the checkpoint states for them.
        """
        ...

    def names(self) -> Iterable[str]:
        """All stored names: tensors, then replicated values."""
        ...
