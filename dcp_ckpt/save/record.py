"""What ranks tell each other about one save: rank 0's record, every rank's report, the verdict.

Published as JSON under keys that name the call, never the step or the path, so a repeated step meets no stale
key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dcp_ckpt.format.documents import converted
from dcp_ckpt.format.manifest import FragmentSummary

__all__ = ["Record", "Report", "SaveKeys", "Verdict", "from_message", "from_messages", "to_message"]

_Document = TypeVar("_Document")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Rank 0's decision about one call of `save()`.

    Args:
        step: the step rank 0 saves; a rank that was called with another one fails the save.
        decision: `save`, `skip` (the one before is still under way), `fail` (as `save`, but it cannot succeed
            and nothing is written), or `raise` (an earlier save failed, or this call is refused).
        directory: name of the step directory.
        created_at: RFC 3339 UTC.
        base: the attempt whose files the save may share, if there is one.
        error: fields of a CheckpointError, with `fail` and `raise`.
    """

    step: int
    decision: str
    directory: str = ""
    created_at: str = ""
    base: str = ""
    error: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank's part of one save is durable, or why it is not."""

    summary: FragmentSummary | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of one save, the same on every rank: `committed`, `failed` or `unknown`."""

    outcome: str
    total_bytes: int = 0
    shared_bytes: int = 0
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class SaveKeys:
    """Where the messages of save call number `call` are."""

    call: int

    @property
    def record(self) -> str:
        return f"save/{self.call}/record"

    @property
    def verdict(self) -> str:
        return f"save/{self.call}/verdict"

    def report(self, rank: int) -> str:
        return f"save/{self.call}/report/{rank}"

    def replicas(self, rank: int) -> str:
        """What others compare theirs with; of rank 0, and of the ranks that lead a pipeline stage."""
        return f"save/{self.call}/replicas/{rank}"

    def told_by(self, rank: int) -> list[str]:
        """The keys of this call that a rank publishes, and frees when all have read them."""
        return [self.report(rank), *([self.record, self.verdict] if rank == 0 else [])]


def to_message(document: Record | Report | Verdict) -> dict[str, Any]:
    return asdict(document)


def from_message(kind: type[_Document], message: Any) -> _Document:
    return from_messages(kind, [message])[0]


def from_messages(kind: type[_Document], messages: Sequence[Any]) -> list[_Document]:
    """As `from_message`, of many at once."""
    return [converted(kind, message) for message in messages]
