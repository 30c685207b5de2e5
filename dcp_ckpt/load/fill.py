"""Filling target tensors from a checkpoint: read whole blocks, check them, copy what is wanted.

What lies in a target as it lies in the file is read into it and checked there, which takes half the time of a
copy on the way (benchmarks/NOTES.md); the rest is copied from memory that is used again. Local to a rank;
blocks; several reads are under way at once, each checked and copied by the thread that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dcp_ckpt.errors import CorruptCheckpoint, StorageError
from dcp_ckpt.format.boxes import Box, tiling_problem
from dcp_ckpt.format.digests import BLOCK_BYTES, digest, digest_of_parts
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.landing import Landing, mark_written
from dcp_ckpt.load.ranges import Piece, Read, Stretch, cover, pieces_of, stretches_of
from dcp_ckpt.load.source import Source
from dcp_ckpt.storage.base import ByteRange

__all__ = ["Request", "Target", "fill", "fill_requests"]

_PAGE_BYTES = 4096
"""Without digests a read need not cover whole blocks, only whole pages."""

_LARGEST_ITEM_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor to fill: this rank's local part, and the box of the global tensor that it holds."""

    local: torch.Tensor
    box: Box


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


def fill(source: Source, targets: Mapping[str, Target], *, verify: bool, concurrency: int) -> int:
    """Fill all targets in place.

    Args:
        targets: by stored name; one of another dtype is cast into.
        verify: check the digest of every block read, where there are digests.
        concurrency: threads that read, check and copy.

    Returns:
        Bytes read from storage.

    Raises:
        CorruptCheckpoint: a block differs from its digest, a file is missing or too short. The targets are
            not to be used then: parts of them are filled, and what was not found good is NaN (all bits set,
            where the type has none).
    """
    wanted = {name: target.box for name, target in targets.items()}
    requests = [
        Request(name=name, target=targets[name], chunks=chunks)
        for name, chunks in source.chunks(wanted).items()
    ]
    return fill_requests(source, requests, verify=verify, concurrency=concurrency)


@torch.no_grad()
def fill_requests(source: Source, requests: Sequence[Request], *, verify: bool, concurrency: int) -> int:
    """As `fill`, where a tensor may have several targets."""
    pieces: list[Piece] = []
    landings: list[Landing] = []
    for request in requests:
        dtype = source.tensors[request.name].dtype
        found = pieces_of(request.name, dtype, request.target.box, request.chunks)
        _require_covered(request.name, request.target.box, found, path=source.directory)
        pieces += found
        landings += [Landing(piece, request.target.local, getattr(torch, dtype)) for piece in found]
    mark_written(request.target.local for request in requests)
    stated = {key: source.file_bytes(*key) for key in {(piece.rank, piece.file) for piece in pieces}}
    if source.has_digests:
        reads = cover(pieces, stated)
    else:
        reads = cover(pieces, stated, block_bytes=_PAGE_BYTES, overlap_bytes=_LARGEST_ITEM_BYTES - 1)
    arrivals = _Arrivals(source, reads, pieces, landings, verify=verify and source.has_digests)
    try:
        source.storage.read_ranges(arrivals.ranges(), arrivals.consume, concurrency=concurrency)
    except StorageError as error:
        if damage := source.damage(error, {source.file_key(*key): size for key, size in stated.items()}):
            damage.message += _needed_from(source, damage.path or "", pieces)
            raise damage from error
        raise
    finally:
        arrivals.discard_unchecked()
    return sum(read.num_bytes for read in reads)


class _Arrivals:
    """What is done with each read, on the thread that made it."""

    def __init__(
        self,
        source: Source,
        reads: Sequence[Read],
        pieces: Sequence[Piece],
        landings: Sequence[Landing],
        *,
        verify: bool,
    ) -> None:
        self._source = source
        self._reads = reads
        self._pieces = pieces
        self._landings = landings
        self._verify = verify
        self._memory: dict[int, Sequence[memoryview]] = {}

    def ranges(self) -> list[ByteRange]:
        """The reads, with the memory of the targets where their bytes can lie as they are."""
        fits = [landing.takes_bytes for landing in self._landings]
        return [
            ByteRange(
                key=self._source.file_key(read.rank, read.file),
                offset=read.start,
                num_bytes=read.num_bytes,
                into=self._offer(number, stretches_of(read, self._pieces, fits)),
            )
            for number, read in enumerate(self._reads)
        ]

    def _offer(
        self, number: int, stretches: Sequence[Stretch] | None
    ) -> Callable[[], Sequence[memoryview]] | None:
        if stretches is None:
            return None

        def make() -> Sequence[memoryview]:
            parts = [
                memoryview(bytearray(stretch.num_bytes))
                if stretch.piece is None
                else self._landings[stretch.piece].memory(stretch.offset, stretch.num_bytes)
                for stretch in stretches
            ]
            self._memory[number] = parts
            return parts

        return make

    def consume(self, number: int, data: memoryview) -> None:
        read = self._reads[number]
        landed = self._memory.get(number) if not data else None
        if self._verify:
            _check(self._source, read, landed or [data], self._pieces)
        if landed is not None:
            del self._memory[number]
        else:
            content = torch.frombuffer(data, dtype=torch.uint8)
            for member in read.pieces:
                self._landings[member].take(content, read)

    def discard_unchecked(self) -> None:
        """Overwrite what was read into targets and not found good; no reading goes on any more.

        Whoever goes on with the state in spite of the error shall see it at once: all bits set are NaN in
        every floating type.
        """
        for parts in self._memory.values():
            for part in parts:
                part[:] = b"\xff" * len(part)
        self._memory.clear()


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


def _needed_from(source: Source, path: str, pieces: Sequence[Piece]) -> str:
    """What is missing with one file, for a message."""
    wanted = [piece for piece in pieces if path.endswith(source.file_key(piece.rank, piece.file))]
    if not wanted:
        return ""
    names = sorted({piece.tensor for piece in wanted})
    stop = max(piece.stop for piece in wanted)
    note = source.file_note(wanted[0].rank, wanted[0].file)
    return f"; bytes {min(piece.start for piece in wanted)} to {stop} of it hold {', '.join(names)}{note}"


def _check(source: Source, read: Read, parts: Sequence[memoryview], pieces: Sequence[Piece]) -> None:
    for number, content in enumerate(_blocks(parts)):
        block = read.first_block + number
        found = digest(content[0]) if len(content) == 1 else digest_of_parts(content)
        if found == source.block_digest(read.rank, read.file, block):
            continue
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, read.start + read.num_bytes)
        names = sorted(
            {
                pieces[member].tensor
                for member in read.pieces
                if pieces[member].start < stop and start < pieces[member].stop
            }
        )
        raise CorruptCheckpoint(
            f"block {block} (bytes {start} to {stop}) differs from its digest; "
            f"it holds {', '.join(names) or 'framing'}{source.file_note(read.rank, read.file)}",
            phase="read",
            path=source.file_key(read.rank, read.file),
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
