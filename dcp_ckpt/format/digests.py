"""Digests: 128-bit XXH3 of blocks and of JSON documents (docs/format.md, sections 3 and 4).

XXH3 digests 19.6 GB/s on one core where SHA-256 makes 1.5 GB/s (benchmarks/NOTES.md), so every
block can be digested on its way to the disk and on its way back.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

__all__ = ["BLOCK_BYTES", "DIGEST_DIGITS", "ReadableBuffer", "block_count", "digest", "digest_of_parts"]

BLOCK_BYTES = 1 << 20
DIGEST_DIGITS = 32

ReadableBuffer = bytes | bytearray | memoryview


def digest(data: ReadableBuffer) -> str:
    """The digest of `data`: 32 lower-case hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of_parts(parts: Iterable[ReadableBuffer]) -> str:
    """The digest of all parts, one after the other; each is used before the next one is asked for."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def block_count(size_bytes: int) -> int:
    """How many blocks a file of `size_bytes` has."""
    return -(-size_bytes // BLOCK_BYTES)
