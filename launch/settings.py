"""What may be changed when a run goes on: the settings that it was started with against those of this start.

Owns the verdicts and their reasons; pure. Called by `train.py` with the `config` of `run.json`, which is
written once. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dcp_ckpt.errors import StateMismatch

__all__ = ["RULES", "SettingChange", "Verdict", "changed_settings", "require_allowed", "tags_of"]

Verdict = Literal["safe", "with care", "refused"]


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """One setting that is not what the run was started with.

    Args:
        name: that of the flag, without dashes, or `dataset`.
        verdict: `safe`: the run stays the run, to the order of float sums. `with care`: nothing is lost or
            repeated, but it is another training from here on. `refused`: it could not be that run any more.
    """

    name: str
    saved: Any
    now: Any
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {_shown(self.saved)} -> {_shown(self.now)}"


RULES: Mapping[str, tuple[Verdict, str]] = {
    "steps": ("safe", "the schedule has a length of its own, --lr-steps"),
    "epochs": ("safe", "the schedule has a length of its own, --lr-steps"),
    "parallel": ("safe", "any layout resumes any other; only the order of float sums changes"),
    "grad_accum": ("safe", "same samples, same mean gradient; only the order of float sums changes"),
    "workers": ("safe", "the order of the samples does not depend on them"),
    "compile": ("safe", "the same arithmetic, rounded in other places"),
    "eval_every": ("safe", "validation changes nothing"),
    "eval_iters": ("safe", "validation changes nothing; losses over other samples compare badly"),
    "save_strategy": ("safe", "saving changes nothing"),
    "save_every": ("safe", "saving changes nothing"),
    "save_every_minutes": ("safe", "saving changes nothing"),
    "save_at": ("safe", "saving changes nothing"),
    "mtbf_hours": ("safe", "saving changes nothing"),
    "keep_last": ("safe", "decides what is deleted from now on"),
    "keep_every": ("safe", "decides what is deleted from now on"),
    "keep_best": ("safe", "decides what is deleted from now on"),
    "monitor": ("safe", "decides which checkpoint is the best"),
    "mode": ("safe", "decides which checkpoint is the best"),
    "overlap": ("safe", "saving changes nothing"),
    "max_minutes": ("safe", "stopping loses nothing"),
    "batch_size": (
        "with care",
        "the position in the data stays exact; steps are of another size from here on",
    ),
    "lr": ("with care", "the schedule has another peak from the next step on"),
    "lr_steps": ("with care", "the schedule has another length from the next step on"),
    "dropout": ("with care", "it is regularised in another way from the next step on"),
    "amp": ("with care", "it is computed in another precision from the next step on"),
    "amp=fp16": ("refused", "the checkpoint has no state of a gradient scaler"),
    "model_size": ("refused", "the checkpoint is of another model"),
    "seed": ("refused", "the order of the samples goes on as it was; another seed would not be used"),
    "dataset": ("refused", "the position in the data is that in other data"),
    "lora_rank": ("refused", "adapters keep their rank; --run-number of the base run begins new ones"),
}
"""Verdict and reason by setting, or by setting and new value. What is not here belongs to one start of a run,
such as `--log-json`."""


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[SettingChange]:
    """What differs, in the order of `RULES`. A setting that an older version did not record is left out."""
    changes = []
    for name in RULES:
        if name in saved and name in now and saved[name] != now[name]:
            verdict, reason = RULES.get(f"{name}={now[name]}", RULES[name])
            change = SettingChange(
                name=name, saved=saved[name], now=now[name], verdict=verdict, reason=reason
            )
            changes.append(change)
    return changes


def require_allowed(changes: Sequence[SettingChange], run_path: str) -> None:
    """Refuse the start if one of the changes is refused.

    Raises:
        StateMismatch: the message names all of them.
    """
    refused = [change for change in changes if change.verdict == "refused"]
    if refused:
        reasons = "; ".join(f"{change} ({change.reason})" for change in refused)
        raise StateMismatch(
            f"this run was started with other settings: {reasons}. Give those of the run, or --resume never "
            "for a new one",
            path=run_path,
        )


def tags_of(changes: Sequence[SettingChange]) -> tuple[str, ...]:
    """Words to keep with each checkpoint, since `run.json` says only what the run was started with."""
    return tuple(f"{change.name}={_shown(change.now)}" for change in changes if change.verdict == "with care")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
