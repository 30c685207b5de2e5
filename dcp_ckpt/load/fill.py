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
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.load.ranges import Piece, Read, cover, pieces_of
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.storage.base import ByteRange

__all__ = ["Target", "fill"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor to fill: this rank's local part, and the box of the global tensor that it holds."""

    local: torch.Tensor
    box: Box


@torch.no_grad()
def fill(stored: StoredCheckpoint, targets: Mapping[str, Target], *, verify: bool, concurrency: int) -> int:
    """Fill all targets in place.

    Args:
        targets: by stored name; dtype as stored.
        verify: check the digest of every block read.
        concurrency: threads that read, check and copy.

    Returns:
        Bytes read from storage.

    Raises:
        CorruptCheckpoint: a block differs from its digest, a file is missing or too short. Targets may be
            partly filled then, but only with checked bytes.
    """
    wanted = {name: target.box for name, target in targets.items()}
    pieces: list[Piece] = []
    for name, chunks in stored.chunks(wanted).items():
        entry = stored.tensors[name]
        found = pieces_of(name, entry.dtype, targets[name].box, chunks)
        _require_covered(name, targets[name].box, found)
        pieces += found
    files = {(piece.rank, piece.file) for piece in pieces}
    reads = cover(pieces, {key: stored.file_bytes(*key) for key in files})
    landings = [_Landing(piece, targets[piece.tensor]) for piece in pieces]

    def consume(index: int, data: memoryview) -> None:
        read = reads[index]
        if verify:
            _check(stored, read, data, pieces)
        source = torch.frombuffer(data, dtype=torch.uint8)
        for member in read.pieces:
            landings[member].take(source, read.start)

    try:
        stored.storage.read_ranges(
            [
                ByteRange(
                    key=stored.file_key(read.rank, read.file), offset=read.start, num_bytes=read.num_bytes
                )
                for read in reads
            ],
            consume,
            concurrency=concurrency,
        )
    except StorageError as error:
        stated = {stored.file_key(*key): stored.file_bytes(*key) for key in files}
        if damage := stored.damage(error, stated):
            raise damage from error
        raise
    return sum(read.num_bytes for read in reads)


def _require_covered(name: str, wanted: Box, pieces: Sequence[Piece]) -> None:
    """The chunks were checked to tile the tensor at the commit; a gap here means damage or a defect."""
    found = 0
    for piece in pieces:
        count = 1
        for part in piece.inner:
            count *= part.stop - part.start
        found += count
    if found != wanted.num_elements:
        raise CorruptCheckpoint(
            f"{name}: the stored chunks give {found} of {wanted.num_elements} elements", phase="read"
        )


def _check(stored: StoredCheckpoint, read: Read, data: memoryview, pieces: Sequence[Piece]) -> None:
    for position in range(0, read.num_bytes, BLOCK_BYTES):
        block = read.first_block + position // BLOCK_BYTES
        if digest(data[position : position + BLOCK_BYTES]) == stored.block_digest(
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
            f"it holds {', '.join(names) or 'framing'}",
            phase="read",
            path=stored.file_key(read.rank, read.file),
        )


class _Landing:
    """Where one piece's bytes go: straight into the target, or into a buffer that is copied when full."""

    def __init__(self, piece: Piece, target: Target) -> None:
        self._piece = piece
        self._region = target.local[piece.outer] if piece.outer else target.local
        self._bytes: torch.Tensor | None = None
        self._is_direct = False
        if piece.is_whole and self._region.is_cpu and self._region.is_contiguous():
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
                self._bytes = torch.empty(self._piece.num_bytes, dtype=torch.uint8)
        into = self._bytes[start - self._piece.start : stop - self._piece.start]
        into.copy_(source[start - source_start : stop - source_start])
        with self._lock:
            self._left -= stop - start
            if self._left or self._is_direct:
                return
        rows = self._bytes.view(self._region.dtype).view(self._piece.rows)
        self._region.copy_(rows[self._piece.inner])
        self._bytes = None
