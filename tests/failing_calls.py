"""System calls of this process that fail on purpose: what a disk or a file server does, below the code."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

from dcp_ckpt.testing.interposition import SystemCall, interposed

__all__ = ["failing"]


def failing(
    name: str, pattern: str, code: int, *, times: int | None = 1, only_if: Callable[[], bool] = lambda: True
) -> AbstractContextManager[None]:
    """Within the with-block, calls of `os.<name>` with a path like `pattern` fail with `code`.

    Args:
        times: so many of them; None for all.
        only_if: asked at each call that matches.
    """
    left = [times]

    def see(call: SystemCall) -> None:
        if call.after or call.name != name or not call.matches(pattern) or left[0] == 0 or not only_if():
            return
        if left[0] is not None:
            left[0] -= 1
        raise OSError(code, os.strerror(code), call.paths[-1])

    return interposed(see)
