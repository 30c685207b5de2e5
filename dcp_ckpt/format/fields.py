"""Types of the fields of documents: what decoding alone refuses, at the cost of a comparison in C.

An error of decoding names the field (`$.chunks[3].payload_offset`), so limits that are properties of one
number or one string are stated here and not checked again. Called by every module that defines a document.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from dcp_ckpt.format.dtypes import MOST_DIMENSIONS

__all__ = ["Count", "Digest", "Digests", "Dims", "Identity", "RankRuns", "Version"]

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A number, size or offset: never negative, and never more than a file can hold."""

Version = Annotated[int, Meta(ge=1)]
"""The version of a format; how large is not for decoding to say: a newer one is told apart from damage."""

Dims = Annotated[list[Count], Meta(max_length=MOST_DIMENSIONS)]
"""One number for each dimension of a tensor or mesh."""

RankRuns = list[Annotated[list[Count], Meta(min_length=2, max_length=2)]]
"""Ranks as runs `[first, count]`."""

Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Digests = Annotated[str, Meta(pattern=r"\A[0-9a-f]*\Z")]
"""Digests one after the other; how many there have to be says the size of the file."""

Identity = Annotated[str, Meta(max_length=128)]
"""A random id, or the spelling of an attempt: short, so that a message may show it."""
