"""Filling target tensors from a checkpoint: read whole blocks, check them, copy what is wanted.

Nothing unchecked ever reaches a target. Local to a rank; blocks; several reads are under way at once, each
checked and copied by the thread that read it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dcp_ckpt.errors import CorruptCheckpoint, StorageError
from dcp_ckpt.format.boxes import Box, tiling_problem
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.ranges import Piece, Read, cover, pieces_of
from dcp_ckpt.load.source import Source
from dcp_ckpt.storage.base import ByteRange

__all__ = ["Request", "Target", "fill", "fill_requests"]

_UNCHECKED_BLOCK_BYTES = 4096
"""Without digests a read need not cover whole blocks, only whole pages."""


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
        targets: by stored name; dtype as stored.
        verify: check the digest of every block read, where there are digests.
        concurrency: threads that read, check and copy.

    Returns:
        Bytes read from storage.

    Raises:
        CorruptCheckpoint: a block differs from its digest, a file is missing or too short. Targets may be
            partly filled then, but only with checked bytes.
    """
    wanted = {name: target.box for name, target in targets.items()}
    requests = [
        Request(name=name, target=targets[name], chunks=chunks)
        for name, chunks in source.chunks(wanted).items()
    ]
    return fill_requests(source, requests, verify=verify, concurrency=concurrency)


@torch.no_grad()
def fill_requests(source: Source, requests: Sequence[Request], *, verify: bool, concurrency: int) -> int:
    """As `fill`, where a tensor may have several targets; a target of another dtype is cast into."""
    verify = verify and source.has_digests
    pieces: list[Piece] = []
    landings: list[_Landing] = []
    for request in requests:
        dtype = source.tensors[request.name].dtype
        found = pieces_of(request.name, dtype, request.target.box, request.chunks)
        _require_covered(request.name, request.target.box, found, path=source.directory)
        pieces += found
        landings += [_Landing(piece, request.target, getattr(torch, dtype)) for piece in found]
    files = {(piece.rank, piece.file) for piece in pieces}
    block_bytes = BLOCK_BYTES if source.has_digests else _UNCHECKED_BLOCK_BYTES
    reads = cover(pieces, {key: source.file_bytes(*key) for key in files}, block_bytes=block_bytes)

    def consume(index: int, data: memoryview) -> None:
        read = reads[index]
        if verify:
            _check(source, read, data, pieces)
        content = torch.frombuffer(data, dtype=torch.uint8)
        for member in read.pieces:
            landings[member].take(content, read.start)

    try:
        source.storage.read_ranges(
            [
                ByteRange(
                    key=source.file_key(read.rank, read.file), offset=read.start, num_bytes=read.num_bytes
                )
                for read in reads
            ],
            consume,
            concurrency=concurrency,
        )
    except StorageError as error:
        stated = {source.file_key(*key): source.file_bytes(*key) for key in files}
        if damage := source.damage(error, stated):
            damage.message += _needed_from(source, damage.path or "", pieces)
            raise damage from error
        raise
    return sum(read.num_bytes for read in reads)


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
    stop = max(piece.start + piece.num_bytes for piece in wanted)
    note = source.file_note(wanted[0].rank, wanted[0].file)
    return f"; bytes {min(piece.start for piece in wanted)} to {stop} of it hold {', '.join(names)}{note}"


def _check(source: Source, read: Read, data: memoryview, pieces: Sequence[Piece]) -> None:
    for position in range(0, read.num_bytes, BLOCK_BYTES):
        block = read.first_block + position // BLOCK_BYTES
        if digest(data[position : position + BLOCK_BYTES]) == source.block_digest(
            read.rank, read.file, block
        ):
            continue
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, read.start + read.num_bytes)
        names = sorted(
            {
                pieces[member].tensor
                for member in read.pieces
                if pieces[member].start < stop and start < pieces[member].start + pieces[member].num_bytes
            }
        )
        raise CorruptCheckpoint(
            f"block {block} (bytes {start} to {stop}) differs from its digest; "
            f"it holds {', '.join(names) or 'framing'}{source.file_note(read.rank, read.file)}",
            phase="read",
            path=source.file_key(read.rank, read.file),
        )


class _Landing:
    """Where one piece's bytes go: straight into the target, or into a buffer that is copied when full."""

    def __init__(self, piece: Piece, target: Target, dtype: torch.dtype) -> None:
        self._piece = piece
        self._dtype = dtype
        self._region = target.local[piece.outer] if piece.outer else target.local
        self._bytes: torch.Tensor | None = None
        self._is_direct = False
        region = self._region
        is_plain = region.is_cpu and region.is_contiguous() and not region.is_conj() and not region.is_neg()
        if piece.is_whole and is_plain and region.dtype == dtype:
            self._bytes = self._region.reshape(-1).view(torch.uint8)
            self._is_direct = True
        self._left = piece.num_bytes
        self._lock = threading.Lock()

    def take(self, source: torch.Tensor, source_start: int) -> None:
        """Copy the part of `source` (file bytes from `source_start`) that belongs to this piece."""
        start = max(self._piece.start, source_start)
        stop = min(self._piece.start + self._piece.num_bytes, source_start + source.numel())
        with self._lock:
            if self._bytes is None:
                self._bytes = torch.empty(self._piece.num_bytes, dtype=torch.uint8, device="cpu")
        into = self._bytes[start - self._piece.start : stop - self._piece.start]
        into.copy_(source[start - source_start : stop - source_start])
        with self._lock:
            self._left -= stop - start
            if self._left or self._is_direct:
                return
        elements = self._bytes.view(self._dtype)
        if self._piece.strides is None:
            rows = elements.view(self._piece.rows)[self._piece.inner]
        else:
            rows = elements.as_strided(self._piece.rows, self._piece.strides)
        with torch.inference_mode(self._region.is_inference()):
            self._region.copy_(rows)
        self._bytes = None
