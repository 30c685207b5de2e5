"""The fence: no optimizer step while parameters and moments of a save are still being copied.

Owns the thread that copies, one save at a time, and the hooks that hold `optimizer.step()`. Called by the
saver, on the main thread; knows neither tensors nor files.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.save.handover import Handover

__all__ = ["Fence"]

log = logging.getLogger(__name__)


class Fence:
    """Closed from `start` until the copies are done, failed or given up. Its thread is made at first use."""

    def __init__(self, *, rank: int) -> None:
        self._rank = rank
        self._handover: Handover | None = None
        self._hooks: dict[int, tuple[torch.optim.Optimizer, RemovableHandle]] = {}
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None

    def start(
        self, handover: Handover, work: Callable[[], None], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Run `work` on the thread, and hold the steps of `optimizers` until it has ended `handover`.

        Args:
            work: raises nothing. The thread must be idle.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dcp_ckpt-fence", daemon=True)
            self._thread.start()
        self._handover = handover
        self._hold(optimizers)
        self._idle.clear()
        self._works.put(work)

    def wait(self) -> None:
        """Block until what was started last may be changed; its failure is told by its save only."""
        if self._handover is not None:
            self._handover.wait_copied()

    def wait_idle(self, *, timeout_seconds: float) -> None:
        """Wait until nothing is copied any more, so that the arena may be used again.

        Raises:
            SaveFailed: that took too long.
        """
        if not self._idle.wait(timeout_seconds):
            raise SaveFailed(
                f"tensors of the save before are still being copied after {timeout_seconds:.0f} s",
                rank=self._rank,
                phase="stage",
            )

    def release(self) -> None:
        """Take the hooks from all optimizers. Not to be called from inside of a hook. Idempotent."""
        self._hold(())

    def release_if_idle(self) -> None:
        """The same, unless the save before is still being copied: its tensors must not be written yet."""
        if self._idle.is_set():
            self.release()

    def close(self, *, timeout_seconds: float) -> None:
        """Finish what was started, take the hooks away and join the thread. Idempotent."""
        self.release()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._works.put(None)
        thread.join(timeout_seconds)
        if thread.is_alive():
            log.error("a copy of parameters hangs; its thread ends with the process")

    def _hold(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        # Hooks stay until the next save has others: a step may be iterating over them on the training thread
        # at the moment when the thread here has copied everything, and must not see them go.
        wanted = {id(optimizer): optimizer for optimizer in optimizers}
        for key in self._hooks.keys() - wanted.keys():
            self._hooks.pop(key)[1].remove()
        for key, optimizer in wanted.items():
            if key not in self._hooks:
                self._hooks[key] = optimizer, optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        try:
            self.wait()
        # A save never breaks training, not even by a mistake in here.
        except Exception:
            log.exception("the fence before an optimizer step failed")

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            work()
            # It holds on to the tensors, which may be all that is left of a model.
            del work
            self._idle.set()
