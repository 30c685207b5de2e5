"""What a load did, for the user and the log."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LoadReport", "RejectedCheckpoint"]


@dataclass(frozen=True, kw_only=True)
class RejectedCheckpoint:
    """A newer checkpoint that was not loaded, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The outcome of one load, the same on every rank but for bytes and seconds.

    Args:
        step: the training step of the checkpoint; training goes on with the next one.
        path: URL or path of its directory.
        epoch: the epoch that saved it; 0 when it has none.
        saved_world_size: the number of ranks that saved; 0 when the checkpoint does not say.
        world_size: the number of ranks that loaded.
        restored: names of tensors and values that were put back.
        notes: what was reinitialised or derived instead of restored.
        skipped: stored names that nothing in the given state asked for.
        rejected: newer checkpoints that could not be used.
        metrics: as given to `save()`, decoded.
        bytes_read: from storage, by this rank.
        seconds: wall time of the load on this rank.
        unverified: what could not be checked, or was not asked to be.
    """

    step: int
    path: str
    epoch: int
    saved_world_size: int
    world_size: int
    restored: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: tuple[str, ...]
    rejected: tuple[RejectedCheckpoint, ...]
    metrics: dict[str, object]
    bytes_read: int
    seconds: float
    unverified: tuple[str, ...] = ()

    def __str__(self) -> str:
        saved_by = f"{self.saved_world_size} rank(s)" if self.saved_world_size else "stock DCP"
        lines = [
            f"resumed from step {self.step} ({self.path}), saved by {saved_by}, "
            f"loaded by {self.world_size}: {len(self.restored)} entries, "
            f"{self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s"
        ]
        lines += [f"  rejected {rejected.path}: {rejected.reason}" for rejected in self.rejected]
        lines += [f"  not verified: {what}" for what in self.unverified]
        lines += [f"  {note}" for note in self.notes]
        if self.skipped:
            lines.append(f"  {len(self.skipped)} stored entries were not asked for: {self.skipped[0]}, ...")
        return "\n".join(lines)
