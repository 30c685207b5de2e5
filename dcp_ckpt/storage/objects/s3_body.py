"""The body of one PUT: sent from the caller's memory in pieces, and once.

Owns two things that a plain buffer as a body would leave to chance. The HTTP client copies what the socket
does not take at once: of a whole part, for each part in flight. And it repeats a PUT by itself when a kept
connection breaks, so that a conditional one finds its own object and reads that as somebody else's. Called by
`S3Client`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from dcp_ckpt.storage.base import Buffer

__all__ = ["RequestBody"]

_PIECE_BYTES = 64 << 10


class RequestBody:
    """What botocore and the HTTP client ask of a body: its length, its pieces, and a way back to its start.

    Args:
        data: must not change before the request has ended.
    """

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data).cast("B")
        self._is_spent = False

    def __len__(self) -> int:
        return self._data.nbytes

    def __aiter__(self) -> AsyncIterator[memoryview]:
        if self._is_spent:
            raise ConnectionError("the connection broke, and the store may have got the body already")
        self._is_spent = True
        return self._pieces()

    def seek(self, position: int) -> None:
        """Called before the request is sent to another place, where an answer said that it belongs."""
        if position != 0:
            raise ValueError(f"a body is sent whole, not from byte {position}")
        self._is_spent = False

    async def _pieces(self) -> AsyncIterator[memoryview]:
        for start in range(0, len(self), _PIECE_BYTES):
            yield self._data[start : start + _PIECE_BYTES]
