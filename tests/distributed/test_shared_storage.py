"""Opening a run on several ranks: all see one storage and it works for all, or none goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from dcp_ckpt import Checkpointer
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

Opened = tuple[str, str, float]


def open_each(paths: Sequence[str]) -> Opened:
    """Every rank opens its own path; class and message of what it hears, and how long that took."""
    dist.barrier()
    started = time.monotonic()

    def act() -> None:
        Checkpointer(paths[dist.get_rank()], config=worlds.config(timeout_seconds=20.0)).close()

    kind, message = worlds.outcome(act)
    return kind, message, time.monotonic() - started


def test_ranks_that_do_not_share_a_storage_are_told_where_each_looked(pool, tmp_path):
    paths = [str(tmp_path / name / "run") for name in ("a", "a", "b")]
    results = pool.run(open_each, 3, paths)
    for kind, message, _ in results:
        assert kind == "StorageUnsuitable"
        assert f"rank 2 was given {paths[2]} and rank 0 {paths[0]}" in message
        assert "rank 2, phase open" in message
        assert "s3://" in message
    assert list(tmp_path.iterdir()) == [], "nothing is left of what was made for it"


def test_another_name_of_the_same_directory_is_fine(pool, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    paths = [str(tmp_path / name / "run") for name in ("a", "alias")]
    assert [kind for kind, _, _ in pool.run(open_each, 2, paths)] == ["ok", "ok"]
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_a_storage_that_works_for_rank_0_only_fails_on_all(pool, tmp_path):
    (tmp_path / "file").write_text("")
    paths = [str(tmp_path / "run"), str(tmp_path / "run"), str(tmp_path / "file" / "run")]
    for kind, message, _ in pool.run(open_each, 3, paths):
        assert kind == "StorageError"
        assert "a part of the path is a file" in message
        assert f"(rank 2 was given {paths[2]}, rank 0 {paths[0]})" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_path_that_is_none_on_one_rank_fails_on_all(pool, tmp_path: Path, bad):
    paths = ["" if rank == bad else str(tmp_path / "run") for rank in range(2)]
    for kind, message, _ in pool.run(open_each, 2, paths):
        assert kind == "ConfigError"
        assert f"rank {bad}" in message
    assert list(tmp_path.iterdir()) == []
