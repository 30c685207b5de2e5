"""What no rank asks for, where every rank asks for its own part of the model.

A pipelined model's rank uses a part of a checkpoint, and only all ranks together can say what is left over.
Called by `load.fit_verdict`, on all ranks.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection
from typing import Any

import msgspec

from dcp_ckpt.coordination import Channel, reduce
from dcp_ckpt.format.digests import digest

__all__ = ["common_to_all"]


def common_to_all(
    channel: Channel, tag: str, names: Collection[str], *, timeout_seconds: float
) -> frozenset[str]:
    """The names that every rank gives. Called on all ranks; blocks.

    Most ranks give what others of their stage give: each tells a digest first, and of equal ones a single
    rank tells the names, to rank 0 only.

    Args:
        tag: unique in the life of the channel.
    """
    listed = msgspec.json.encode(sorted(names))
    asked: list[int] = reduce(
        channel, f"{tag}/digest", digest(listed), _first_ranks, timeout_seconds=timeout_seconds
    )
    told = _packed(listed) if channel.rank in asked else None
    common: list[str] = reduce(channel, f"{tag}/names", told, _common, timeout_seconds=timeout_seconds)
    return frozenset(common)


def _first_ranks(digests: list[str]) -> list[int]:
    """The first rank of each digest."""
    return sorted({one: rank for rank, one in reversed(list(enumerate(digests)))}.values())


def _common(messages: list[str | None]) -> list[str]:
    return sorted(set.intersection(*(_unpacked(message) for message in messages if message is not None)))


def _packed(listed: bytes) -> str:
    """Names repeat each other: a tenth of their size is left."""
    return base64.b64encode(zlib.compress(listed)).decode()


def _unpacked(message: str) -> set[str]:
    names: Any = msgspec.json.decode(zlib.decompress(base64.b64decode(message)))
    return set(names)
