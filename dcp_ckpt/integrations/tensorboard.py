"""Events as TensorBoard scalars.

The numbers of a run form one line across resumes: after a load, TensorBoard is told to leave out what was
logged before at later steps, which will be trained again (`purge_step` of `SummaryWriter`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dcp_ckpt.errors import MissingDependencyError
from dcp_ckpt.observe.events import Event, Loaded, SaveDurable, SaveNotCommitted, SaveSkipped, Scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes saves and loads, and the numbers given to `Checkpointer.log_scalars` by their names.

    Those of saves and loads are `checkpoint/stall_seconds`, `durable_seconds`, `mb_per_second`, `written_mb`,
    `failures` (of this start, skipped saves included) and `load_seconds`.

    Args:
        log_dir: directory of the event files; made if missing. One for each run.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "TensorBoardSink needs tensorboard: pip install 'dcp_ckpt[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        self._log_dir = os.fspath(log_dir)
        self._writer: SummaryWriter | None = None
        self._failures = 0

    def handle(self, event: Event) -> None:
        if isinstance(event, Loaded):
            self._begin(purge_step=event.step + 1)
        if self._writer is None:
            self._begin(purge_step=None)
        for name, value in self._scalars(event).items():
            assert self._writer is not None
            self._writer.add_scalar(name, value, event.step, walltime=event.time.timestamp())
        if isinstance(event, SaveDurable | SaveNotCommitted):
            assert self._writer is not None
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin(self, *, purge_step: int | None) -> None:
        self.close()
        self._writer = self._make(self._log_dir, purge_step=purge_step)

    def _scalars(self, event: Event) -> dict[str, float]:
        match event:
            case Scalars():
                return {name: float(value) for name, value in event.values.items()}
            case SaveDurable():
                return {
                    "checkpoint/stall_seconds": event.stall_seconds,
                    "checkpoint/durable_seconds": event.durable_seconds,
                    "checkpoint/mb_per_second": event.written_bytes / 1e6 / max(event.durable_seconds, 1e-9),
                    "checkpoint/written_mb": event.written_bytes / 1e6,
                    "checkpoint/failures": float(self._failures),
                }
            case SaveNotCommitted() | SaveSkipped():
                self._failures += 1
                return {"checkpoint/failures": float(self._failures)}
            case Loaded():
                return {"checkpoint/load_seconds": event.seconds}
        return {}
