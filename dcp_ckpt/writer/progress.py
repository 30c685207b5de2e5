"""How far the writer is, on one page of memory that it shares with its trainer.

The writer puts it there and the trainer looks whenever it likes: neither ever waits for the other, whether it
is busy, stopped or dead. Made by the trainer (`dcp_ckpt.save.writer_process`), told by the engine.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Protocol

import msgspec

from dcp_ckpt.closing import Closing
from dcp_ckpt.format.documents import decoder_of, encode_json

__all__ = ["Progress", "ProgressPage", "Tell", "make_page"]

_PAGE_BYTES = 4096
_HEAD = struct.Struct("<QI")
"""A count that is odd while the page is being written, and the length of the JSON behind it."""
_LOOKS = 3


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the writer works on.

    Args:
        attempt: that of the job; empty before the first.
        key: of the object that is being written.
        bytes_done, bytes_total: of that object; `bytes_done` were accepted by the storage.
    """

    attempt: str = ""
    key: str = ""
    bytes_done: int = 0
    bytes_total: int = 0


class Tell(Protocol):
    """Called by the engine whenever something has moved."""

    def __call__(self, key: str, *, bytes_done: int, bytes_total: int) -> None: ...


def make_page() -> int:
    """A descriptor of a new page, which the writer inherits."""
    descriptor = os.memfd_create("dcp_ckpt-progress", os.MFD_CLOEXEC)
    os.truncate(descriptor, _PAGE_BYTES)
    return descriptor


class ProgressPage(Closing):
    """The page, mapped. One process writes, the other reads.

    Args:
        descriptor: of `make_page`; stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, _PAGE_BYTES)
        self._count = 0
        self._last = Progress()

    def write(self, progress: Progress) -> None:
        """Replace what is there. Does not block."""
        data = encode_json(progress)
        if len(data) > _PAGE_BYTES - _HEAD.size:
            return
        self._count += 2
        _HEAD.pack_into(self._page, 0, self._count - 1, 0)
        self._page[_HEAD.size : _HEAD.size + len(data)] = data
        _HEAD.pack_into(self._page, 0, self._count, len(data))

    def read(self) -> Progress:
        """What was written last. Does not block: of a page that is being written, what was read before."""
        for _ in range(_LOOKS):
            count, length = _HEAD.unpack_from(self._page)
            data = self._page[_HEAD.size : _HEAD.size + length]
            if count and count % 2 == 0 and _HEAD.unpack_from(self._page) == (count, length):
                # A writer that was stopped between the two numbers of the head leaves a wrong length.
                with contextlib.suppress(msgspec.DecodeError):
                    self._last = decoder_of(Progress).decode(data)
                break
        return self._last

    def close(self) -> None:
        self._page.close()
