"""Canonical JSON documents: how they are written, and how they are read and refused.

Owns encoding, the check of `format` and `format_version`, and the translation of decoding
errors. Knows no storage; callers pass the path only for the message.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from dcp_ckpt.errors import CorruptCheckpoint, FormatTooNew
from dcp_ckpt.format.fields import Version

__all__ = ["FORMAT_VERSION", "converted", "decode_document", "decoder_of", "decoding", "encode_json"]

FORMAT_VERSION = 1

_Document = TypeVar("_Document")

_preparing = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class _Header:
    format: str
    format_version: Version


def encode_json(document: Any) -> bytes:
    """Canonical JSON: sorted keys, no white space, UTF-8. Equal documents give equal bytes."""
    return msgspec.json.encode(document, order="sorted")


def decoder_of(kind: type[_Document]) -> msgspec.json.Decoder[_Document]:
    """What decodes JSON into a dataclass.

    One thread at a time: msgspec 0.22 lets a second one see what the first has prepared by half for a type,
    and crashes the process.
    """
    with _preparing:
        return _decoder(cast(Hashable, kind))


def converted(kind: type[_Document], message: Any) -> _Document:
    """A dataclass from what its JSON decodes to.

    Raises:
        ValueError: it is something else.
    """
    decoder_of(kind)  # what it prepares is used here, too
    return msgspec.convert(message, type=kind)


@contextmanager
def decoding(format: str, *, path: str) -> Iterator[None]:
    """Raise what damaged or hostile JSON makes a decoder raise as `CorruptCheckpoint`."""
    try:
        yield
    except (ValueError, ArithmeticError, RecursionError) as error:  # those of msgspec are ValueErrors
        raise CorruptCheckpoint(f"not a valid {format} document: {error}", phase="read", path=path) from error


def decode_document(data: bytes, kind: type[_Document], *, format: str, path: str) -> _Document:
    """Decode and validate one document.

    Args:
        data: the file's bytes.
        kind: the dataclass to build; unknown fields are ignored.
        format: the required value of the field `format`.
        path: named in the error.

    Raises:
        CorruptCheckpoint: not JSON, another kind of document, a field missing, mistyped, out of its limits or
            stated twice; the message names the field.
        FormatTooNew: written by a newer version of the format.
    """
    document = _decoded_at_once(data, kind, format)
    if document is not None:
        return document
    with decoding(format, path=path):
        header = decoder_of(_Header).decode(data)
    if header.format != format:
        raise CorruptCheckpoint(f"not a {format} document but {header.format!r:.80}", phase="read", path=path)
    if header.format_version > FORMAT_VERSION:
        raise FormatTooNew(
            f"{format} has format version {_shown(header.format_version)}, "
            f"this dcp_ckpt reads up to {FORMAT_VERSION}: upgrade dcp_ckpt to read it",
            phase="read",
            path=path,
        )
    with decoding(format, path=path):
        document = decoder_of(kind).decode(data)
        _check_slowly(data)
    return document


def _decoded_at_once(data: bytes, kind: type[_Document], format: str) -> _Document | None:
    """What we write, and nothing else; None for what has to be looked at more closely.

    The same bytes again mean that nothing was stated twice. What is left to a default is not among the
    attributes of the document itself, and not encoded.
    """
    try:
        document = decoder_of(kind).decode(data)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    stated = vars(document)
    is_known = stated.get("format") == format and stated.get("format_version", 0) in range(
        1, FORMAT_VERSION + 1
    )
    return document if is_known and encode_json(document) == data else None


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _check_slowly(data: bytes) -> None:
    """Find what decoding into a type skips over: damage in unknown fields, and names that come twice."""
    import json  # what we wrote ourselves needs no such look, and commands start fast

    msgspec.json.decode(data)
    json.loads(data, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the field {counts.most_common(1)[0][0]!r:.80} is there twice")
    return found


def _shown(version: int) -> str:
    return str(version) if version < 1 << 64 else "far above"
