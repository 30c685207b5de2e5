"""One tensor out of a fragment, found in its text: its tables may have tens of thousands of other entries.

Pure. Knows the order of the fields in canonical JSON. It never says what is wrong with a fragment: where it
is not sure of something it finds nothing, and who asked decodes the whole fragment instead. Called by
`ops.one_tensor`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from dcp_ckpt.format.consistency import ranks_problem
from dcp_ckpt.format.digests import DIGEST_DIGITS, block_count
from dcp_ckpt.format.documents import FORMAT_VERSION, decoder_of, decoding, encode_json
from dcp_ckpt.format.dtypes import shape_problem
from dcp_ckpt.format.fields import Count, Identity, Version
from dcp_ckpt.format.fragment import FRAGMENT_FORMAT, ChunkEntry, FileEntry, TensorEntry
from dcp_ckpt.format.manifest import Manifest, require_listed

__all__ = ["SearchedFragment", "search_listed_fragment"]

_Entry = TypeVar("_Entry")


_CHUNKS_BEGIN = b'"byte_order":"little","chunks":['
_CHUNKS_END = b'],"copies":['


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """The fields of a fragment that are needed, without its chunks."""

    run_id: Identity
    epoch: Count
    epoch_id: Identity
    attempt: Identity
    step: Count
    rank: Count
    world_size: Count
    files: list[FileEntry]
    tensors: msgspec.Raw
    aliases: dict[str, list[list[str]]]
    format: str
    format_version: Version


class SearchedFragment:
    """A fragment whose tables are text.

    Args:
        data: the whole of it.
        chunks: where that table begins and ends, which `outline` does not have.
    """

    def __init__(self, outline: _Outline, data: bytes, chunks: tuple[int, int]) -> None:
        self.rank = outline.rank
        self.files = outline.files
        self._world_size = outline.world_size
        self._aliases = outline.aliases
        self._tensors = bytes(outline.tensors)
        self._data = data
        self._chunks = chunks

    def tensor(self, name: str) -> TensorEntry | None:
        """The tensor of this name, which may be one of several that it has."""
        for stored, paths in self._aliases.items():
            if name in map(".".join, paths):
                name = stored
        # Names are paths joined with dots, and parts of paths may have dots.
        parts = (re.escape(encode_json(part)[1:-1]) for part in name.split("."))
        pattern = b'"path":\\["' + rb'(?:\.|",")'.join(parts) + b'"\\],'
        spans = (match.span() for match in re.finditer(pattern, self._tensors))
        found = _entries(self._tensors, 0, spans, b'{"dtype":', TensorEntry)
        if len(found) != 1 or found[0].name != name:
            return None
        entry = found[0]
        is_sound = not (
            ranks_problem(entry.owners, self._world_size) or shape_problem(entry.dtype, entry.shape)
        )
        return entry if is_sound else None

    def chunks_of(self, name: str) -> list[ChunkEntry]:
        """Its chunks here, in files that there are; whether these are all, their boxes must tell."""
        spans = _occurrences(self._data, *self._chunks, b'"tensor":' + encode_json(name) + b"}")
        found = _entries(self._data, self._chunks[0], spans, b'{"container_bytes":', ChunkEntry)
        return [chunk for chunk in found if chunk.tensor == name and chunk.file < len(self.files)]


def _occurrences(data: bytes, start: int, stop: int, text: bytes) -> Iterator[tuple[int, int]]:
    """Where some text begins and ends, each time."""
    while (start := data.find(text, start, stop)) >= 0:
        yield start, start + len(text)
        start += len(text)


def _entries(
    data: bytes, begin: int, spans: Iterable[tuple[int, int]], first_field: bytes, kind: type[_Entry]
) -> list[_Entry]:
    """The entries around some spans, of a table that begins somewhere; none where one cannot be decoded."""
    found = []
    for start, stop in spans:
        first, last = data.rfind(first_field, begin, start), data.find(b"}", stop - 1)
        try:
            found.append(decoder_of(kind).decode(data[max(first, 0) : last + 1]))
        except ValueError:  # those of msgspec are
            return []
    return found


def search_listed_fragment(
    data: bytes, manifest: Manifest, rank: int, *, path: str
) -> SearchedFragment | None:
    """A fragment to search in, after its bytes were checked against the manifest; None for an unusual one.

    Raises:
        CorruptCheckpoint: its size or digest differs from the manifest's, or it is no JSON.
    """
    require_listed(data, manifest, rank, path=path)
    start = data.find(_CHUNKS_BEGIN) + len(_CHUNKS_BEGIN)
    stop = data.find(_CHUNKS_END, start - 1)
    if start < len(_CHUNKS_BEGIN) or stop < 0:
        return None
    with decoding(FRAGMENT_FORMAT, path=path):
        found = decoder_of(_Outline).decode(data[:start] + data[stop:])
    identity = found.run_id, found.epoch, found.epoch_id, found.attempt, found.step, found.world_size
    is_usual = (
        (found.format, found.format_version) == (FRAGMENT_FORMAT, FORMAT_VERSION)
        and (found.rank, identity) == (rank, manifest.identity)
        and all(
            len(file.block_digests) == DIGEST_DIGITS * block_count(file.size_bytes) for file in found.files
        )
    )
    return SearchedFragment(found, data, (start, stop)) if is_usual else None
