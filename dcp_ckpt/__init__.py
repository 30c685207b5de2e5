"""Sharded, asynchronous, verified checkpoints for PyTorch training, on torch.distributed.checkpoint.

Names are imported when they are first used, so that the command line and the writer process start without
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcp_ckpt.checkpointer import Checkpointer
    from dcp_ckpt.config import CheckpointConfig
    from dcp_ckpt.data.loader import ElasticLoader
    from dcp_ckpt.data.sampler import ElasticSampler
    from dcp_ckpt.errors import CheckpointError
    from dcp_ckpt.lifecycle.runs import Run, RunParent, list_runs
    from dcp_ckpt.load.by_path import load_checkpoint
    from dcp_ckpt.load.report import LoadReport
    from dcp_ckpt.observe.events import EventSink
    from dcp_ckpt.observe.jsonl import JsonLinesSink, read_events
    from dcp_ckpt.ops.average import AverageReport, average
    from dcp_ckpt.ops.checkpoint import Checkpoint, open_checkpoint
    from dcp_ckpt.ops.copy import CopyReport, copy_checkpoint
    from dcp_ckpt.ops.diff import DiffReport, diff
    from dcp_ckpt.ops.export import ExportReport, export
    from dcp_ckpt.ops.import_checkpoint import ImportReport, import_checkpoint
    from dcp_ckpt.ops.plan import LoadPlan, plan_load
    from dcp_ckpt.ops.runs import RunSummary, summarize_runs
    from dcp_ckpt.ops.verify import VerifyReport, verify
    from dcp_ckpt.policies import (
        AnyOf,
        AtFirstStep,
        AtLastStep,
        AtSteps,
        BestN,
        EveryEpochs,
        EveryNSeconds,
        EveryNSteps,
        EverySeconds,
        EverySteps,
        LatestN,
        LossSpike,
        NotFinite,
        SavePolicy,
        Young,
    )
    from dcp_ckpt.runs import open_run
    from dcp_ckpt.save.handle import CheckpointInfo, SaveHandle
    from dcp_ckpt.save.hooks import SaveHooks
    from dcp_ckpt.state.mesh_roles import MeshRoles
    from dcp_ckpt.state.model_parts import ModelParts
    from dcp_ckpt.state.train_state import TrainState
    from dcp_ckpt.stopping.signals import ignore_stop_signals

_HOMES = {
    "AnyOf": "policies",
    "AtFirstStep": "policies",
    "AtLastStep": "policies",
    "AtSteps": "policies",
    "AverageReport": "ops.average",
    "BestN": "policies",
    "Checkpoint": "ops.checkpoint",
    "CheckpointConfig": "config",
    "CheckpointError": "errors",
    "CheckpointInfo": "save.handle",
    "Checkpointer": "checkpointer",
    "CopyReport": "ops.copy",
    "DiffReport": "ops.diff",
    "ElasticLoader": "data.loader",
    "ElasticSampler": "data.sampler",
    "EventSink": "observe.events",
    "EveryEpochs": "policies",
    "EveryNSeconds": "policies",
    "EveryNSteps": "policies",
    "EverySeconds": "policies",
    "EverySteps": "policies",
    "ExportReport": "ops.export",
    "ImportReport": "ops.import_checkpoint",
    "JsonLinesSink": "observe.jsonl",
    "LatestN": "policies",
    "LoadPlan": "ops.plan",
    "LoadReport": "load.report",
    "LossSpike": "policies",
    "MeshRoles": "state.mesh_roles",
    "ModelParts": "state.model_parts",
    "NotFinite": "policies",
    "Run": "lifecycle.runs",
    "RunParent": "lifecycle.runs",
    "RunSummary": "ops.runs",
    "SaveHandle": "save.handle",
    "SaveHooks": "save.hooks",
    "SavePolicy": "policies",
    "TrainState": "state.train_state",
    "VerifyReport": "ops.verify",
    "Young": "policies",
    "average": "ops.average",
    "copy_checkpoint": "ops.copy",
    "diff": "ops.diff",
    "export": "ops.export",
    "ignore_stop_signals": "stopping.signals",
    "import_checkpoint": "ops.import_checkpoint",
    "list_runs": "lifecycle.runs",
    "load_checkpoint": "load.by_path",
    "open_checkpoint": "ops.checkpoint",
    "open_run": "runs",
    "plan_load": "ops.plan",
    "read_events": "observe.jsonl",
    "summarize_runs": "ops.runs",
    "verify": "ops.verify",
}

__all__ = [
    "AnyOf",
    "AtFirstStep",
    "AtLastStep",
    "AtSteps",
    "AverageReport",
    "BestN",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointInfo",
    "Checkpointer",
    "CopyReport",
    "DiffReport",
    "ElasticLoader",
    "ElasticSampler",
    "EventSink",
    "EveryEpochs",
    "EveryNSeconds",
    "EveryNSteps",
    "EverySeconds",
    "EverySteps",
    "ExportReport",
    "ImportReport",
    "JsonLinesSink",
    "LatestN",
    "LoadPlan",
    "LoadReport",
    "LossSpike",
    "MeshRoles",
    "ModelParts",
    "NotFinite",
    "Run",
    "RunParent",
    "RunSummary",
    "SaveHandle",
    "SaveHooks",
    "SavePolicy",
    "TrainState",
    "VerifyReport",
    "Young",
    "average",
    "copy_checkpoint",
    "diff",
    "export",
    "ignore_stop_signals",
    "import_checkpoint",
    "list_runs",
    "load_checkpoint",
    "open_checkpoint",
    "open_run",
    "plan_load",
    "read_events",
    "summarize_runs",
    "verify",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
