"""Whether a training that stops saves once more: decided from the time that is left. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FinalSave", "plan_final_save"]


@dataclass(frozen=True, kw_only=True)
class FinalSave:
    """What to do before the end, and why."""

    saves: bool
    reason: str


def plan_final_save(
    *,
    step: int,
    in_flight: int | None,
    committed: int | None,
    is_fenced: bool,
    seconds_left: float,
    save_seconds: float | None,
) -> FinalSave:
    """Decide about the last save: finish the one in flight, else save, else keep what there is.

    Args:
        step: the one that training has reached.
        in_flight: the step of a save that is not durable yet, after having waited for it.
        committed: the newest step that this start has saved.
        is_fenced: a newer start owns the run.
        seconds_left: until the process may be killed.
        save_seconds: how long a save took to become durable; None when none was measured.
    """
    if is_fenced:
        return FinalSave(saves=False, reason="a newer start owns the run")
    if committed == step:
        return FinalSave(saves=False, reason=f"step {step} is saved already")
    if in_flight == step:
        return FinalSave(saves=False, reason=f"step {step} is being saved already")
    if in_flight is not None:
        return FinalSave(
            saves=False, reason=f"no time for step {step}: step {in_flight} is still being saved"
        )
    if save_seconds is not None and save_seconds > seconds_left:
        newest = "nothing new was saved" if committed is None else f"step {committed} is the newest"
        return FinalSave(
            saves=False,
            reason=f"no time for step {step}: a save takes {save_seconds:.1f} s, "
            f"{max(seconds_left, 0.0):.1f} s are left; {newest}",
        )
    return FinalSave(saves=True, reason=f"{seconds_left:.1f} s are left for the save of step {step}")
