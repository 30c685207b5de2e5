"""Canonical JSON documents: how they are written, and how they are read and refused.

Owns encoding, the check of `format` and `format_version`, and the translation of decoding
errors. Knows no storage; callers pass the path only for the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from dcp_ckpt.errors import CorruptCheckpoint, FormatTooNew

__all__ = ["FORMAT_VERSION", "decode_document", "encode_json"]

FORMAT_VERSION = 1

_Document = TypeVar("_Document")


@dataclass(frozen=True, kw_only=True)
class _Header:
    format: str
    format_version: int


def encode_json(document: Any) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8. Equal documents give equal bytes."""
    return msgspec.json.encode(document, order="sorted")


def decode_document(data: bytes, kind: type[_Document], *, format: str, path: str) -> _Document:
    """Decode and validate one document.

    Args:
        data: the file's bytes.
        kind: the dataclass to build; unknown fields are ignored.
        format: the required value of the field `format`.
        path: named in the error.

    Raises:
        CorruptCheckpoint: not JSON, another kind of document, a field missing or mistyped.
        FormatTooNew: written by a newer version of the format.
    """
    try:
        header = msgspec.json.decode(data, type=_Header)
        if header.format != format:
            raise CorruptCheckpoint(f"not a {format} document but {header.format!r}", phase="read", path=path)
        if header.format_version > FORMAT_VERSION:
            raise FormatTooNew(
                f"{format} has format version {header.format_version}, "
                f"this dcp_ckpt reads up to {FORMAT_VERSION}: upgrade dcp_ckpt to read it",
                phase="read",
                path=path,
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a valid {format} document: {error}", phase="read", path=path) from error
