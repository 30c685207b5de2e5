"""The layout of a data file: aligned, without overlap, and the same each time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.save.layout import LARGE_BYTES, SEGMENT_BYTES, FileLayout, plan_file, round_up
from dcp_ckpt.save.placement import TensorSpec, assign_owners


def lay_out(tensors: list[tuple[str, tuple[int, ...]]]) -> FileLayout:
    specs = [
        TensorSpec(
            path=(f"t{number:03}",),
            dtype=dtype,
            item_bytes=DTYPES[dtype].item_bytes,
            shape=shape,
            mesh=None,
            dim_names=(),
            placements=(),
        )
        for number, (dtype, shape) in enumerate(tensors)
    ]
    return plan_file(specs, assign_owners(specs, rank=0, world_size=1).owned)


sizes = st.integers(0, 40) | st.sampled_from([LARGE_BYTES // 8, LARGE_BYTES, 70_000])
tensors = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(sizes, max_size=1).map(tuple) | st.just((3, 4096)))
)


@given(tensors)
def test_containers_are_aligned_and_do_not_overlap(given_tensors):
    layout = lay_out(given_tensors)
    assert layout.tensor_bytes % SEGMENT_BYTES == 0
    end = 0
    for chunk in layout.chunks:
        is_large = chunk.framing.payload_bytes >= LARGE_BYTES
        alignment = SEGMENT_BYTES if is_large else SLAB_ALIGNMENT_BYTES
        assert chunk.container_offset >= end
        assert chunk.container_offset - end < SEGMENT_BYTES
        assert chunk.container_offset % alignment == 0
        assert chunk.payload_offset % alignment == 0
        assert chunk.payload_offset == chunk.container_offset + len(chunk.framing.prefix)
        end = chunk.container_offset + chunk.framing.container_bytes
    assert end <= layout.tensor_bytes < end + SEGMENT_BYTES


@given(tensors)
def test_every_owned_chunk_has_its_place_and_large_ones_come_first(given_tensors):
    layout = lay_out(given_tensors)
    with_elements = [number for number, (_, shape) in enumerate(given_tensors) if 0 not in shape]
    assert sorted(chunk.owned.tensor for chunk in layout.chunks) == with_elements
    is_small = [chunk.framing.payload_bytes < LARGE_BYTES for chunk in layout.chunks]
    assert is_small == sorted(is_small)
    assert lay_out(given_tensors) == layout


def test_a_rank_that_owns_nothing_has_no_file():
    assert lay_out([]) == FileLayout(chunks=(), tensor_bytes=0)
    assert lay_out([("float32", (0, 3))]).tensor_bytes == 0


def test_rounding_up():
    assert [round_up(value, 64) for value in (0, 1, 64, 65)] == [0, 64, 64, 128]
