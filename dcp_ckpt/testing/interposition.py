"""Standing between this process and the system calls that change files: seeing each one, and ending it there.

Owns the list of calls and how their paths are found. Must not know checkpoints. Called by `killpoints` in
processes that are to die, by tests that cut the power inside of their own process, and by `power_loss`.
"""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcp_ckpt.storage.system_calls import SystemCalls

__all__ = ["CALLS", "PowerCut", "PowerCutAt", "SystemCall", "interpose", "interposed", "watched_calls"]

CALLS = (
    "fdatasync", "fsync", "ftruncate", "link", "mkdir", "open", "pwrite", "rename", "replace", "rmdir",
    "unlink", "write",
)  # fmt: skip
"""Functions of `os`. Of `open` only those calls count that may create or empty a file."""

_BY_DESCRIPTOR = ("fdatasync", "fsync", "ftruncate", "pwrite", "write")
_TWO_PATHS = ("rename", "replace")


@dataclass(frozen=True, kw_only=True)
class SystemCall:
    """One call, seen before it is made or after it has succeeded.

    Args:
        name: one of CALLS.
        paths: absolute; the new name for `link`, old and new name for `rename` and `replace`.
        arguments: as given; what is not given by position is not in it.
        result: of the call, once it has succeeded.
    """

    name: str
    paths: tuple[str, ...]
    after: bool
    arguments: tuple[Any, ...] = field(default=(), repr=False)
    result: Any = field(default=None, repr=False)

    def matches(self, pattern: str) -> bool:
        """Whether a path matches a pattern as in `fnmatch`, where `*` stands for slashes too."""
        return any(fnmatch.fnmatchcase(path, pattern) for path in self.paths)


class PowerCut(BaseException):
    """From here on nothing changes any more. No `Exception`, so that nobody handles it."""


class PowerCutAt:
    """Cuts the power at one moment: that call and all later ones raise, so that no cleaning up takes effect.

    Args:
        number: of the moment; two for each call, before and after it, counted from 1. 0 never cuts.
        root: only calls below this directory count.
    """

    def __init__(self, number: int, *, root: str | os.PathLike[str]) -> None:
        self._number = number
        self._prefix = os.path.join(os.path.abspath(root), "*")
        self.num_moments = 0
        self.is_cut = False

    def __call__(self, call: SystemCall) -> None:
        if not (call.matches(self._prefix) or call.matches(self._prefix[:-2])):
            return
        self.num_moments += 1
        if self.is_cut or self.num_moments == self._number:
            self.is_cut = True
            raise PowerCut(f"{'after' if call.after else 'before'} {call.name} of {call.paths[-1]}")


def interpose(see: Callable[[SystemCall], None]) -> Callable[[], None]:
    """Call `see` before and after each call of CALLS in this process, on the thread that makes it.

    Replaces attributes of `os`: what took a function from there before keeps the real one.

    Returns:
        What puts the real functions back.
    """
    real = {name: getattr(os, name) for name in CALLS}
    for name, function in real.items():
        setattr(os, name, _watched(name, function, see))

    def undo() -> None:
        for name, function in real.items():
            setattr(os, name, function)

    return undo


@contextmanager
def interposed(see: Callable[[SystemCall], None]) -> Iterator[None]:
    """`interpose`, for the time of a with-block."""
    undo = interpose(see)
    try:
        yield
    finally:
        undo()


def watched_calls(*, hard_links: bool = True) -> SystemCalls:
    """What to give to a `LocalStorage` so that all its calls are seen, whenever it is made.

    It looks functions up in `os` at each call; renaming without replacing is seen as `rename`.

    Args:
        hard_links: with False there are none, as on some file systems.
    """
    # Imported late: its defaults are what `os` holds when it is imported, and `killpoints` interposes before.
    from dcp_ckpt.storage import system_calls

    def link(source: str, target: str) -> None:
        if not hard_links:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), target)
        os.link(source, target)

    def rename_without_replacing(source: str, target: str) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target)

    return system_calls.SystemCalls(
        link=link,
        rename_without_replacing=rename_without_replacing,
        pwrite=lambda fd, data, offset: os.pwrite(fd, data, offset),
    )


def _watched(
    name: str, function: Callable[..., Any], see: Callable[[SystemCall], None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
            return function(*arguments, **options)
        paths = _paths(name, arguments)
        see(SystemCall(name=name, paths=paths, after=False, arguments=arguments))
        result = function(*arguments, **options)
        try:
            see(SystemCall(name=name, paths=paths, after=True, arguments=arguments, result=result))
        except BaseException:
            if name == "open":
                os.close(result)
            raise
        return result

    return call


def _paths(name: str, arguments: tuple[Any, ...]) -> tuple[str, ...]:
    if name in _BY_DESCRIPTOR:
        return (os.readlink(f"/proc/self/fd/{arguments[0]}"),)
    given = arguments[:2] if name in _TWO_PATHS else arguments[1:2] if name == "link" else arguments[:1]
    return tuple(os.path.abspath(os.fsdecode(path)) for path in given)
