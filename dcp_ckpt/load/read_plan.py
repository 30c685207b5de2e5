"""Which reads fill which targets, and what is done with the bytes of one read.

Local to a rank. Made for `load.fill`, which reads everything itself, and for `load.passing`, where ranks read
for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dcp_ckpt.errors import CorruptCheckpoint, StorageError
from dcp_ckpt.format.boxes import Box, tiling_problem
from dcp_ckpt.format.digests import BLOCK_BYTES, digest, digest_of_parts
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.landing import Landing, mark_written
from dcp_ckpt.load.ranges import READ_BYTES, Piece, Read, cover, pieces_of
from dcp_ckpt.load.source import Source
from dcp_ckpt.wording import shown_names

__all__ = ["MOST_READ_BYTES", "ReadPlan", "Request", "Target", "plan_reads", "requests_for"]

_PAGE_BYTES = 4096
"""Without digests a read need not cover whole blocks, only whole pages."""

_LARGEST_ITEM_BYTES = 16

MOST_READ_BYTES = READ_BYTES + _PAGE_BYTES
"""No read has more: some go on behind READ_BYTES, for elements that lie across its end."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor to fill: this rank's local part, and the box of the global tensor that it holds.

    Args:
        has_copies: other ranks may hold the same box.
    """

    local: torch.Tensor
    box: Box
    has_copies: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One target, and the chunks that fill it.

    Args:
        name: of the stored tensor.
        chunks: with the rank that stored each.
    """

    name: str
    target: Target
    chunks: Sequence[tuple[int, ChunkEntry]]


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """All reads of some targets.

    Args:
        reads: in order of file and offset.
        pieces: what chunks give to targets; reads name them by index.
        landings: where each piece goes.
        file_bytes: the stated size of each file, by rank and file index.
        verify: whether the blocks are checked against their digests.
    """

    source: Source
    reads: Sequence[Read]
    pieces: Sequence[Piece]
    landings: Sequence[Landing]
    file_bytes: Mapping[tuple[int, int], int]
    verify: bool

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return sum(read.num_bytes for read in self.reads)

    @property
    def is_for_gpu(self) -> bool:
        """Whether any of it is copied to a GPU."""
        return any(landing.gpu is not None for landing in self.landings)

    def check(self, read: Read, parts: Sequence[memoryview]) -> None:
        """Compare what was read with its digests; does nothing where nothing is to be verified.

        Args:
            parts: the bytes of the read, one part after the other.

        Raises:
            CorruptCheckpoint: a block differs.
        """
        for number, content in enumerate(_blocks(parts) if self.verify else ()):
            block = read.first_block + number
            found = digest(content[0]) if len(content) == 1 else digest_of_parts(content)
            if found != self.source.block_digest(read.rank, read.file, block):
                raise self._difference(read, block)

    def take(self, read: Read, data: memoryview) -> None:
        """Copy what the targets want of a read, whose bytes are `data`; they may change afterwards."""
        content = torch.frombuffer(data, dtype=torch.uint8)
        for member in read.pieces:
            self.landings[member].take(content, read)
        for gpu in {self.landings[member].gpu for member in read.pieces} - {None}:
            torch.cuda.current_stream(gpu).synchronize()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Tell failed reads as what they say of the checkpoint."""
        try:
            yield
        except StorageError as error:
            stated = {self.source.file_key(*key): size for key, size in self.file_bytes.items()}
            damage = self.source.damage(error, stated)
            if damage is None:
                raise
            damage.message += self._needed_from(damage.path or "")
            raise damage from error

    def _difference(self, read: Read, block: int) -> CorruptCheckpoint:
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, read.start + read.num_bytes)
        members = [self.pieces[member] for member in read.pieces]
        names = sorted({piece.tensor for piece in members if piece.start < stop and start < piece.stop})
        return CorruptCheckpoint(
            f"block {block} (bytes {start} to {stop}) differs from its digest; "
            f"it holds {shown_names(names) or 'framing'}{self.source.file_note(read.rank, read.file)}",
            phase="read",
            path=self.source.file_key(read.rank, read.file),
        )

    def _needed_from(self, path: str) -> str:
        """What is missing with one file, for a message."""
        key_of = self.source.file_key
        wanted = [piece for piece in self.pieces if path.endswith(key_of(piece.rank, piece.file))]
        if not wanted:
            return ""
        names = sorted({piece.tensor for piece in wanted})
        stop = max(piece.stop for piece in wanted)
        note = self.source.file_note(wanted[0].rank, wanted[0].file)
        return (
            f"; bytes {min(piece.start for piece in wanted)} to {stop} of it hold {shown_names(names)}{note}"
        )


def requests_for(source: Source, targets: Mapping[str, Target]) -> list[Request]:
    """One request for each target, by stored name.

    Raises:
        CorruptCheckpoint: what describes the chunks is missing or damaged.
    """
    wanted = {name: target.box for name, target in targets.items()}
    return [
        Request(name=name, target=targets[name], chunks=chunks)
        for name, chunks in source.chunks(wanted).items()
    ]


def plan_reads(source: Source, requests: Sequence[Request], *, verify: bool) -> ReadPlan:
    """Plan the reads of all requests. Reads nothing itself.

    The targets are marked as written: reads may go past torch.

    Raises:
        CorruptCheckpoint: chunks do not make up a target.
    """
    pieces: list[Piece] = []
    landings: list[Landing] = []
    for request in requests:
        dtype = source.tensors[request.name].dtype
        found = pieces_of(request.name, dtype, request.target.box, request.chunks)
        _require_covered(request.name, request.target.box, found, path=source.directory)
        pieces += found
        landings += [Landing(piece, request.target.local, getattr(torch, dtype)) for piece in found]
    mark_written(request.target.local for request in requests)
    file_bytes = {key: source.file_bytes(*key) for key in {(piece.rank, piece.file) for piece in pieces}}
    if source.has_digests:
        reads = cover(pieces, file_bytes)
    else:
        reads = cover(pieces, file_bytes, block_bytes=_PAGE_BYTES, overlap_bytes=_LARGEST_ITEM_BYTES - 1)
    return ReadPlan(
        source=source,
        reads=reads,
        pieces=pieces,
        landings=landings,
        file_bytes=file_bytes,
        verify=verify and source.has_digests,
    )


def _require_covered(name: str, wanted: Box, pieces: Sequence[Piece], *, path: str) -> None:
    """The chunks were checked to tile the tensor at the commit; if they do not, nothing may be read."""
    boxes = [
        Box(tuple(part.start for part in piece.outer), tuple(part.stop - part.start for part in piece.outer))
        for piece in pieces
    ]
    if problem := tiling_problem(wanted.sizes, boxes):
        raise CorruptCheckpoint(
            f"{name}: the stored chunks do not make it up: {problem}", phase="read", path=path
        )


def _blocks(parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The bytes of all parts, cut into blocks; the last one may be shorter."""
    block: list[memoryview] = []
    missing_bytes = BLOCK_BYTES
    for part in parts:
        while len(part):
            taken = part[:missing_bytes]
            block.append(taken)
            part = part[len(taken) :]
            missing_bytes -= len(taken)
            if not missing_bytes:
                yield block
                block, missing_bytes = [], BLOCK_BYTES
    if block:
        yield block
