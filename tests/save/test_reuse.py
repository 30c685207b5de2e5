"""What is unchanged is not written again: one process, real saves, real files."""

from __future__ import annotations

from pathlib import Path

import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, verify
from dcp_ckpt.policies import LatestN


def test_smoke(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((100_000,), float(i)) for i in range(6)}
    config = CheckpointConfig(keep=LatestN(1), reuse=True, grace_seconds=0.0)
    with Checkpointer(tmp_path, config=config) as ckpt:
        for step in range(1, 6):
            state["t0"] += 1
            info = ckpt.save(state, step=step).result(60)
            print(info.bytes, info.shared_bytes)
            assert verify(tmp_path).ok
    for p in sorted(tmp_path.rglob("*.distcp")):
        print(p, p.stat().st_nlink, p.stat().st_size)
    with Checkpointer(tmp_path, config=config) as ckpt:
        blank = {k: torch.zeros_like(v) for k, v in state.items()}
        assert ckpt.load(blank).step == 5
        for k in state:
            assert torch.equal(blank[k], state[k])
        info = ckpt.save(blank, step=6).result(60)
        print(info)
    assert 0
