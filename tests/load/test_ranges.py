"""Which bytes go where: pieces are small enough to be held beside their targets."""

from __future__ import annotations

import pytest

from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.ranges import pieces_of


def chunk_of(offsets: list[int], sizes: list[int]) -> ChunkEntry:
    return ChunkEntry(
        tensor="w",
        offsets=offsets,
        sizes=sizes,
        file=0,
        payload_offset=4096,
        container_offset=0,
        container_bytes=0,
    )


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [([0, 0], [8192, 8192]), ([0, 4096], [8192, 4096]), ([100, 0], [4000, 8192]), ([8000, 8000], [100, 100])],
    ids=["whole", "columns", "rows", "corner"],
)
def test_pieces_are_bounded_and_tile_what_is_wanted(offsets: list[int], sizes: list[int]) -> None:
    """On its way into a part of each row, onto a GPU or into another dtype a piece is held whole."""
    wanted = Box.whole((8192, 8192))
    pieces = pieces_of("w", "float32", wanted, [(0, chunk_of(offsets, sizes))])
    assert max(piece.num_bytes for piece in pieces) <= 16 << 20
    position, row = 4096, offsets[0]
    for piece in pieces:
        assert piece.start == position
        assert piece.is_whole
        assert piece.outer[0].start == row
        assert piece.outer[1] == slice(offsets[1], offsets[1] + sizes[1])
        position += piece.num_bytes
        row = piece.outer[0].stop
    assert position == 4096 + 4 * sizes[0] * sizes[1]
    assert row == offsets[0] + sizes[0]
