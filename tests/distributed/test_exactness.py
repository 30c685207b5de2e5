"""Saving changes nothing, and a resumed run is the run that never stopped, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer, ElasticSampler, TrainState
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

NUM_STEPS = 6
TOKENS = torch.arange(40 * 4).reshape(40, 4) % 11


class Training:
    """Everything that a run consists of; each instance starts out the same but for `seed`."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.model, self.optimizer = worlds.build(kind, seed)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.sampler = ElasticSampler(40, 8, dist.get_rank(), dist.get_world_size(), seed=5 + seed)
        self.batches = iter(self.sampler)
        self.history: list[float] = []
        torch.manual_seed(100 * seed + dist.get_rank())

    @property
    def state(self) -> TrainState:
        return TrainState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.scheduler,
            dataloader=self.sampler,
            extra={"history": self.history},
            per_rank={"mine": {"rank": dist.get_rank()}},
        )

    def step(self) -> None:
        loss = worlds.train_step(self.model, self.optimizer, TOKENS[next(self.batches)])
        self.scheduler.step()
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        self.history.append(total.item())

    def outcome(self) -> dict[str, Any]:
        return {
            "state": worlds.snapshot(self.model, self.optimizer),
            "history": list(self.history),
            "lr": self.scheduler.get_last_lr(),
            "sampler": self.sampler.state_dict(),
            "random": worlds.fingerprint(torch.get_rng_state()),
        }


def train(kind: str, path: str, save_at: Sequence[int], overlap: str) -> dict[str, Any]:
    """Train from the start; with saves where asked for."""
    training = Training(kind)
    if not save_at:
        for _ in range(NUM_STEPS):
            training.step()
        return training.outcome()
    handles = []
    with Checkpointer(path, config=worlds.config(overlap=overlap)) as checkpointer:
        for step in range(NUM_STEPS + 1):
            if step:
                training.step()
            if step in save_at:
                handles.append(checkpointer.save(training.state, step=step))
        checkpointer.wait()
    assert [handle.outcome for handle in handles] == ["committed"] * len(save_at)
    return training.outcome()


def stored_bytes(path: Path) -> dict[str, str]:
    """Digests of all data files below `path`, by step and rank."""
    return {
        f"{file.parent.name}/{file.name.partition('.')[0]}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.glob("step-*/__*.distcp"))
    }


def resume(kind: str, path: str, step: int) -> dict[str, Any]:
    """Load into objects that started out different in everything, and train to the end."""
    training = Training(kind, seed=1)
    training.step()
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(training.state, which=step)
        assert report is not None
        assert report.notes == ()
        for _ in range(step, NUM_STEPS):
            training.step()
    return training.outcome()


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_run_with_saves_and_resumed_run_equal_the_plain_run(pool, tmp_path, kind):
    every_step = range(NUM_STEPS + 1)
    plain = pool.run(train, 4, kind, str(tmp_path), (), "off")
    assert len(plain[0]["history"]) == NUM_STEPS
    assert len({outcome["random"] for outcome in plain}) == 4, "every rank draws its own dropout"
    for overlap in ("off", "step"):
        assert pool.run(train, 4, kind, str(tmp_path / overlap), every_step, overlap) == plain
        assert pool.run(resume, 4, kind, str(tmp_path / overlap), 3) == plain
    stored = stored_bytes(tmp_path / "off")
    assert len(stored) >= NUM_STEPS
    assert stored_bytes(tmp_path / "step") == stored


def samples_of_a_resumed_run(path: str, num_steps: int) -> tuple[list[list[int]], list[str]]:
    training = Training("fsdp", seed=0)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(training.state)
        seen = []
        for _ in range(num_steps):
            training.step()
            seen.append(training.sampler.last_global_batch)
        done = num_steps + (report.step if report else 0)
        checkpointer.save(training.state, step=done).result(30)
    return seen, list(report.reinitialised) if report else []


def test_every_sample_comes_once_over_changing_worlds(pool, tmp_path):
    seen: list[int] = []
    for world, num_steps in ((4, 2), (3, 1), (2, 2)):
        results = pool.run(samples_of_a_resumed_run, world, str(tmp_path), num_steps)
        assert all(result == results[0] for result in results)
        seen += [sample for batch in results[0][0] for sample in batch]
        assert results[0][1] == (["rng"] if world != 4 else []), "a changed world is said to draw anew"
    assert sorted(seen) == list(range(40))
