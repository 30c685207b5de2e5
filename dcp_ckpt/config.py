"""The settings of a checkpointer, as one validated value.

Owns the fields, their defaults and what is refused. Knows nothing of how they are used. Built by users and
by `launch/`; read by the checkpointer, `save` and `load`.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from typing import Literal

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.other_names import KnownByOtherNames
from dcp_ckpt.policies import (
    KeepPolicy,
    LatestN,
    NotFinite,
    SavePolicy,
    SuspectPolicy,
    is_keep_policy,
    is_save_policy,
)

__all__ = ["CheckpointConfig"]

_DEFAULT_KEEP = LatestN(2)
_DEFAULT_SUSPECT_WHEN = NotFinite()
_OTHER_NAMES = {
    name: f"keep=LatestN({name}), or AnyOf(LatestN(...), BestN(...)) to keep the best as well"
    for name in ("save_total_limit", "max_to_keep", "keep_latest_k", "keep_last_n", "keep_last")
} | {
    "save_top_k": 'keep=AnyOf(LatestN(1), BestN(save_top_k, "val_loss"))',
    "monitor": 'the metric of BestN: keep=BestN(1, "val_loss", mode="min")',
    "mode": 'that of BestN: keep=BestN(1, "val_loss", mode="min")',
    "interval": "save_when=EverySteps(interval)",
    "save_steps": "save_when=EverySteps(save_steps)",
    "save_interval_steps": "save_when=EverySteps(save_interval_steps)",
    "every_n_train_steps": "save_when=EverySteps(every_n_train_steps)",
    "every_n_epochs": "save_when=EveryEpochs(every_n_epochs)",
    "async_mode": 'overlap="step" or "off"; saves never hold the training until they are durable',
    "checkpoint_dir": "the first argument of Checkpointer: Checkpointer(path, config=...)",
}
"""What users of other libraries type -> what it is here."""
_NOT_HANDLED = (signal.SIGKILL, signal.SIGSTOP)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(KnownByOtherNames):
    """How a run is saved, kept and resumed. Equal on all ranks.

    Args:
        save_when: when `should_save` says yes; None leaves it to the caller's own rule.
        keep: what retention keeps besides what it never touches; None keeps everything.
        suspect_when: which metrics make a checkpoint suspect, so that it never takes the place of a good one
            and is never the best; by default a NaN or an infinity. None: none do.
        overlap: "off": `save()` returns once this rank's bytes are copied. "step": parameters and moments of
            a TrainState are copied while forward and backward run, and the next `optimizer.step()` waits
            until they are; whatever else writes them calls `Checkpointer.fence()` first.
        reuse: what is unchanged since the save before is not written again: the new checkpoint shares its
            files. Unchanged is what has the same digest, so `save()` reads all that is not copied late. For
            fine-tuning, where most of the state is frozen; without effect on storages without hard links.
        when_busy: a save that comes while the one before is still being written waits for it, or is skipped.
        on_failure: a failed save is logged and training goes on, or it raises at the next call, on all ranks.
        verify: check the digests of everything that a load reads.
        timeout_seconds: deadline of every wait for other ranks and for a save to become durable.
        grace_seconds: how long the files of an un-committed checkpoint stay, for readers that have it open.
        recover_wait_seconds: how long a start waits for writers of the last one that still live.
        stop_after_seconds: `should_stop` says yes this long after the Checkpointer was made; None: never.
        stop_grace_seconds: how long the process may be expected to live once it was asked to stop: what the
            final save must fit in. torchrun kills its workers 30 seconds after it was told to end.
        stop_signals: names of the signals that ask a training to stop, from the first `should_stop` on.
        max_bandwidth_bytes: bytes per second that all writers of a host may use. Not built yet.
        dcp_metadata: derive `.metadata` for stock DCP readers: up to 100,000 chunks, always, or never.
        allow_pickle: store and load objects that only pickle can hold. Not built yet.

    Raises:
        ConfigError: a value is not allowed; the message holds it.
    """

    other_names = _OTHER_NAMES

    save_when: SavePolicy | None = None
    keep: KeepPolicy | None = _DEFAULT_KEEP
    suspect_when: SuspectPolicy | None = _DEFAULT_SUSPECT_WHEN
    overlap: Literal["off", "step"] = "off"
    reuse: bool = False
    when_busy: Literal["wait", "skip"] = "wait"
    on_failure: Literal["warn", "raise"] = "warn"
    verify: bool = True
    timeout_seconds: float = 600.0
    grace_seconds: float = 5.0
    recover_wait_seconds: float = 60.0
    stop_after_seconds: float | None = None
    stop_grace_seconds: float = 25.0
    stop_signals: tuple[str, ...] = ("SIGINT", "SIGTERM")
    max_bandwidth_bytes: int | None = None
    dcp_metadata: Literal["auto", "always", "never"] = "auto"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        self._check_policies()
        self._check_choice("overlap", ("off", "step"))
        self._check_choice("reuse", (True, False))
        self._check_choice("when_busy", ("wait", "skip"))
        self._check_choice("on_failure", ("warn", "raise"))
        self._check_choice("dcp_metadata", ("auto", "always", "never"))
        self._check_choice("verify", (True, False))
        self._check_choice("allow_pickle", (True, False))
        self._check_seconds("timeout_seconds", zero_allowed=False)
        self._check_seconds("grace_seconds", zero_allowed=True)
        self._check_seconds("recover_wait_seconds", zero_allowed=True)
        if self.stop_after_seconds is not None:
            self._check_seconds("stop_after_seconds", zero_allowed=True)
        self._check_seconds("stop_grace_seconds", zero_allowed=True)
        self._check_signals()
        self._refuse_unbuilt()

    def _check_policies(self) -> None:
        if self.save_when is not None and not is_save_policy(self.save_when):
            raise ConfigError(
                "save_when must be a save policy (EverySteps, EveryEpochs, EverySeconds, AtSteps, "
                f"AtFirstStep, AtLastStep, Young, AnyOf) or None, not {self.save_when!r}"
            )
        if self.keep is not None and not is_keep_policy(self.keep):
            raise ConfigError(
                "keep must be a keep policy (LatestN, EveryNSteps, EveryNSeconds, BestN, AnyOf) or None, "
                f"not {self.keep!r}"
            )

        if self.suspect_when is not None and not isinstance(self.suspect_when, SuspectPolicy):
            raise ConfigError(
                f"suspect_when must be NotFinite(), LossSpike(...) or None, not {self.suspect_when!r}"
            )

    def _check_choice(self, name: str, allowed: tuple[object, ...]) -> None:
        value = getattr(self, name)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise ConfigError(f"{name} must be {' or '.join(map(repr, allowed))}, not {value!r}")

    def _check_seconds(self, name: str, *, zero_allowed: bool) -> None:
        value = getattr(self, name)
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not zero_allowed):
            wanted = "zero or more" if zero_allowed else "more than zero"
            raise ConfigError(f"{name} must be a finite number of seconds, {wanted}, not {value!r}")

    def _check_signals(self) -> None:
        allowed = sorted(number.name for number in signal.Signals if number not in _NOT_HANDLED)
        for name in self.stop_signals:
            if name not in allowed:
                raise ConfigError(
                    f"stop_signals must be names of signals that can be handled, such as 'SIGTERM', "
                    f"not {self.stop_signals!r}"
                )

    def _refuse_unbuilt(self) -> None:
        # Accepting a setting without effect would be a promise that nobody keeps.
        if self.max_bandwidth_bytes is not None:
            raise ConfigError(
                f"max_bandwidth_bytes={self.max_bandwidth_bytes!r} is not built yet; leave it at None"
            )
        if self.allow_pickle:
            raise ConfigError(
                "allow_pickle=True is not built yet; save plain Python values, numpy arrays or tensors"
            )
