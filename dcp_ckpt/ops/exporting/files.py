"""One file of an export, as it will be: what stands around the tensors' bytes, and which tensors.

Owns what the layouts of all formats and the loop that fills them have in common. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dcp_ckpt.ops.exporting.plan import ExportTensor

__all__ = ["PlannedFile", "document", "plain_framing"]

_Framing = Generator[bytes, int, None]


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """A file whose size is known before anything is read.

    Args:
        tensors: in the order of their bytes.
        framing: makes anew a generator of the bytes before the first tensor, between two, and after the last.
            The CRC-32 of each tensor's bytes is sent in, where `needs_crc` says so (else zero); lengths do
            not depend on it.
    """

    name: str
    framing: Callable[[], _Framing]
    tensors: tuple[ExportTensor, ...] = ()
    needs_crc: bool = False

    @cached_property
    def num_bytes(self) -> int:
        framing = self.framing()
        num_bytes = len(next(framing))
        for tensor in self.tensors:
            num_bytes += tensor.num_bytes + len(framing.send(0))
        return num_bytes


def plain_framing(pieces: Sequence[bytes]) -> _Framing:
    """Of a format that says nothing about the tensors' bytes."""
    for piece in pieces:  # noqa: UP028  # the iterator of a list takes nothing that is sent
        yield piece


def document(name: str, content: bytes) -> PlannedFile:
    """A file without tensors."""
    return PlannedFile(name=name, framing=lambda: plain_framing([content]))
