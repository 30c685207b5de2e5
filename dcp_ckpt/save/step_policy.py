"""Which steps may be saved, and where each one goes: rank 0's rules, without effects.

Called by the saver for each call of `save()`, and told by the session what was loaded and committed.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcp_ckpt.errors import CheckpointError, StepAlreadySaved
from dcp_ckpt.format.names import StepDir

__all__ = ["StepPolicy"]


@dataclass
class StepPolicy:
    """Rank 0's knowledge of which step goes where. Used on rank 0's main thread only.

    Args:
        floor: steps must be greater: the newest step of the run until one was resumed from, then that one,
            then the last one committed.
        taken: step directories that stood there when the epoch was claimed.
        resumed: whether a checkpoint of the run was loaded in this epoch.
        has_saved: whether this epoch committed anything.
    """

    epoch: int
    floor: int
    taken: frozenset[StepDir]
    resumed: bool = False
    has_saved: bool = False

    def refuse(self, step: int, *, in_flight: int | None) -> CheckpointError | None:
        """Why a step cannot be saved; `in_flight` is that of the save that has no outcome yet."""
        floor = self.floor if in_flight is None else max(self.floor, in_flight)
        if step > floor:
            return None
        if not self.resumed and not self.has_saved and in_flight is None:
            return StepAlreadySaved(
                f"the run holds checkpoints up to step {floor} and none was loaded; load one before saving "
                f"step {step}, or start a new run: else retention would remove what is there",
                step=step,
            )
        return StepAlreadySaved(
            f"step {step} is not after step {floor}, which is committed or being committed; steps of a run "
            "grow, and a committed step is never replaced",
            step=step,
        )

    def committed(self, step: int) -> None:
        """A step of this epoch is committed."""
        self.has_saved = True
        self.floor = max(self.floor, step)

    def resumed_from(self, step: int) -> None:
        """A checkpoint was loaded.

        Only before the first commit may that lead back: a later rollback would leave newer steps of this
        epoch standing, and needs an epoch, so a Checkpointer, of its own.
        """
        self.resumed = True
        self.floor = max(self.floor, step) if self.has_saved else step

    def directory(self, step: int) -> StepDir:
        plain = StepDir(step)
        return StepDir(step, self.epoch) if plain in self.taken else plain
