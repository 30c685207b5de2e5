"""`dcp_ckpt.dcp` in plain `dcp.save`, `async_save`, `load`: bitwise on any world, failures on all ranks."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import load_checkpoint, open_checkpoint, verify
from dcp_ckpt.dcp import Reader, Writer
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.testing.ranks import RankPool
from tests.distributed import worlds
from tests.failing_calls import failing

pytestmark = pytest.mark.distributed

STEP = "step-00000005"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks of their own, since DCP's writer processes stay until their ranks end."""
    with RankPool(4) as ranks:
        yield ranks


def known_state(*, blank: bool) -> dict[str, Any]:
    values = worlds.blank_values() if blank else dict(worlds.VALUES)
    if blank:
        values["nested"] = dict.fromkeys(worlds.VALUES["nested"])
        values["by_int"] = {3: None, 1: None}
    # DCP stores nothing for an empty dictionary, and gives integer keys back as strings.
    values["nested"].pop("empty", None)
    return worlds.known_state(blank=blank) | {"values": values}


def save_known(path: str, how: str, num_threads: int) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    writer = Writer("not-here", num_threads=num_threads)
    if how == "save":
        stock_save(known_state(blank=False), storage_writer=writer, checkpoint_id=path)
        return
    future = async_save(
        known_state(blank=False),
        storage_writer=writer,
        checkpoint_id=path,
        async_checkpointer_type=AsyncCheckpointerType(how),
    )
    cast("Future[Any]", future).result(60)


def load_known(path: str, how: str) -> tuple[list[str], Any]:
    state = known_state(blank=True)
    if how == "stock":
        stock_load(state, checkpoint_id=path)
    elif how == "reader":
        stock_load(state, storage_reader=Reader("not-here"), checkpoint_id=path)
    else:
        load_checkpoint(path, state, config=worlds.config())
    return worlds.differing(state), state["values"]


@pytest.mark.parametrize(("how", "num_threads"), [("save", 1), ("save", 3), ("thread", 2), ("process", 2)])
def test_what_is_saved_on_4_ranks_loads_on_3_in_every_way(
    pool: RankPool, tmp_path: Path, how: str, num_threads: int
) -> None:
    path = tmp_path / STEP
    pool.run(save_known, 4, str(path), how, num_threads)
    report = verify(path)
    assert report.ok
    assert not report.checkpoints[0].unverified
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.manifest.step, checkpoint.manifest.world_size) == (5, 4)
        assert checkpoint.manifest.run_id
        for name, known in worlds.KNOWN.items():
            assert worlds.same_bits(checkpoint.read_tensor(name), known.whole(name)), name
    for reader in ("stock", "reader", "ours"):
        for differing, values in pool.run(load_known, 3, str(path), reader):
            assert differing == [], reader
            wanted = {
                name: value for name, value in worlds.VALUES.items() if name not in ("by_int", "nested")
            }
            assert {name: values[name] for name in wanted} == wanted, reader
            assert values["nested"]["raw"] == b"\x00\xff", reader


def test_reader_needs_no_pickled_metadata_and_checks_digests(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "c"
    pool.run(save_known, 2, str(path), "save", 1)
    (path / ".metadata").write_bytes(b"cos\nabort\n(tR.")
    for differing, _ in pool.run(load_known, 3, str(path), "reader"):
        assert differing == []
    data = path / "__1_0.e0001-s000001.distcp"
    content = bytearray(data.read_bytes())
    content[5000] ^= 1
    data.write_bytes(content)
    for kind, message in pool.run(outcome_of_load, 2, str(path)):
        assert kind == "CorruptCheckpoint"
        assert "differs from its digest" in message
        assert data.name in message


def failure(act: Callable[[], Any]) -> tuple[str, str]:
    """Class and message of the CheckpointError inside of DCP's exception, after a trip through pickle."""
    try:
        act()
    except CheckpointException as error:
        again = pickle.loads(pickle.dumps(error))
        inner = next(iter(again.failures.values()))[0]
        assert isinstance(inner, CheckpointError), repr(inner)
        return type(inner).__name__, str(inner)
    return "ok", ""


def outcome_of_load(path: str) -> tuple[str, str]:
    return failure(lambda: stock_load(known_state(blank=True), storage_reader=Reader(path)))


def save_on_failing_disk(path: str, how: str) -> tuple[str, str]:
    with failing("fsync", "*/__1_1.*", errno.ENOSPC, times=None):
        return failure(lambda: save_known(path, how, 2))


@pytest.mark.parametrize("how", ["save", "thread"])
def test_a_failing_thread_of_one_rank_fails_the_save_on_all(pool: RankPool, tmp_path: Path, how: str) -> None:
    path = tmp_path / STEP
    for kind, message in pool.run(save_on_failing_disk, 3, str(path), how):
        assert kind == "StorageFull"
        for part in (
            "rank 1",
            "step 5",
            "phase write",
            "__1_1.e0001-s000001.distcp",
            f"errno {errno.ENOSPC}",
        ):
            assert part in message
    assert not path.exists(), "files of the failed attempt were left"
    pool.run(save_known, 3, str(path), how, 2)
    assert verify(path).ok


def save_with_failing_commit(path: str) -> tuple[str, str]:
    with failing("fsync", "*/.rank-00001.*", errno.EIO, times=None):
        return failure(lambda: save_known(path, "save", 2))


def test_a_failing_commit_leaves_nothing(pool: RankPool, tmp_path: Path) -> None:
    for kind, message in pool.run(save_with_failing_commit, 2, str(tmp_path / "c")):
        assert kind.startswith("Storage")
        assert "rank-00001" in message
    assert not (tmp_path / "c").exists()


def save_elsewhere(path: str) -> tuple[str, str]:
    return failure(lambda: save_known(f"{path}-{dist.get_rank()}", "save", 1))


def test_ranks_that_save_to_different_places_are_told(pool: RankPool, tmp_path: Path) -> None:
    for kind, message in pool.run(save_elsewhere, 2, str(tmp_path / "c")):
        assert kind == "SaveFailed"
        assert "rank 1 wrote" in message
        assert "same directory of one shared storage" in message
    assert not (tmp_path / "c-0").exists()
    assert not (tmp_path / "c-1" / "manifest.json").exists()


class Custom:
    pass


def save_odd(path: str) -> list[tuple[str, str]]:
    states: list[dict[str, Any]] = [
        {"w": torch.ones(2), "bad": {"object": Custom()} if dist.get_rank() == 1 else {}},
        {"w": torch.ones(2).to_sparse()},
        {"pair": (1, torch.ones(2))},
    ]
    writers = [Writer(f"{path}-{number}") for number in range(len(states))]
    return [
        failure(partial(stock_save, state, storage_writer=writer))
        for state, writer in zip(states, writers, strict=True)
    ]


def test_what_cannot_be_stored_is_refused_by_name_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    for outcomes in pool.run(save_odd, 2, str(tmp_path / "c")):
        assert [kind for kind, _ in outcomes] == ["StateError"] * 3
        assert all(
            name in text for name, (_, text) in zip(("bad.object", "w", "pair"), outcomes, strict=True)
        )
    assert list(tmp_path.iterdir()) == []


def save_twice(path: str) -> tuple[str, str]:
    save_known(path, "save", 1)
    return failure(lambda: save_known(path, "save", 1))


def test_nothing_is_overwritten(pool: RankPool, tmp_path: Path) -> None:
    for kind, message in pool.run(save_twice, 2, str(tmp_path / "c")):
        assert kind == "StepAlreadySaved"
        assert "save to another directory" in message
    assert verify(tmp_path / "c").ok


def save_over_stock(path: str) -> tuple[str, str]:
    stock_save({"w": torch.ones(2)}, checkpoint_id=path)
    return failure(lambda: save_known(path, "save", 1))


def test_a_stock_checkpoint_is_not_overwritten_either(pool: RankPool, tmp_path: Path) -> None:
    for kind, _ in pool.run(save_over_stock, 2, str(tmp_path / "c")):
        assert kind == "StepAlreadySaved"


def save_with_cached_plans(path: str) -> None:
    planner = DefaultSavePlanner(enable_plan_caching=True)
    for step in (1, 2, 3):
        state = {"w": torch.full((4,), float(step)), "step": step}
        stock_save(state, storage_writer=Writer(f"{path}/step-{step:08d}"), planner=planner)


def test_a_planner_that_caches_its_plans(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_with_cached_plans, 2, str(tmp_path))
    for step in (1, 2, 3):
        target: dict[str, Any] = {"w": torch.zeros(4), "step": 0}
        stock_load(target, storage_reader=Reader(tmp_path / f"step-{step:08d}"))
        assert torch.equal(target["w"], torch.full((4,), float(step)))
        assert target["step"] == step


def test_what_a_killed_save_left_behind_is_in_nobodys_way(pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.mkdir()
    left = [path / "__0_0.e0001-s000001.distcp", path / "__1_0.e0001-s000001.distcp"]
    for file in left:
        file.write_bytes(b"half")
    pool.run(save_known, 2, str(path), "save", 1)
    assert verify(path).ok
    assert not any(file.exists() for file in left)
