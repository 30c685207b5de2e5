"""Train a small GPT on the Python standard library's sources, with checkpoints.

    torchrun --standalone --nproc_per_node 8 launch/train.py                # start, or go on with the newest
    torchrun --standalone --nproc_per_node 3 launch/train.py --parallel ddp # continue it on another world
    torchrun --standalone --nproc_per_node 8 launch/train.py --steps 400    # extend a finished run
    torchrun --standalone --nproc_per_node 8 launch/train.py --resume never --name second
    python launch/train.py                                                  # one process, no process group
    python launch/train.py --list-runs

Kill it at any moment and start it again: it goes on from its newest checkpoint. On SIGTERM, Ctrl-C and after
`--max-minutes` it saves before it ends. `--help` lists the flags.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with launch/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from dcp_ckpt import (
    AnyOf,
    BestN,
    CheckpointConfig,
    Checkpointer,
    ElasticSampler,
    EveryNSteps,
    EverySteps,
    LatestN,
    TrainState,
    errors,
    open_run,
)
from launch.data import IGNORED, Batch, Windows, read_corpus, training_batches, validation_batches
from launch.model import GPT, MODEL_SIZES
from launch.options import Options, parse_options
from launch.parallel import Topology, global_sum, join, parallelise
from launch.report import Reporter, exit_code, print_runs, stop_code

WARM_UP_STEPS = 20
FINAL_LR_FRACTION = 0.1


def lr_factor(step: int, lr_steps: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, cosine, then level."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = min(1.0, (step - WARM_UP_STEPS) / max(1, lr_steps - WARM_UP_STEPS))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))


def loss_sum(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of the losses of this rank's tokens."""
    logits = model(batch.inputs)
    targets = batch.targets.flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    windows: Windows,
    options: Options,
    topology: Topology,
    should_stop: Callable[[], bool],
) -> float | None:
    """Mean loss over the validation windows, the same ones each time; draws nothing from any RNG.

    None when it was broken off, because training is to stop.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=topology.device)
    num_tokens = 0
    for batch in validation_batches(
        windows,
        num_batches=options.eval_iters,
        global_batch_size=options.batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
        device=topology.device,
    ):
        if should_stop():
            return None
        total += loss_sum(model, batch).double()
        num_tokens += batch.num_tokens
    model.train()
    return global_sum(total, topology).item() / num_tokens


def checkpoint_config(options: Options) -> CheckpointConfig:
    """When to save, and which checkpoints to keep."""
    keep: list[LatestN | EveryNSteps | BestN] = [LatestN(options.keep_last)]
    if options.keep_every:
        keep.append(EveryNSteps(options.keep_every))
    if options.keep_best:
        keep.append(BestN(options.keep_best, metric=options.monitor, mode=options.mode))
    return CheckpointConfig(
        save_when=EverySteps(options.save_every),
        keep=AnyOf(*keep),
        overlap=options.overlap,
        stop_after_seconds=None if options.max_minutes is None else 60 * options.max_minutes,
    )


def training_sampler(
    num_samples: int, fingerprint: str, options: Options, topology: Topology
) -> ElasticSampler:
    """This rank's share of the training samples, in shuffled order."""
    return ElasticSampler(
        num_samples=num_samples,
        global_batch_size=options.batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
        seed=options.seed,
        fingerprint=fingerprint,
        drop_last=False,
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and all of it as the state to save."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    history: list[float]
    state: TrainState


def build(options: Options, topology: Topology, sampler: ElasticSampler) -> Training:
    """Equal weights on every rank, then spread over the ranks."""
    gpt = GPT(MODEL_SIZES[options.model_size], dropout=options.dropout, seed=options.seed)
    gpt = gpt.to(topology.device)
    model = parallelise(gpt, gpt.blocks, options.parallel, topology)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, options.lr_steps))
    torch.manual_seed(options.seed + 1 + topology.rank)  # dropout differs between ranks
    history: list[float] = []
    state = TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        dataloader=sampler,
        extra={"loss_history": history},
    )
    return Training(model=model, optimizer=optimizer, scheduler=scheduler, history=history, state=state)


def train_step(training: Training, batch: Batch, topology: Topology) -> float:
    """One optimizer step; returns the mean loss over the global batch, the same on all ranks."""
    loss = loss_sum(training.model, batch)
    # FSDP and DDP average gradients over ranks: so weighted, the average is the mean over all tokens of the
    # global batch, also where ranks hold different numbers of them.
    (loss * (topology.world_size / batch.num_tokens)).backward()  # type: ignore[no-untyped-call]
    training.optimizer.step()
    training.scheduler.step()
    training.optimizer.zero_grad()
    return global_sum(loss.detach().double(), topology).item() / batch.num_tokens


def resume(
    checkpointer: Checkpointer, state: TrainState, options: Options, topology: Topology, reporter: Reporter
) -> int:
    """Load the newest checkpoint of the run; the step it holds, 0 when there is none."""
    loaded = checkpointer.load(state, which="latest")
    if loaded is not None:
        reporter.resumed(loaded, world_size=topology.world_size)
        return loaded.step
    if options.resume == "must":
        raise errors.CheckpointNotFound("--resume must: no checkpoint was committed")
    return 0


def train(options: Options, topology: Topology) -> str | None:
    """Train up to `--steps`, from the newest checkpoint of the run if it has one; all ranks call it.

    Returns why it stopped before, or None.
    """
    # Data: the order of samples depends on seed and epoch only, so it is the same on any number of ranks.
    context = MODEL_SIZES[options.model_size].context
    corpus = read_corpus()
    train_windows = Windows(corpus.train, context)
    validation_windows = Windows(corpus.validation, context)
    fingerprint = f"{corpus.fingerprint}-{context}"
    sampler = training_sampler(len(train_windows), fingerprint, options, topology)

    training = build(options, topology, sampler)

    # Run: chosen or created once for all ranks, then everything is loaded from its newest checkpoint.
    choice = options.run_number or options.resume
    run = open_run(options.run_dir, resume=choice, name=options.name, config=options.as_json())
    reporter = Reporter(rank=topology.rank, log_json=options.log_json)
    reporter.say(f"run {run.number} in {run.path}: {topology.world_size} ranks, {options.parallel}")
    with Checkpointer(run.path, config=checkpoint_config(options)) as checkpointer:
        done = resume(checkpointer, training.state, options, topology, reporter)
        last_step = max(options.steps, done)
        batches = training_batches(train_windows, sampler, topology.device)
        for step in range(done + 1, last_step + 1):
            lr = float(training.scheduler.get_last_lr()[0])
            batch = next(batches)
            loss = train_step(training, batch, topology)
            training.history.append(loss)
            reporter.stepped(step=step, last_step=last_step, loss=loss, lr=lr, batch=batch)

            is_last = step == last_step
            save_due = options.saves and (checkpointer.should_save(step) or is_last)
            metrics = {"loss": loss}
            if step % options.eval_every == 0 or is_last or (save_due and options.keep_best):
                val_loss = evaluate(
                    training.model, validation_windows, options, topology, checkpointer.should_stop
                )
                if val_loss is None:
                    save_due = save_due or (options.saves and checkpointer.should_save(step))
                else:
                    metrics["val_loss"] = val_loss
                    reporter.validated(step=step, loss=val_loss)
            if save_due:
                handle = checkpointer.save(training.state, step=step, metrics=metrics)
                reporter.saving(step=step, handle=handle)
            reporter.poll()
            if checkpointer.should_stop():
                break
        checkpointer.wait()
        reporter.close()
    if checkpointer.stop_reason is not None:
        reporter.say(f"stopped at step {step} ({checkpointer.stop_reason}); start again to go on")
        return checkpointer.stop_reason
    reporter.say(f"finished at step {last_step}; to extend this run: --steps {last_step + options.steps}")
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the driver; returns its exit code.

    0 done, or stopped by --max-minutes; 1 failed, or another start owns the run; 2 usage; 3 nothing to
    resume; 4 corrupt; 5 no fit; 128 + n stopped by signal n.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    options = parse_options(arguments, announce=speaks)
    try:
        if options.list_runs:
            if speaks:
                print_runs(options.run_dir)
            return 0
        with join(os.environ) as topology:
            stop_reason = train(options, topology)
    except errors.CheckpointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return exit_code(error)
    return stop_code(stop_reason)


if __name__ == "__main__":
    sys.exit(main())
