"""Parameters that are slow to copy: their late copy waits at a gate, for tests of what happens meanwhile.

Everything else about them is PyTorch's own: forward, backward, optimizers, and copies on the main thread.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

__all__ = ["Gate", "slow_parameter"]

GATE_SECONDS = 60.0


class Gate:
    """Holds every copy that is not made by the main thread, while it is shut."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def open(self, *_: Any) -> None:
        """Takes and ignores arguments, so that it can be a hook."""
        self._open.set()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def pass_through(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.reached.set()
            assert self._open.wait(GATE_SECONDS)


def slow_parameter(values: torch.Tensor, gate: Gate) -> nn.Parameter:
    """A parameter with these values."""

    class Slow(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            # Owned by this rank, or only compared with the rank that owns it.
            if func in (torch._foreach_copy_, torch.Tensor.cpu):
                gate.pass_through()
            return super().__torch_function__(func, types, args, kwargs)

    return nn.Parameter(values.as_subclass(Slow))
