"""What is shared and what is written, decided without files: pure rules, and tables that fit together."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_ckpt.format.consistency import tables_problem
from dcp_ckpt.format.fragment import ChunkEntry, FileEntry, Fragment
from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.save.payloads import Comparer, live_digest
from dcp_ckpt.save.plan import SavePlan, make_plan
from dcp_ckpt.save.reuse import Base, StoredChunk, choose_shared
from dcp_ckpt.save.selection import Selected, Selector
from dcp_ckpt.state.component import Captured

KIB = 1 << 10
MIB = 1 << 20
Tensors = dict[tuple[str, ...], torch.Tensor]


def stored(file: int, num_bytes: int) -> StoredChunk:
    entry = ChunkEntry(
        tensor="t", offsets=[0], sizes=[1], file=file, payload_offset=0, container_offset=0,
        container_bytes=num_bytes,
    )  # fmt: skip
    return StoredChunk(entry, "0" * 32)


def test_a_file_of_which_half_is_used_is_shared() -> None:
    split = choose_shared(3, {0: stored(0, MIB), 2: stored(1, MIB)}, [2 * MIB, 2 * MIB + 1])
    assert (split.fresh, split.settled, split.shared) == ((1,), (2,), (0,))


def test_little_is_written_rather_than_linked_or_given_a_file() -> None:
    split = choose_shared(2, {0: stored(0, 10 * KIB), 1: stored(1, 70 * KIB)}, [12 * KIB, 128 * KIB])
    assert (split.fresh, split.settled, split.shared) == ((0,), (), (1,))


def test_when_there_are_many_files_those_that_hold_least_become_one() -> None:
    for count, kept in ((32, 32), (33, 16), (100, 16)):
        unchanged = {number: stored(number, MIB + number) for number in range(count)}
        split = choose_shared(count, unchanged, [MIB + number for number in range(count)])
        assert split.shared == tuple(range(count - kept, count))
        assert split.settled == tuple(range(count - kept))


def tensors_of(rng: random.Random) -> Tensors:
    sizes = [rng.choice([1, 100, 5_000, 70_000, 200_000]) for _ in range(rng.randint(1, 12))]
    return {(f"t{number:02}",): torch.full((size,), float(number)) for number, size in enumerate(sizes)}


def plan_of(tensors: Tensors) -> SavePlan:
    return make_plan(Captured(tensors=tensors), rank=0, world_size=1, global_ranks=[0])


def fragment_of(plan: SavePlan, selected: Selected, digests: list[str], save: int) -> Fragment:
    selection = selected.selection
    fresh_bytes = selection.tensor_bytes - selection.settled_bytes
    sizes = [fresh_bytes] if selection.has_fresh else []
    sizes += [selection.settled_bytes] if selection.settled_bytes else []
    written = [FileEntry(size_bytes=size, block_digests="") for size in sizes]
    return Fragment(
        run_id="r", epoch=1, epoch_id="e", attempt=str(AttemptId(1, save)), step=save, rank=0, world_size=1,
        files=[*written, *(entry for entry, _ in selected.shared)], meshes=plan.meshes, tensors=plan.tensors,
        chunks=selection.chunks, layout=selection.digest, values={}, per_rank={}, replicated="0" * 32,
        payload_digests="".join(digests),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_any_history_of_changes_gives_tables_that_fit(seed: int) -> None:
    """Chunks lie in their files, do not overlap, and are where bytes of their digest were written."""
    rng = random.Random(seed)
    tensors = tensors_of(rng)
    plan, selector, comparer = plan_of(tensors), Selector(), Comparer()
    base: Base | None = None
    contents: dict[tuple[str, int, int], str] = {}
    for save in range(1, 9):
        for tensor in tensors.values():
            if rng.random() < 0.3:
                tensor[rng.randrange(tensor.numel())] += 1
        live = list(tensors.values())
        unchanged = {} if base is None else comparer.find_unchanged(plan, live, [False] * len(live), base)
        selected = selector.select(plan, base, unchanged, has_values=False)
        digests = [
            live_digest(plan.dtype_name(number), plan.part(number, live))
            for number in range(len(plan.chunks))
        ]
        fragment = fragment_of(plan, selected, digests, save)
        assert tables_problem(fragment) is None
        assert {chunk.tensor for chunk in fragment.chunks} == set(plan.names)
        base = Base.of(StepDir(save), fragment)
        for chunk, digest in zip(fragment.chunks, digests, strict=True):
            origin = base.files[chunk.file].origin
            assert origin is not None
            place = (origin.attempt, origin.file, chunk.payload_offset)
            assert contents.setdefault(place, digest) == digest, "a chunk points to other bytes"
        used = sum(chunk.container_bytes for chunk in fragment.chunks)
        assert sum(file.size_bytes for file in fragment.files) <= 2 * used + 64 * KIB


def test_equal_selections_are_one_object() -> None:
    tensors: Tensors = {(f"t{number}",): torch.full((100_000,), float(number)) for number in range(4)}
    plan, selector = plan_of(tensors), Selector()
    live = list(tensors.values())
    digests = [live_digest("float32", tensor) for tensor in live]
    first = selector.select(plan, None, {}, has_values=False)
    base = Base.of(StepDir(1), fragment_of(plan, first, digests, 1))
    unchanged = {number: base.chunks[(f"t{number}", (0,), (100_000,))] for number in range(3)}
    second = selector.select(plan, base, unchanged, has_values=False)
    renamed = replace(base, attempt=AttemptId(1, 2), keys=tuple(f"other/{key}" for key in base.keys))
    third = selector.select(plan, renamed, unchanged, has_values=False)
    assert third.selection is second.selection
    assert third.shared != second.shared


def test_what_changes_all_the_time_is_looked_at_now_and_then() -> None:
    """Digesting costs as much as copying; but what comes to rest is found."""
    tensors: Tensors = {(f"t{number:02}",): torch.zeros(1000) for number in range(24)}
    plan, comparer = plan_of(tensors), Comparer()
    live = list(tensors.values())
    everything = Selector().select(plan, None, {}, has_values=False)
    looks = []
    for save in range(1, 30):
        digests = [live_digest("float32", tensor) for tensor in live]
        base = Base.of(StepDir(save), fragment_of(plan, everything, digests, save))
        if save < 20:
            for tensor in live[12:]:
                tensor += 1
        unchanged = comparer.find_unchanged(plan, live, [False] * len(live), base)
        assert set(range(12)) <= unchanged.keys()
        looks.append(len(unchanged) - 12)
    assert looks[:19] == [0] * 19
    assert looks[19] in (1, 2)
    assert looks[-1] == 12


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn]
)
def test_the_digest_is_that_of_the_row_major_bytes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(dtype).removeprefix("torch.")
    data = torch.randint(0, 2, (64 * 48 * dtype.itemsize,), generator=torch.Generator().manual_seed(1))
    whole = data.to(torch.uint8).view(dtype).reshape(64, 48)
    views = [whole.t(), whole[1:60:2, 3:], whole[5], whole.reshape(4, 16, 48).transpose(0, 2), whole[3, 4]]
    for piece_bytes in (16 << 20, 1000, 10):
        monkeypatch.setattr("dcp_ckpt.save.payloads._PIECE_BYTES", piece_bytes)
        for view in (whole, *views):
            assert live_digest(name, view) == live_digest(name, view.contiguous())
    assert live_digest(name, whole) != live_digest("other", whole)
    assert live_digest(name, whole) != live_digest(name, whole.reshape(48, 64))


def test_the_digest_of_a_conjugate_view_is_that_of_its_values() -> None:
    tensor = torch.randn(40, dtype=torch.complex64)
    assert live_digest("complex64", tensor.conj()) == live_digest("complex64", tensor.conj().resolve_conj())
    assert live_digest("complex64", tensor.conj()) != live_digest("complex64", tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_digest_of_a_tensor_on_a_gpu_is_that_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcp_ckpt.save.payloads._PIECE_BYTES", 1 << 20)
    tensor = torch.randn(3000, 1000, device="cuda").add_(1.0)
    assert live_digest("float32", tensor) == live_digest("float32", tensor.cpu())
    assert live_digest("float32", tensor.t()) == live_digest("float32", tensor.t().contiguous().cpu())
