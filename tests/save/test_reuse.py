"""What is unchanged is not written again: one process, real saves, real files."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, open_checkpoint, verify
from dcp_ckpt.errors import CheckpointError, CorruptCheckpoint, StorageNotFound
from dcp_ckpt.format.fragment import Fragment, decode_fragment
from dcp_ckpt.ops.copy import copy_checkpoint
from dcp_ckpt.policies import LatestN
from dcp_ckpt.save.handle import CheckpointInfo

WAIT = 60.0
ELEMENTS = 100_000
"""Of each tensor: 400 kB, a segment of its own."""


def settings(**changes: Any) -> CheckpointConfig:
    defaults: dict[str, Any] = {"keep": None, "grace_seconds": 0.0, "timeout_seconds": WAIT, "reuse": True}
    return CheckpointConfig(**defaults | changes)


def tensors(count: int = 6) -> dict[str, Any]:
    return {f"t{number}": torch.full((ELEMENTS,), float(number)) for number in range(count)}


def save(checkpointer: Checkpointer, state: Any, step: int) -> CheckpointInfo:
    return checkpointer.save(state, step=step).result(WAIT)


def fragment_of(run: Path, step: int) -> Fragment:
    (path,) = (run / f"step-{step:08}").glob("rank-00000.*.json")
    return decode_fragment(path.read_bytes(), path=str(path))


def data_files(run: Path, step: int) -> list[Path]:
    return sorted((run / f"step-{step:08}").glob("*.distcp"))


def require_loads(run: Path, step: int, state: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(run / f"step-{step:08}") as checkpoint:
        for name, tensor in state.items():
            assert torch.equal(checkpoint.read_tensor(name), tensor), name


def test_only_what_has_changed_is_written_and_older_checkpoints_may_go(tmp_path: Path) -> None:
    state = tensors()
    one = ELEMENTS * 4
    with Checkpointer(tmp_path, config=settings(keep=LatestN(1))) as checkpointer:
        first = save(checkpointer, state, 1)
        assert first.shared_bytes == 0
        for step in range(2, 6):
            state[f"t{step % 2}"] += 1
            info = save(checkpointer, state, step)
            assert one < info.bytes - info.shared_bytes < 2 * one + 100_000, "written: what changed since"
            require_loads(tmp_path, step, state)
            assert verify(tmp_path).ok
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005"]
    entries = fragment_of(tmp_path, 5).files
    assert {entry.origin and entry.origin.directory for entry in entries} == {
        None, "step-00000001", "step-00000004",
    }  # fmt: skip
    assert all(path.stat().st_nlink == 1 for path in data_files(tmp_path, 5))


def test_the_last_name_of_a_file_keeps_its_bytes(tmp_path: Path) -> None:
    state = tensors()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, state, step)
    (file,) = data_files(tmp_path, 3)
    assert file.stat().st_nlink == 3
    assert len({path.stat().st_ino for step in (1, 2, 3) for path in data_files(tmp_path, step)}) == 1


def test_equal_bytes_of_another_dtype_or_shape_are_written(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        save(checkpointer, {"a": torch.zeros(ELEMENTS), "b": torch.zeros(ELEMENTS)}, 1)
        state = {"a": torch.zeros(ELEMENTS, dtype=torch.int32), "b": torch.zeros(ELEMENTS // 2, 2)}
        assert save(checkpointer, state, 2).shared_bytes == 0
        require_loads(tmp_path, 2, state)
    blank = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    stock_load(blank, checkpoint_id=tmp_path / "step-00000002")
    assert all(torch.equal(blank[name], tensor) for name, tensor in state.items())


def test_nothing_is_shared_with_what_a_load_found_damaged(tmp_path: Path) -> None:
    state = tensors()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        save(checkpointer, state, 1)
        state["t0"] += 1
        save(checkpointer, state, 2)
        damaged = next(path for path in data_files(tmp_path, 2) if path.stat().st_nlink == 1)
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(CorruptCheckpoint):
            checkpointer.load(state, 2)
        checkpointer.load(state, str(tmp_path / "step-00000001"))
        state["t0"] += 1  # as it was in the damaged one
        assert save(checkpointer, state, 3).shared_bytes == 0
        require_loads(tmp_path, 3, state)
    found = verify(tmp_path).checkpoints
    assert [bool(checkpoint.problems) for checkpoint in found] == [False, True, False]


def test_a_small_unchanged_part_gets_a_file_of_its_own_and_is_shared_from_then_on(tmp_path: Path) -> None:
    """Else the first file, most of it out of date, would stay for as long as the small part does."""
    state = tensors(8)
    frozen = ("t0", "t1")
    with Checkpointer(tmp_path, config=settings(keep=LatestN(1))) as checkpointer:
        for step in range(1, 5):
            for name in state.keys() - set(frozen):
                state[name] += 1
            info = save(checkpointer, state, step)
            require_loads(tmp_path, step, state)
            files = fragment_of(tmp_path, step).files
            # All of it; all of it in two files; then the second one is shared.
            assert len(files) == (1 if step == 1 else 2)
            assert bool(info.shared_bytes) == (step > 2)
            assert verify(tmp_path).ok
    assert files[1].origin is not None
    assert files[1].origin.directory == "step-00000002"
    assert files[1].size_bytes < 2 * ELEMENTS * 4 + 20_000


def test_stock_readers_read_what_is_shared(tmp_path: Path) -> None:
    state = tensors() | {"lr": 0.5}
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        save(checkpointer, state, 1)
        state["t3"] += 1
        state["lr"] = 0.25
        assert save(checkpointer, state, 2).shared_bytes > 0
    blank: dict[str, Any] = {name: torch.zeros(ELEMENTS) for name in tensors()} | {"lr": 0.0}
    stock_load(blank, checkpoint_id=tmp_path / "step-00000002")
    assert blank["lr"] == 0.25
    assert all(torch.equal(blank[name], state[name]) for name in tensors())


def test_a_resumed_checkpoint_is_the_base(tmp_path: Path) -> None:
    state = tensors()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        save(checkpointer, state, 1)
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        assert checkpointer.load(blank) is not None
        info = save(checkpointer, blank, 2)
    assert info.bytes == info.shared_bytes
    require_loads(tmp_path, 2, state)


def test_what_was_saved_without_reuse_is_no_base(tmp_path: Path) -> None:
    state = tensors()
    with Checkpointer(tmp_path, config=settings(reuse=False)) as checkpointer:
        save(checkpointer, state, 1)
        assert save(checkpointer, state, 2).shared_bytes == 0
    assert fragment_of(tmp_path, 2).payload_digests == ""
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.load(state)
        assert save(checkpointer, state, 3).shared_bytes == 0
        assert save(checkpointer, state, 4).shared_bytes > 0


class Tuned(nn.Module):
    """A frozen base that the optimizer knows, one that it does not, and something that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.ones(ELEMENTS), requires_grad=False)
        self.outside = nn.Parameter(torch.ones(ELEMENTS), requires_grad=False)
        self.adapter = nn.Parameter(torch.ones(1000))

    def forward(self) -> torch.Tensor:
        return (self.adapter * 2).sum() + self.base.sum()


@pytest.mark.parametrize("overlap", ["off", "step"])
def test_fine_tuning_stores_the_frozen_part_once(tmp_path: Path, overlap: str) -> None:
    torch.manual_seed(0)
    model = Tuned()
    optimizer = torch.optim.AdamW([model.base, model.adapter], lr=0.1)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(tmp_path, config=settings(keep=LatestN(1), overlap=overlap)) as checkpointer:
        for step in range(1, 5):
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
            info = save(checkpointer, state, step)
            assert (info.bytes - info.shared_bytes < 100_000) == (step > 1)
            require_loads(
                tmp_path, step, {f"model.{name}": p.detach() for name, p in model.named_parameters()}
            )


def test_a_frozen_parameter_that_is_written_all_the_same_is_saved(tmp_path: Path) -> None:
    """No counter of versions is believed: `.data` and views do not bump any."""
    model = Tuned()
    optimizer = torch.optim.AdamW([model.adapter], lr=0.1)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(tmp_path, config=settings(overlap="step")) as checkpointer:
        save(checkpointer, state, 1)
        version = model.base._version
        model.base.data[-1] = 5.0
        assert model.base._version == version
        save(checkpointer, state, 2)
        require_loads(tmp_path, 2, {"model.base": model.base.detach()})


def test_a_base_that_lost_a_file_fails_one_save_and_no_more(tmp_path: Path) -> None:
    state = tensors()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        save(checkpointer, state, 1)
        os.unlink(data_files(tmp_path, 1)[0])
        with pytest.raises(StorageNotFound, match=r"since step-00000001 cannot be shared.*next save writes"):
            save(checkpointer, state, 2)
        assert not (tmp_path / "step-00000002").exists()
        assert save(checkpointer, state, 2).shared_bytes == 0
        assert save(checkpointer, state, 3).shared_bytes > 0
    require_loads(tmp_path, 3, state)


def test_damage_to_a_shared_file_is_told_with_its_origin(tmp_path: Path) -> None:
    state = tensors()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        for step in (1, 2):
            save(checkpointer, state, step)
    (file,) = data_files(tmp_path, 2)
    with file.open("r+b") as handle:
        handle.seek(ELEMENTS * 2)
        handle.write(b"\xff")
    told = r"t0.*step-00000001 wrote the file"
    with (
        open_checkpoint(tmp_path / "step-00000002") as checkpoint,
        pytest.raises(CorruptCheckpoint, match=told),
    ):
        checkpoint.read_tensor("t0")
    assert any("step-00000001 wrote the file" in str(problem) for problem in verify(f"{tmp_path}@2").problems)
    with (
        Checkpointer(tmp_path, config=settings()) as checkpointer,
        pytest.raises(CorruptCheckpoint, match=told),
    ):
        checkpointer.load(state, which=2)
    assert not verify(f"{tmp_path}@1").ok, "what is shared is damaged together"


def test_a_copy_has_bytes_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    state = tensors()
    with Checkpointer(run, config=settings()) as checkpointer:
        for step in (1, 2):
            state["t1"] += 1
            save(checkpointer, state, step)
    report = copy_checkpoint(f"{run}@2", tmp_path / "copy")
    assert report.copied_bytes == sum(path.stat().st_size for path in data_files(run, 2))
    copies = sorted((tmp_path / "copy").glob("*.distcp"))
    assert [path.stat().st_nlink for path in copies] == [1, 1]
    name = "manifest.json"
    assert (tmp_path / "copy" / name).read_bytes() == (run / "step-00000002" / name).read_bytes()
    assert verify(tmp_path / "copy").ok


def test_gaps_are_zero_whatever_the_arena_held(tmp_path: Path) -> None:
    """Files are bytes of an arena that had other layouts before."""
    sizes = {f"s{number}": torch.full((number * 37 + 1,), -1.0) for number in range(40)}
    state = tensors(3) | sizes | {"values": ["x" * 100]}
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        for step in range(1, 7):
            for number in range(step % 5, 40, 5):
                state[f"s{number}"] += 1
            state[f"t{step % 3}"] += 1
            state["values"] = ["x" * (37 * step % 90)]
            save(checkpointer, state, step)
            fragment = fragment_of(tmp_path, step)
            for index, path in enumerate(data_files(tmp_path, step)):
                if fragment.files[index].origin is None:
                    require_zero_gaps(fragment, index, path.read_bytes())


def require_zero_gaps(fragment: Fragment, index: int, data: bytes) -> None:
    spans = [(c.container_offset, c.container_bytes) for c in fragment.chunks if c.file == index]
    if index == 0:
        spans += [(v.container_offset or 0, v.container_bytes or 0) for v in fragment.values.values()]
    position = 0
    for offset, num_bytes in sorted(spans):
        assert not any(data[position:offset])
        position = offset + num_bytes
    assert not any(data[position:])


def test_twenty_saves_of_different_tensors_with_one_kept(tmp_path: Path) -> None:
    """Whatever is committed loads, and what is on the disk stays in bounds."""
    generator = torch.Generator().manual_seed(3)
    state = {f"t{n}": torch.randn(30_000 + 100 * n, generator=generator) for n in range(12)}
    full_bytes = sum(tensor.nbytes for tensor in state.values())
    with Checkpointer(tmp_path, config=settings(keep=LatestN(1))) as checkpointer:
        for step in range(1, 21):
            for number in torch.randperm(12, generator=generator)[: step % 4].tolist():
                state[f"t{number}"][:7] = step
            save(checkpointer, state, step)
            require_loads(tmp_path, step, state)
            assert verify(tmp_path).ok
            assert used_bytes(tmp_path) < 3 * full_bytes
    assert used_bytes(tmp_path) < 2 * full_bytes + 100_000


def used_bytes(run: Path) -> int:
    """Of data files, each counted once, whatever is being removed meanwhile."""
    found = {}
    for directory, _, names in os.walk(run):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(os.path.join(directory, name))
                found[status.st_ino] = status.st_size
    return sum(found.values())


def test_a_store_without_links_writes_everything_and_says_so(
    s3_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = tensors(2)
    with (
        caplog.at_level(logging.WARNING),
        Checkpointer(s3_prefix, config=settings(keep=LatestN(1))) as checkpointer,
    ):
        for step in (1, 2):
            assert save(checkpointer, state, step).shared_bytes == 0
    assert [record.message for record in caplog.records if "reuse has no effect" in record.message]
    assert verify(s3_prefix).ok


def test_reuse_is_off_by_default_and_checked(tmp_path: Path) -> None:
    assert CheckpointConfig().reuse is False
    with pytest.raises(CheckpointError, match="reuse"):
        CheckpointConfig(reuse="yes")  # type: ignore[arg-type]
