"""Operations on committed checkpoints: one process, streaming, without a model, a GPU or a process group."""

from __future__ import annotations

from dcp_ckpt.ops.checkpoint import Checkpoint, open_checkpoint
from dcp_ckpt.ops.verify import VerifyReport, verify

__all__ = ["Checkpoint", "VerifyReport", "open_checkpoint", "verify"]
