"""Who is told of saves and loads: the hooks of this rank, and on rank 0 the sinks of events.

Owns the translation from what happens here to events. Nothing that it calls can fail a save, but for
`before_save`. Told by the checkpointer, the saver, the pilot and the janitor, on their threads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.metrics import plain_metrics
from dcp_ckpt.observe.events import (
    EventSink,
    Loaded,
    Removed,
    SaveBegun,
    SaveDurable,
    SaveNotCommitted,
    SaveSkipped,
    SaveStaged,
    Scalars,
)
from dcp_ckpt.observe.stream import EventStream
from dcp_ckpt.save.handle import SaveHandle
from dcp_ckpt.save.hooks import SaveHooks

__all__ = ["SaveObserver"]

log = logging.getLogger(__name__)


class SaveObserver:
    """One rank's; owns the stream of events on rank 0.

    Args:
        url: of the run.
        sinks: rank 0's count.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        url: str,
        sinks: Sequence[EventSink] = (),
        hooks: Sequence[SaveHooks] = (),
    ) -> None:
        self._world_size = world_size
        self._url = url
        self._hooks = tuple(hooks)
        self._stream = EventStream(sinks if rank == 0 else ())

    def before_save(self, step: int) -> None:
        """Call the hooks.

        Raises:
            SaveFailed: one of them failed.
        """
        for hook in self._hooks:
            try:
                hook.before_save(step)
            except Exception as error:
                name = f"{type(hook).__name__}.before_save"
                raise SaveFailed(f"{name} failed: {error!r}", step=step, phase="stage") from error

    def begun(self, step: int) -> None:
        self._stream.emit(SaveBegun(step=step))

    def skipped(self, step: int) -> None:
        self._stream.emit(SaveSkipped(step=step))

    def staged(self, step: int, *, seconds: float) -> None:
        self._stream.emit(SaveStaged(step=step, seconds=seconds))

    def ended(self, handle: SaveHandle) -> None:
        """A save has its outcome."""
        error = handle.error
        if error is not None:
            self._stream.emit(
                SaveNotCommitted(
                    step=handle.step,
                    outcome=handle.outcome,
                    error=type(error).__name__,
                    message=str(error),
                )
            )
        else:
            info = handle.result(0)
            self._stream.emit(
                SaveDurable(
                    step=info.step,
                    path=info.path,
                    bytes=info.bytes,
                    shared_bytes=info.shared_bytes,
                    stall_seconds=info.stall_seconds,
                    durable_seconds=info.durable_seconds,
                    world_size=info.world_size,
                    metrics=plain_metrics(info.metrics),
                )
            )
        for hook in self._hooks:
            try:
                hook.after_save(handle)
            except Exception:
                log.exception("%s.after_save failed for step %d", type(hook).__name__, handle.step)

    def loaded(self, step: int, path: str, seconds: float, saved_by: int, *, num_rejected: int) -> None:
        """The state is that of a checkpoint of `saved_by` ranks; newer ones may have been rejected."""
        self._stream.emit(
            Loaded(
                step=step,
                path=path,
                seconds=seconds,
                saved_world_size=saved_by,
                world_size=self._world_size,
                num_rejected=num_rejected,
            )
        )

    def removed(self, directory: StepDir, reason: str) -> None:
        path = os.path.join(self._url, str(directory))
        self._stream.emit(Removed(step=directory.step, path=path, reason=reason))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._stream.emit(Scalars(step=step, values=dict(values)))

    def close(self) -> None:
        """Let the sinks take what they were told; bounded. Idempotent."""
        self._stream.close()
