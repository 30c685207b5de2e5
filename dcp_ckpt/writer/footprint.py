"""How little memory a writer holds on to: there is one beside each rank, and it waits most of the time.

Owns what is asked of the C library's allocator; where it is not glibc's, nothing is. Called by the writer
program.
"""

from __future__ import annotations

import ctypes

__all__ = ["give_back", "share_one_heap"]

_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have all threads share one heap: one of its own keeps what it once needed. Before there are threads."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the system what was freed. Takes milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
