"""Policies as values: when to save, what to keep, and what to mistrust.

Owns the rules themselves, as small frozen objects with one pure method each. They know no storage and no
clock: the caller tells them what it sees. `dcp_ckpt.config` holds them, the checkpointer asks the save
policies, and where a clock decides on rank 0 only; `dcp_ckpt.lifecycle` asks the others.
"""

from __future__ import annotations

from dcp_ckpt.policies.combined import AnyOf, is_keep_policy, is_save_policy
from dcp_ckpt.policies.keeping import BestN, EveryNSeconds, EveryNSteps, KeepPolicy, LatestN, Mode, Saved
from dcp_ckpt.policies.saving import (
    AtFirstStep,
    AtLastStep,
    AtSteps,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    Moment,
    SaveCosts,
    SavePolicy,
    Young,
)
from dcp_ckpt.policies.suspicion import LossSpike, NotFinite, SuspectPolicy

__all__ = [
    "AnyOf",
    "AtFirstStep",
    "AtLastStep",
    "AtSteps",
    "BestN",
    "EveryEpochs",
    "EveryNSeconds",
    "EveryNSteps",
    "EverySeconds",
    "EverySteps",
    "KeepPolicy",
    "LatestN",
    "LossSpike",
    "Mode",
    "Moment",
    "NotFinite",
    "SaveCosts",
    "SavePolicy",
    "Saved",
    "SuspectPolicy",
    "Young",
    "is_keep_policy",
    "is_save_policy",
]
