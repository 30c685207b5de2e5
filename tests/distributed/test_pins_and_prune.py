"""Pins and prunes of a training under way: rank 0 acts, and all ranks learn what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer, LatestN
from dcp_ckpt.lifecycle.command_epoch import command_epoch
from dcp_ckpt.storage import open_storage
from tests.distributed import worlds

pytestmark = pytest.mark.distributed


def state() -> dict[str, Any]:
    return {"tensor": torch.arange(10)}


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(state(), step=step).result(30)


def committed(path: str) -> list[int]:
    return sorted(int(found.parent.name[5:]) for found in Path(path).glob("step-*/manifest.json"))


def pin_and_prune(path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        save(checkpointer, 1, 2, 3, 4)
        checkpointer.pin(2, reason="the good one")
        checkpointer.pin(2, reason="again")
        found["kept by keep=None"] = checkpointer.prune()
    with Checkpointer(path, config=worlds.config(keep=LatestN(1))) as checkpointer:
        checkpointer.pin(1)
        found["pruned"] = checkpointer.prune()
        found["nothing left to do"] = checkpointer.prune()
        checkpointer.unpin(1)
        checkpointer.unpin(1)
        found["unpinned"] = checkpointer.prune()
        save(checkpointer, 5)
        found["missing"] = worlds.outcome(lambda: checkpointer.pin(7))
        found["wrong"] = worlds.outcome(lambda: checkpointer.pin("latest"))  # type: ignore[arg-type]
        found["after a failure"] = worlds.outcome(lambda: checkpointer.pin(2))
    found["left"] = committed(path)
    return found


def test_all_ranks_hear_the_same(pool, tmp_path):
    results = pool.run(pin_and_prune, 3, str(tmp_path))
    assert all(result == results[0] for result in results)
    found = results[0]
    assert found["kept by keep=None"] == []
    assert found["pruned"] == [f"{tmp_path}/step-00000003"]
    assert found["nothing left to do"] == []
    assert found["unpinned"] == [f"{tmp_path}/step-00000001"]
    kind, message = found["missing"]
    assert kind == "CheckpointNotFound"
    assert "no checkpoint of step 7; there are: 2, " in message
    assert found["wrong"][0] == "ConfigError"
    assert found["after a failure"] == ("ok", "")
    assert found["left"] == [2, 5]
    pins = [
        json.loads(path.read_bytes()) for path in (tmp_path / "marks" / "step-00000002").glob("pin-*.json")
    ]
    assert [mark["detail"] for mark in pins] == [{"reason": "the good one"}]
    assert not (tmp_path / "step-00000003").exists()


def prune_after_being_followed(path: str) -> tuple[str, str]:
    """Another start takes the run over while this one trains."""
    with Checkpointer(path, config=worlds.config(keep=LatestN(1))) as checkpointer:
        save(checkpointer, 1)
        checkpointer.pin(1)
        save(checkpointer, 2, 3)
        dist.barrier()
        if dist.get_rank() == 0:
            with command_epoch(open_storage(path), purpose="recover", force=True, wait_seconds=0.0):
                pass
        dist.barrier()
        checkpointer.unpin(1)
        return worlds.outcome(checkpointer.prune)


def test_a_fenced_owner_prunes_nothing_and_says_so_everywhere(pool, tmp_path):
    results = pool.run(prune_after_being_followed, 2, str(tmp_path))
    assert [kind for kind, _ in results] == ["Fenced", "Fenced"]
    assert {1, 3} <= set(committed(str(tmp_path)))
