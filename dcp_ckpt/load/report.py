"""What a load did, for the user and the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dcp_ckpt.load.grouping import grouped

__all__ = ["CastTensor", "LoadReport", "RejectedCheckpoint"]

_MOST_GROUPS = 12


@dataclass(frozen=True, kw_only=True)
class RejectedCheckpoint:
    """A newer checkpoint that was not loaded, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CastTensor:
    """A tensor that was converted while it was read; dtypes by torch's names, without `torch.`."""

    name: str
    stored: str
    live: str


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The outcome of one load, the same on every rank but for bytes and seconds.

    Names are those of the live state. Of a pipelined model, `reinitialised` and `cast` are of this stage.

    Args:
        step: the training step of the checkpoint; training goes on with the next one.
        path: URL or path of its directory.
        epoch: the epoch that saved it; 0 when it has none.
        saved_world_size: the number of ranks that saved; 0 when the checkpoint does not say.
        world_size: the number of ranks that loaded.
        restored: names of tensors and values that were put back, those of single ranks among them.
        reinitialised: name -> reason, of state that the checkpoint has nothing for: it starts anew. `rng` is
            also in `restored` where some random streams go on and others are new.
        cast: tensors that were converted to another dtype, as asked; they are in `restored`, too.
        notes: what else there is to know.
        skipped: names of what stays as it was, since it is not selected or belongs to ranks of another
            world, and of what is stored and nothing in the given state asked for.
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
    reinitialised: Mapping[str, str] = field(default_factory=dict)
    cast: tuple[CastTensor, ...] = ()

    def __str__(self) -> str:
        saved_by = f"{self.saved_world_size} rank(s)" if self.saved_world_size else "stock DCP"
        head = (
            f"loaded step {self.step} ({self.path}), saved by {saved_by}, loaded by {self.world_size}: "
            f"{self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s"
        )
        lines = [*self._doubts(), *_counted("restored", self.restored), *self._differences()]
        return "\n".join([head, *(f"  {line}" for line in lines)])

    @property
    def deviations(self) -> tuple[str, ...]:
        """Lines on all that was not simply restored, as they are printed: empty after an ordinary resume."""
        return (*self._doubts(), *self._differences())

    def _doubts(self) -> list[str]:
        rejected = [f"rejected {rejected.path}: {rejected.reason}" for rejected in self.rejected]
        return [*rejected, *(f"not verified: {what}" for what in self.unverified)]

    def _differences(self) -> list[str]:
        lines = []
        for reason in dict.fromkeys(self.reinitialised.values()):
            names = [name for name, why in self.reinitialised.items() if why == reason]
            lines += _counted("reinitialised", names, why=reason)
        for dtypes in dict.fromkeys((item.stored, item.live) for item in self.cast):
            names = [item.name for item in self.cast if (item.stored, item.live) == dtypes]
            lines += _counted("cast", names, why=f"{dtypes[0]} -> {dtypes[1]}")
        return [*lines, *_counted("skipped", self.skipped), *self.notes]


def _counted(what: str, names: Iterable[str], *, why: str = "") -> list[str]:
    """A line for each top-level part of the state; one for all where these are many."""
    groups = grouped(names, most=_MOST_GROUPS, depth=1)
    counts = [(group.label, len(group.names)) for group in groups]
    if len(counts) > _MOST_GROUPS:
        counts = [("*", sum(count for _, count in counts))]
    end = f" ({why})" if why else ""
    return [f"{label}: {what if count == 1 else f'{count} {what}'}{end}" for label, count in counts]
