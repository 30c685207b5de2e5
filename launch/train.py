"""Train a small GPT on the Python standard library's sources, with checkpoints.

    torchrun --standalone --nproc_per_node 8 launch/train.py                # start, or go on with the newest
    torchrun --standalone --nproc_per_node 3 launch/train.py --parallel ddp # continue it on another world
    torchrun --standalone --nproc_per_node 4 launch/train.py --parallel pp  # or in another layout
    torchrun --standalone --nproc_per_node 8 launch/train.py --steps 400    # extend a finished run
    torchrun --standalone --nproc_per_node 2 launch/train.py --lora-rank 8  # fine-tune it in a run of its own
    torchrun --standalone --nproc_per_node 8 launch/train.py --resume never --name second
    python launch/train.py                                                  # one process, no process group
    python launch/train.py --list-runs

Kill it at any moment and start it again: it goes on from its newest checkpoint. On SIGTERM, Ctrl-C and after
`--max-minutes` it saves before it ends. `--help` lists the flags.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with launch/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dcp_ckpt import (
    AnyOf,
    AtLastStep,
    AtSteps,
    BestN,
    CheckpointConfig,
    Checkpointer,
    EventSink,
    EveryEpochs,
    EveryNSteps,
    EverySeconds,
    EverySteps,
    JsonLinesSink,
    LatestN,
    LossSpike,
    SavePolicy,
    TrainState,
    Young,
    errors,
    export,
)
from dcp_ckpt.integrations.tensorboard import TensorBoardSink
from launch.data import Batch, Corpus, TextLoader, read_corpus
from launch.lora import add_adapters
from launch.model import GPT, MODEL_SIZES
from launch.options import Options, parse_options
from launch.parallel import Topology, global_sum, join, parallelise
from launch.passes import Passes, make_passes
from launch.precision import AMP_DTYPES, WorldGradScaler
from launch.report import Reporter, exit_code, print_runs, ranks, stop_code
from launch.runs import choose_run, config_before, restore
from launch.schedule import WarmUpCosine
from launch.settings import changed_settings, require_allowed, tags_of


def checkpoint_config(options: Options) -> CheckpointConfig:
    """When to save, and which checkpoints to keep."""
    keep: list[LatestN | EveryNSteps | BestN] = [LatestN(options.keep_last)]
    if options.keep_every:
        keep.append(EveryNSteps(options.keep_every))
    if options.keep_best:
        keep.append(BestN(options.keep_best, metric=options.monitor, mode=options.mode))
    return CheckpointConfig(
        save_when=when_to_save(options),
        keep=AnyOf(*keep),
        suspect_when=LossSpike("loss"),
        overlap=options.overlap,
        reuse=options.lora_rank is not None,  # the frozen base is stored once
        stop_after_seconds=None if options.max_minutes is None else 60 * options.max_minutes,
    )


def when_to_save(options: Options) -> AnyOf:
    """Whatever the flags ask for, and after the last step; all ranks get the same answers."""
    interval = EveryEpochs if options.save_strategy == "epoch" else EverySteps
    when: list[SavePolicy] = [interval(options.save_every), AtLastStep()]
    if options.save_at:
        when.append(AtSteps(*options.save_at))
    if options.save_every_minutes is not None:
        when.append(EverySeconds(60 * options.save_every_minutes))
    if options.mtbf_hours is not None:
        when.append(Young(3600 * options.mtbf_hours))
    return AnyOf(*when)


def event_sinks(options: Options, run_path: str) -> list[EventSink]:
    """What is told of saves and loads: `events.jsonl` in the run, TensorBoard if asked for."""
    sinks: list[EventSink] = []
    if "://" not in run_path:
        sinks.append(JsonLinesSink(f"{run_path}/events.jsonl"))
    if options.tensorboard is not None:
        sinks.append(TensorBoardSink(options.tensorboard / Path(run_path).name))
    return sinks


def load_text(corpus: Corpus, options: Options, topology: Topology) -> TextLoader:
    """This rank's batches. The order of samples depends on seed and epoch only, on any number of ranks."""
    return TextLoader(
        corpus,
        context=MODEL_SIZES[options.model_size].context,
        global_batch_size=options.batch_size,
        num_micro_batches=max(options.grad_accum, topology.num_stages),
        rank=topology.data_rank,
        world_size=topology.data_size,
        seed=options.seed,
        num_workers=options.workers,
        device=topology.device,
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and all of it as the state to save."""

    model: torch.nn.Module
    passes: Passes
    optimizer: torch.optim.Optimizer
    scheduler: WarmUpCosine
    scaler: WorldGradScaler
    history: list[float]
    state: TrainState


def build(options: Options, topology: Topology, text: TextLoader) -> Training:
    """Equal weights on every rank, then spread over the ranks."""
    config = MODEL_SIZES[options.model_size]
    gpt = GPT(config, dropout=options.dropout, seed=options.seed, autocast=AMP_DTYPES[options.amp])
    if options.lora_rank is not None:
        add_adapters(gpt, gpt.blocks, rank=options.lora_rank, seed=options.seed)
    model = parallelise(gpt, topology, compiled=options.compile)
    passes = make_passes(model, config, topology, text)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = WarmUpCosine(optimizer, options.lr_steps)
    scaler = WorldGradScaler(topology.device.type, enabled=options.amp == "fp16")
    torch.manual_seed(options.seed + 1 + topology.stream)  # dropout differs between ranks
    history: list[float] = []
    state = TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        scaler=scaler if scaler.is_enabled() else None,
        dataloader=text.loader,
        extra={"loss_history": history},
        mesh_roles=topology.roles,
    )
    return Training(
        model=model,
        passes=passes,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        history=history,
        state=state,
    )


def train_step(training: Training, batch: Batch, topology: Topology) -> float:
    """One optimizer step; returns the mean loss over the global batch, the same on all ranks."""
    # Every layout averages gradients over the ranks that hold different samples: so weighted, the average is
    # the mean over all tokens of the global batch, also where ranks hold different numbers of them.
    weight = torch.tensor(topology.data_size / batch.num_tokens, device=topology.device)
    loss = training.passes.backward(batch, training.scaler.scale(weight))
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.scheduler.step()
    training.optimizer.zero_grad()
    return global_sum(loss, topology).item() / batch.num_tokens


@torch.no_grad()
def evaluate(
    training: Training, batches: Iterable[Batch], topology: Topology, should_stop: Callable[[], bool]
) -> float | None:
    """Mean loss over `batches`; draws nothing from any RNG.

    None when it was broken off, because training is to stop.
    """
    training.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=topology.device)
    num_tokens = 0
    for batch in batches:
        if should_stop():
            return None
        total += training.passes.loss(batch)
        num_tokens += batch.num_tokens
    training.model.train()
    return global_sum(total, topology).item() / num_tokens


def train(options: Options, topology: Topology, corpus: Corpus) -> str | None:
    """Train up to `--steps`, from the newest checkpoint of the run if it has one; all ranks call it.

    Returns why it stopped before, or None.
    """
    text = load_text(corpus, options, topology)
    training = build(options, topology, text)

    # Run: chosen or created once for all ranks, then everything is loaded from its newest checkpoint.
    settings = options.as_json() | {"dataset": corpus.fingerprint, "world_size": topology.world_size}
    run = choose_run(options, settings, rank=topology.rank)
    changes = changed_settings(config_before(run, options), settings)
    reporter = Reporter(rank=topology.rank, log_json=options.log_json)
    reporter.say(f"run {run.number} in {run.path}: {ranks(topology.world_size)}, {options.parallel}")
    reporter.changed(changes)
    require_allowed(changes, run.path)
    sinks = event_sinks(options, run.path)
    config = checkpoint_config(options)
    with text.loader, Checkpointer(run.path, config=config, sinks=sinks) as checkpointer:
        loaded = restore(checkpointer, run, training.state, options)
        reporter.loaded(loaded, run.document.parent, world_size=topology.world_size)
        done = loaded.step if loaded else 0
        last_step = done + text.steps_left(options.epochs) if options.epochs else max(options.steps, done)
        batches = text.training()
        for step in range(done + 1, last_step + 1):
            lr = float(training.optimizer.param_groups[0]["lr"])
            batch = next(batches)
            loss = train_step(training, batch, topology)
            training.history.append(loss)
            checkpointer.log_scalars(step, {"train/loss": loss, "train/lr": lr})
            reporter.stepped(step=step, last_step=last_step, loss=loss, lr=lr, batch=batch)

            is_last = step == last_step
            save_due = options.saves and checkpointer.should_save(
                step, finished_epoch=text.finished_epoch, is_last=is_last
            )
            metrics = {"loss": loss}
            if step % options.eval_every == 0 or is_last or (save_due and options.keep_best):
                validation = text.validation(options.eval_iters)
                val_loss = evaluate(training, validation, topology, checkpointer.should_stop)
                if val_loss is None:
                    save_due = save_due or (options.saves and checkpointer.should_save(step))
                else:
                    metrics["val_loss"] = val_loss
                    checkpointer.log_scalars(step, {"validation/loss": val_loss})
                    reporter.validated(step=step, loss=val_loss)
            if save_due:
                handle = checkpointer.save(training.state, step=step, metrics=metrics, tags=tags_of(changes))
                reporter.saving(step=step, handle=handle)
            reporter.poll()
            if checkpointer.should_stop():
                break
        checkpointer.wait()
        reporter.close()
    if checkpointer.stop_reason is not None:
        reporter.say(f"stopped at step {step} ({checkpointer.stop_reason}); start again to go on")
        return checkpointer.stop_reason
    if options.export_final is not None and topology.rank == 0:
        last = f"{run.path}@{last_step}"
        reporter.say(export_final(last, options.export_final, has_adapters=options.lora_rank is not None))
    saved = "" if options.saves else ", not saved"
    reporter.say(f"finished at step {last_step}{saved}; to extend this run: {longer(options, last_step)}")
    return None


def export_final(ref: str, directory: str, *, has_adapters: bool) -> str:
    """Export the model of a checkpoint; one rank calls it. Returns what to say of it."""
    # An earlier export goes, but for one on an object store, where new files cannot be made ready beside it.
    report = export(ref, directory, fuse_lora=has_adapters, force="://" not in directory)
    return f"exported the model of step {report.step} to {report.path}"


def longer(options: Options, last_step: int) -> str:
    """The flag that extends a finished run to about twice its length."""
    return f"--epochs {2 * options.epochs}" if options.epochs else f"--steps {last_step + options.steps}"


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
        with join(os.environ, options.parallel) as topology:
            stop_reason = train(options, topology, read_corpus())
    except errors.CheckpointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:  # before there was anything to save, or a second one
        return 128 + signal.SIGINT
    return stop_code(stop_reason)


if __name__ == "__main__":
    sys.exit(main())
