"""Waiting for what another process or thread does, where nothing announces it."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["eventually"]

_POLL_SECONDS = 0.02


def eventually(condition: Callable[[], bool], *, timeout_seconds: float) -> bool:
    """Whether `condition` comes true within the time. It is asked once more at the end."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(_POLL_SECONDS)
    return condition()
