"""Filling target tensors from a checkpoint: read whole blocks, check them, copy what is wanted.

Nothing unchecked ever reaches a target. Local to a rank; blocks; several reads are under way at once, each
checked and copied by the thread that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dcp_ckpt.errors import CorruptCheckpoint, StorageError
from dcp_ckpt.format.boxes import Box, tiling_problem
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.ranges import Piece, Read, cover, parts_between, pieces_of
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
    """As `fill`, where a tensor may have several targets."""
    verify = verify and source.has_digests
    pieces: list[Piece] = []
    landings: list[_Landing] = []
    for request in requests:
        dtype = source.tensors[request.name].dtype
        found = pieces_of(request.name, dtype, request.target.box, request.chunks)
        _require_covered(request.name, request.target.box, found, path=source.directory)
        pieces += found
        landings += [_Landing(piece, request.target.local, getattr(torch, dtype)) for piece in found]
    files = {(piece.rank, piece.file) for piece in pieces}
    stated = {key: source.file_bytes(*key) for key in files}
    if source.has_digests:
        reads = cover(pieces, stated)
    else:
        reads = cover(pieces, stated, block_bytes=_PAGE_BYTES, overlap_bytes=_LARGEST_ITEM_BYTES - 1)

    def consume(index: int, data: memoryview) -> None:
        read = reads[index]
        if verify:
            _check(source, read, data, pieces)
        content = torch.frombuffer(data, dtype=torch.uint8)
        for member in read.pieces:
            landings[member].take(content, read)

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
        if damage := source.damage(error, {source.file_key(*key): stated[key] for key in files}):
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
    stop = max(piece.stop for piece in wanted)
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
                if pieces[member].start < stop and start < pieces[member].stop
            }
        )
        raise CorruptCheckpoint(
            f"block {block} (bytes {start} to {stop}) differs from its digest; "
            f"it holds {', '.join(names) or 'framing'}{source.file_note(read.rank, read.file)}",
            phase="read",
            path=source.file_key(read.rank, read.file),
        )


class _Landing:
    """Where one piece goes: each read's elements straight to their places, nothing kept in between."""

    def __init__(self, piece: Piece, local: torch.Tensor, dtype: torch.dtype) -> None:
        region = local[piece.outer] if piece.outer else local
        sizes, strides = piece.sizes, piece.strides
        if piece.is_row_major and region.is_contiguous():
            region, sizes, strides = region.reshape(-1), (region.numel(),), (1,)
        else:
            order = sorted(range(len(sizes)), key=strides.__getitem__, reverse=True)
            region = region.permute(order)
            sizes, strides = tuple(sizes[dim] for dim in order), tuple(strides[dim] for dim in order)
        self._region, self._sizes, self._strides = region, sizes, strides
        self._dtype = dtype
        self._start = piece.start

    def take(self, content: torch.Tensor, read: Read) -> None:
        """Copy, and cast, all elements of the piece that begin in `read`, whose bytes are `content`."""
        item_bytes = self._dtype.itemsize
        first = -((self._start - read.start) // item_bytes)
        stop = -((self._start - read.stop) // item_bytes)
        with torch.inference_mode(self._region.is_inference()):
            self._copy(content, read, first, stop)

    def _copy(self, content: torch.Tensor, read: Read, first: int, stop: int) -> None:
        item_bytes = self._dtype.itemsize
        for part in parts_between(self._sizes, self._strides, first, stop):
            start = self._start + part.first * item_bytes - read.start
            found = content[start : start + part.span * item_bytes]
            if start % item_bytes:
                found = found.clone()  # stock containers begin at any offset
            elements = found.view(self._dtype)
            if self._strides != (1,):
                elements = elements.as_strided(part.sizes, self._strides)
            place = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
            self._region[place].copy_(elements)
