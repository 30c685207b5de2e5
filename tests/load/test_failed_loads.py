"""After a load that failed halfway nothing is saved, whatever is tried next, until one has succeeded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer
from dcp_ckpt.errors import CheckpointNotFound, CorruptCheckpoint, SaveFailed

CONFIG = CheckpointConfig(keep=None, grace_seconds=0.0)


def save(run: Path, states: Mapping[int, Mapping[str, Any]]) -> None:
    with Checkpointer(run, config=CONFIG) as checkpointer:
        for step, state in states.items():
            checkpointer.save(dict(state), step=step).result(30)


def damage(run: Path, step: int) -> None:
    (file,) = (run / f"step-{step:08}").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_an_older_checkpoint_that_does_not_fit_leaves_the_failure_of_the_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, {1: {"w": torch.ones(5)}, 2: {"w": torch.ones(300, 300)}})
    damage(tmp_path, 2)
    state = {"w": torch.zeros(300, 300)}
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        with pytest.raises(CorruptCheckpoint, match=r"(?s)differs.*step-00000001.*cannot be loaded.*\[5\]"):
            checkpointer.load(state)
        assert state["w"].isnan().all()
        with pytest.raises(SaveFailed, match="the last load failed halfway"):
            checkpointer.save(state, step=3)


def test_a_later_load_that_finds_nothing_does_not_make_up_for_it(tmp_path: Path) -> None:
    save(tmp_path, {1: {"w": torch.ones(300, 300)}, 2: {"w": torch.ones(300, 300)}})
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    state = {"w": torch.zeros(300, 300)}
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        for _ in range(2):  # found by reading, then by the marks, before anything is read
            with pytest.raises(CorruptCheckpoint):
                checkpointer.load(state)
        with pytest.raises(CheckpointNotFound):
            checkpointer.load(state, 7)
        with pytest.raises(SaveFailed, match="the last load failed halfway"):
            checkpointer.save(state, step=3)
