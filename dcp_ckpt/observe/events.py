"""Events: what happened, as frozen values with plain fields, and the protocol of what takes them.

They know no checkpoint and no storage. Made by `dcp_ckpt.save.observer` on rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

__all__ = [
    "Event",
    "EventSink",
    "Loaded",
    "Removed",
    "SaveBegun",
    "SaveDurable",
    "SaveNotCommitted",
    "SaveSkipped",
    "SaveStaged",
    "Scalars",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at a step.

    Args:
        time: by the clock of the host of rank 0, with a time zone.
    """

    kind: ClassVar[str] = "event"

    step: int
    time: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, kw_only=True)
class SaveBegun(Event):
    """`save()` was called and goes ahead."""

    kind: ClassVar[str] = "save begun"


@dataclass(frozen=True, kw_only=True)
class SaveStaged(Event):
    """Rank 0's bytes are in its writer's hands, so many seconds after the call."""

    kind: ClassVar[str] = "save staged"

    seconds: float


@dataclass(frozen=True, kw_only=True)
class SaveDurable(Event):
    """The checkpoint is committed; the numbers are those of `CheckpointInfo`."""

    kind: ClassVar[str] = "save durable"

    path: str
    bytes: int
    shared_bytes: int
    stall_seconds: float
    durable_seconds: float
    world_size: int
    metrics: Mapping[str, Any]

    @property
    def written_bytes(self) -> int:
        return self.bytes - self.shared_bytes


@dataclass(frozen=True, kw_only=True)
class SaveNotCommitted(Event):
    """The save did not become a checkpoint (`failed`), or may have become one (`unknown`)."""

    kind: ClassVar[str] = "save failed"

    outcome: str
    error: str
    message: str


@dataclass(frozen=True, kw_only=True)
class SaveSkipped(Event):
    """The save was left out, because the one before was still under way."""

    kind: ClassVar[str] = "save skipped"


@dataclass(frozen=True, kw_only=True)
class Loaded(Event):
    """The state is that of a checkpoint now; training goes on with the step after it."""

    kind: ClassVar[str] = "load"

    path: str
    seconds: float
    saved_world_size: int
    world_size: int
    num_rejected: int


@dataclass(frozen=True, kw_only=True)
class Removed(Event):
    """Retention took a checkpoint back."""

    kind: ClassVar[str] = "removed"

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Scalars(Event):
    """Numbers of the training itself, such as loss and learning rate."""

    kind: ClassVar[str] = "scalars"

    values: Mapping[str, float]


class EventSink(Protocol):
    """Takes events, on one background thread of rank 0, in the order in which they happened."""

    def handle(self, event: Event) -> None:
        """Take one event. What it raises is logged and harms nothing; while it blocks, events queue up."""

    def close(self) -> None:
        """No event comes any more."""
