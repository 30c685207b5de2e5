"""A training with data-loading processes, for tests that signal it: writes one line a step to its log.

torchrun loading_training.py RUN LOG [--steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from dcp_ckpt import CheckpointConfig, Checkpointer, EverySteps, TrainState, ignore_stop_signals


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("log", type=Path)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = TensorDataset(torch.arange(16 * 100_000, dtype=torch.float32).reshape(-1, 16) / 1e6)
    loader = DataLoader(data, batch_size=8, num_workers=2, worker_init_fn=ignore_stop_signals)
    config = CheckpointConfig(save_when=EverySteps(1_000_000))
    state = TrainState(model=model, optimizer=optimizer)
    with Checkpointer(arguments.run, config=config) as checkpointer:
        report = checkpointer.load(state)
        step = report.step if report else 0
        for (batch,) in loader:
            step += 1
            model(batch).square().mean().backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                with arguments.log.open("a") as log:
                    log.write(f"{step}\n")
            if checkpointer.should_save(step):
                checkpointer.save(state, step=step)
            if checkpointer.should_stop():
                break
    dist.destroy_process_group()
    return 0 if checkpointer.stop_reason is None else 143


if __name__ == "__main__":
    raise SystemExit(main())
