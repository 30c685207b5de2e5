"""What no save could do fails the load of every rank, with the same words, before the first step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer
from dcp_ckpt.save.memory import available_memory
from tests.crash.run_files import committed_steps, debris, require_all_verify
from tests.distributed import worlds
from tests.small_disks import fill, mounted_disk

pytestmark = pytest.mark.distributed

Outcome = tuple[str, str]


def good() -> dict[str, Any]:
    return {"shared": torch.arange(100), "value": 1}


def spoiled(how: str) -> dict[str, Any]:
    """A state that cannot be staged; on rank 1 where it depends on the rank."""
    state = good()
    if how == "together":
        # Each rank owns a part that would fit if it were alone on this host.
        fits = min(pool.available_bytes for pool in available_memory())
        state["large"] = torch.zeros(1, dtype=torch.uint8).expand(int(1.8 * fits))
    elif dist.get_rank() == 1 and how == "sparse":
        state["shared"] = torch.eye(3).to_sparse()
    return state


def load_spoiled(path: str, how: str) -> tuple[Outcome, Outcome, Outcome]:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        bad = worlds.outcome(lambda: checkpointer.load(spoiled(how)))
        after = worlds.outcome(lambda: checkpointer.load(good()))
        saved = worlds.outcome(lambda: checkpointer.save(good(), step=1).result(30))
    return bad, after, saved


@pytest.mark.parametrize(
    ("how", "kind", "named"),
    [
        ("together", "StorageFull", ("rank(s) 0, 1", "bytes needed", "bytes available")),
        ("sparse", "StateError", ("shared", "rank 1", "sparse")),
    ],
)
def test_what_no_save_could_do_fails_the_load_on_all_ranks(
    pool: Any, tmp_path: Path, how: str, kind: str, named: tuple[str, ...]
) -> None:
    results = pool.run(load_spoiled, 2, str(tmp_path), how)
    assert results[0] == results[1]
    bad, after, saved = results[0]
    assert bad[0] == kind
    for part in named:
        assert part in bad[1]
    assert (after, saved) == (("ok", ""), ("ok", "")), "the next load and save are unharmed"


class NotYet:
    """Has no state on rank 1 before training has begun."""

    started = False

    def state_dict(self) -> dict[str, Any]:
        if not self.started and dist.get_rank() == 1:
            raise RuntimeError("not started")
        return {"drawn": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = True


def load_before_start(path: str) -> tuple[Outcome, Outcome, bool]:
    state = good() | {"loader": NotYet()}
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        before = random.getstate()
        loaded = worlds.outcome(lambda: checkpointer.load(state))
        undisturbed = random.getstate() == before
        state["loader"].started = True
        saved = worlds.outcome(lambda: checkpointer.save(state, step=1).result(30))
    return loaded, saved, undisturbed


def test_an_object_of_one_rank_that_has_no_state_yet_fails_no_load(pool: Any, tmp_path: Path) -> None:
    assert pool.run(load_before_start, 2, str(tmp_path)) == [(("ok", ""), ("ok", ""), True)] * 2


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((9 << 18,), float(step)), "step": step}


def save_on_a_disk_that_fills(path: str) -> list[tuple[str, str]]:
    """On every rank: a save that works, one on a full disk, a load on it, and what works again after that."""
    told = []
    filler = Path(path).parent / "filler"
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state_of(1), step=1).result(30)
        dist.barrier()
        if dist.get_rank() == 0:
            fill(filler.parent, room_bytes=1 << 20)
        dist.barrier()
        told.append(worlds.outcome(lambda: checkpointer.save(state_of(2), step=2).result(30)))
        told.append(worlds.outcome(lambda: checkpointer.load(state_of(0))))
        dist.barrier()
        if dist.get_rank() == 0:
            filler.unlink()
        dist.barrier()
        told.append(worlds.outcome(lambda: checkpointer.load(state_of(0))))
        told.append(worlds.outcome(lambda: checkpointer.save(state_of(2), step=2).result(30)))
    return told


def test_all_ranks_are_told_the_same_of_a_full_disk(pool: Any, tmp_path: Path) -> None:
    run = tmp_path / "disk" / "run"
    with mounted_disk(tmp_path / "disk", size_bytes=48 << 20):
        results = pool.run(save_on_a_disk_that_fills, 2, str(run))
        assert committed_steps(run) == [1, 2]
        require_all_verify(run)
        assert debris(run) == []
    assert results[0] == results[1]
    save, load, *after = results[0]
    for kind, message in (save, load):
        assert kind == "StorageFull"
        assert "bytes needed" in message
        assert "bytes free" in message
        assert "failed too" not in message, "one shortage is one failure"
    assert after == [("ok", "")] * 2
