"""Operations on committed checkpoints: one process, streaming, without a model, a GPU or a process group."""

from __future__ import annotations

from dcp_ckpt.ops.average import AverageReport, average
from dcp_ckpt.ops.checkpoint import Checkpoint, open_checkpoint
from dcp_ckpt.ops.copy import CopyReport, copy_checkpoint
from dcp_ckpt.ops.diff import DiffReport, diff
from dcp_ckpt.ops.export import ExportReport, export
from dcp_ckpt.ops.import_checkpoint import ImportReport, import_checkpoint
from dcp_ckpt.ops.plan import LoadPlan, plan_load
from dcp_ckpt.ops.verify import VerifyReport, verify

__all__ = [
    "AverageReport",
    "Checkpoint",
    "CopyReport",
    "DiffReport",
    "ExportReport",
    "ImportReport",
    "LoadPlan",
    "VerifyReport",
    "average",
    "copy_checkpoint",
    "diff",
    "export",
    "import_checkpoint",
    "open_checkpoint",
    "plan_load",
    "verify",
]
