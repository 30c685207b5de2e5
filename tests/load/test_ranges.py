"""What a read gives to a piece, as arithmetic: every element once, and no more bytes than blocks ask for."""

from __future__ import annotations

import itertools
import random

import pytest

from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.fragment import ChunkEntry
from dcp_ckpt.load.ranges import (
    MERGE_GAP_BYTES,
    READ_BYTES,
    Piece,
    Stretch,
    cover,
    parts_between,
    pieces_of,
    stretches_of,
)

MIB = 1 << 20


def positions(sizes: tuple[int, ...], strides: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """The place of each element in file order."""
    return {
        index: sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, sizes))
    }


def random_layout(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and descending strides: dense, with gaps, expanded, or overlapping."""
    sizes = tuple(rng.choice([1, 1, 2, 3, 5, 7]) for _ in range(rng.randint(0, 4)))
    strides: list[int] = []
    stride = 1
    for size in reversed(sizes):
        stride = max(strides[-1] if strides else 0, stride + rng.choice([-1, 0, 0, 0, 1, 9]))
        strides.append(stride)
        stride *= size
    return sizes, tuple(reversed(strides))


@pytest.mark.parametrize("first_seed", range(0, 600, 100))
def test_the_parts_between_all_cuts_make_up_the_box(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        rng = random.Random(seed)
        sizes, strides = random_layout(rng)
        wanted = positions(sizes, strides)
        span = max(wanted.values()) + 1
        cuts = sorted({-3, span + 2, *(rng.randint(0, span) for _ in range(rng.randint(0, 6)))})
        found: dict[tuple[int, ...], int] = {}
        for first, stop in itertools.pairwise(cuts):
            parts = list(parts_between(sizes, strides, first, stop))
            for part in parts:
                inside = positions(part.sizes, strides)
                assert max(inside.values()) + 1 == part.span, seed
                assert first <= part.first <= part.first + part.span <= max(stop, first), seed
                for index, place in inside.items():
                    whole = tuple(o + i for o, i in zip(part.offsets, index, strict=True))
                    assert whole not in found, seed
                    found[whole] = part.first + place
        assert found == wanted, seed


def test_a_dense_box_is_cut_into_few_parts() -> None:
    sizes, strides = (50, 40, 30), (1200, 30, 1)
    for first in range(0, 60_000, 777):
        assert len(list(parts_between(sizes, strides, first, first + 9_999))) <= 5


def chunk(sizes: tuple[int, ...]) -> ChunkEntry:
    return ChunkEntry(
        tensor="t",
        offsets=[0] * len(sizes),
        sizes=list(sizes),
        file=0,
        payload_offset=4096,
        container_offset=0,
        container_bytes=1 << 40,
    )


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes"),
    [
        ((16, 2048, 1024), (0, 512, 0), (16, 512, 1024)),
        ((4, 16 << 20), (0, 8 << 20), (4, 4 << 20)),
        ((3, 4, 8 << 20), (0, 1, 1 << 20), (3, 2, 1 << 20)),
    ],
    ids=["experts by rows", "long rows", "both"],
)
def test_what_lies_far_from_what_is_wanted_is_not_read(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    wanted = Box(offsets, sizes)
    pieces = pieces_of("t", "float32", wanted, [(0, chunk(shape))])
    reads = cover(pieces, {(0, 0): 1 << 40})
    read_bytes = sum(read.num_bytes for read in reads)
    assert read_bytes <= 4 * wanted.num_elements + 2 * MIB * len(pieces)
    assert all(read.num_bytes <= READ_BYTES for read in reads)


def test_near_rows_are_one_piece() -> None:
    wanted = Box((0, 100), (5000, 50))
    assert MERGE_GAP_BYTES > 4 * 1000
    assert len(pieces_of("t", "float32", wanted, [(0, chunk((5000, 1000)))])) == 1


def dense(start: int, num_bytes: int) -> Piece:
    return Piece(
        tensor="w",
        rank=0,
        file=0,
        start=start,
        num_bytes=num_bytes,
        sizes=(num_bytes,),
        strides=(1,),
        outer=(slice(0, num_bytes),),
    )


def test_a_read_is_cut_where_its_memory_changes() -> None:
    pieces = [dense(4096, 3 * READ_BYTES), dense(3 * READ_BYTES + 8192, 5)]
    reads = cover(pieces, {(0, 0): 3 * READ_BYTES + 9000})
    first, *_, last = (stretches_of(read, pieces, [True, True]) for read in reads)
    assert first == [Stretch(None, 0, 4096), Stretch(0, 0, READ_BYTES - 4096)]
    assert last == [
        Stretch(0, 3 * READ_BYTES - 4096, 4096),
        Stretch(None, 0, 4096),
        Stretch(1, 0, 5),
        Stretch(None, 0, 803),
    ]


def test_a_read_is_copied_where_it_cannot_be_cut() -> None:
    def cut(pieces: list[Piece], fits: list[bool]) -> list[Stretch] | None:
        (read,) = cover(pieces, {(0, 0): MIB})
        return stretches_of(read, pieces, fits)

    assert cut([dense(0, 10), dense(10, 10)], [True, True]) is not None
    assert cut([dense(0, 10), dense(10, 10)], [True, False]) is None
    assert cut([dense(0, 10), dense(9, 10)], [True, True]) is None, "two targets want the same bytes"
    many = [dense(2 * i, 1) for i in range(100)]
    assert cut(many, [True] * 100) is None
