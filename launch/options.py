"""The flags of the training driver: parsed and checked.

Called by `train.py`. Knows nothing of torch; turning options into objects is the caller's business.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

__all__ = ["Options", "flag_here", "parse_options"]

_MODEL_SIZES = ("tiny", "small", "base")
_PARALLEL = ("fsdp", "ddp", "hsdp", "fsdp+tp", "pp")
_AMP = ("bf16", "fp16")
_SAVE_STRATEGIES = ("steps", "epoch", "no")
_SAVE_EVERY = {"steps": 50, "epoch": 1, "no": 50}
"""Strategy -> how often, if `--save-every` does not say it."""
_OVERLAPS = ("step", "off")
_RESUMES = ("auto", "never", "must", "ask")
_NAMES_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "--amp bf16": ("bf16",),
    "--amp fp16": ("fp16",),
    "--batch-size, over all ranks": ("global-batch-size", "per-device-train-batch-size", "train-batch-size"),
    "--epochs": ("max-epochs", "num-epochs", "num-train-epochs"),
    "--eval-every": ("eval-interval", "eval-steps", "val-check-interval"),
    "--grad-accum": ("accumulate-grad-batches", "gradient-accumulation-steps"),
    "--keep-best": ("save-top-k", "top-k"),
    "--keep-every": ("keep-period",),
    "--keep-last": ("keep-last-n", "keep-latest", "keep-latest-k", "max-to-keep", "save-total-limit"),
    "--lr": ("learning-rate",),
    "--max-minutes": ("max-time",),
    "--mode max": ("greater-is-better",),
    "--monitor": ("metric-for-best-model",),
    "--overlap": ("async-mode",),
    "--parallel": ("strategy",),
    "--resume": ("ckpt-path", "resume-from", "resume-from-checkpoint"),
    "--run-dir": (
        "checkpoint-dir",
        "ckpt-dir",
        "default-root-dir",
        "dirpath",
        "folder",
        "logdir",
        "output-dir",
    ),
    "--save-every": (
        "checkpoint-interval",
        "every-n-train-steps",
        "interval",
        "save-interval",
        "save-interval-steps",
        "save-steps",
    ),
    "--save-every-minutes": ("train-time-interval",),
    "--save-strategy epoch --save-every": ("every-n-epochs",),
    "--steps": ("max-iters", "max-steps", "total-steps", "train-steps"),
    "--workers": ("dataloader-num-workers", "num-workers"),
}
"""A flag here -> what other trainers call it."""
_SECTION = re.compile(r"(checkpoint|trainer|training)\.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one start of the driver does. Sizes are global, intervals are in steps."""

    run_dir: str
    name: str | None
    run_number: int | None
    list_runs: bool
    resume: str
    parallel: str
    model_size: str
    lora_rank: int | None
    amp: Literal["bf16", "fp16"] | None
    compile: bool
    dropout: float
    steps: int
    epochs: int | None
    batch_size: int
    workers: int
    grad_accum: int
    lr: float
    lr_steps: int
    seed: int
    eval_every: int
    eval_iters: int
    save_strategy: str
    save_every: int
    save_every_minutes: float | None
    mtbf_hours: float | None
    save_at: tuple[int, ...]
    keep_last: int
    keep_every: int
    keep_best: int
    monitor: str
    mode: Literal["min", "max"]
    overlap: Literal["off", "step"]
    export_final: str | None
    max_minutes: float | None
    log_json: Path | None
    tensorboard: Path | None

    @property
    def resume_ref(self) -> str | None:
        """The checkpoint that `--resume` names, if it names one."""
        return None if self.resume in _RESUMES else self.resume

    @property
    def saves(self) -> bool:
        """Whether anything is saved at all."""
        return self.save_strategy != "no"

    def as_json(self) -> dict[str, Any]:
        """All options as they read back from JSON, to be recorded in a new run."""
        paths = {"log_json": self.log_json, "tensorboard": self.tensorboard}
        as_text = {name: path and str(path) for name, path in paths.items()}
        return asdict(self) | as_text | {"save_at": list(self.save_at)}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it says something, and `N` for numbers."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "PATH" if action.type is Path else "N" if action.type else "TEXT"


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, on one rank only, and exits with 2."""

    announce: bool = True

    def error(self, message: str) -> None:  # type: ignore[override]  # `exit` does not return
        self.exit(2, f"{self.prog}: {message}\n")

    def exit(self, status: int = 0, message: str | None = None) -> None:  # type: ignore[override]
        super().exit(status, message if self.announce else None)


def parse_options(arguments: Sequence[str] | None = None, *, announce: bool = True) -> Options:
    """Parse `arguments` (default: the command line).

    Args:
        announce: whether this process prints what is wrong; true on one rank.

    Raises:
        SystemExit: code 2 for a wrong flag; one that other trainers have is answered with its name here.
    """
    parser = _parser()
    parser.announce = announce
    known, unknown = parser.parse_known_args(arguments)
    for flag in (argument.partition("=")[0] for argument in unknown if argument.startswith("-")):
        if (here := flag_here(flag)) is not None:
            parser.error(f"there is no {flag} here; it is called {here}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0])}")
    parsed = vars(known)
    if parsed["export_final"] is not None and parsed["save_strategy"] == "no":
        parser.error("--export-final exports the last checkpoint, and with --save-strategy no there is none")
    if parsed["save_every"] is None:
        parsed["save_every"] = _SAVE_EVERY[parsed["save_strategy"]]
    if parsed["resume"] not in _RESUMES:
        if not {"@", "/"} & set(parsed["resume"]):
            parser.error(
                f"--resume takes {', '.join(_RESUMES)} or a checkpoint such as runs/run-001@1200, "
                f"not {parsed['resume']}"
            )
        if parsed["run_number"] is not None:
            parser.error("--run-number and a checkpoint in --resume both name a run: give one of them")
    if parsed["run_number"] is not None and parsed["resume"] == "never":
        parser.error("--run-number continues a run, --resume never starts a new one: give one of them")
    return Options(**parsed)


def flag_here(flag: str) -> str | None:
    """What `flag` of another trainer, or one written with underscores, is called here, if people mean one.

    The sections of torchtitan's flags, as in `--checkpoint.interval`, do not matter.
    """
    name = _SECTION.sub("", flag.removeprefix("--").replace("_", "-"), count=1)
    if f"--{name}" in _own_flags():
        return f"--{name}"
    return next((here for here, names in _NAMES_ELSEWHERE.items() if name in names), None)


def _own_flags() -> list[str]:
    return [f"--{field.name.replace('_', '-')}" for field in fields(Options)]


def _meant(flag: str) -> str:
    near = difflib.get_close_matches(flag.partition("=")[0], _own_flags(), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def _amount(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 0 or more")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes of 0 or more")
    return minutes


def _probability(text: str) -> float:
    try:
        probability = float(text)
    except ValueError:
        probability = -1.0
    if not 0 <= probability < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return probability


def _positive(text: str) -> float:
    number = _minutes(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _parser() -> _OneLineParser:
    parser = _OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        description="Train a small GPT on the Python standard library's sources, with checkpoints.",
    )
    _add_run_flags(parser.add_argument_group("run"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_saving_flags(parser.add_argument_group("saving"))
    return parser


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--run-dir", default="runs", help="directory or URL that holds the runs")
    group.add_argument("--name", default=None, help="name of a new run")
    group.add_argument("--run-number", type=_count, default=None, help="continue this run, not the newest")
    group.add_argument("--list-runs", action="store_true", help="print the runs and exit")
    group.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,never,must,ask}|REF",
        help="auto: continue if there is a run; never: start a new one; must: continue or exit with 3; ask: "
        "ask on the terminal; RUN@STEP, RUN@best or a checkpoint's path: go on from there, in a new run "
        "where the run has newer checkpoints",
    )
    group.add_argument("--log-json", type=Path, default=None, help="append one JSON object a line here")
    group.add_argument("--tensorboard", type=Path, default=None, metavar="DIR", help="log scalars below DIR")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--parallel", choices=_PARALLEL, default="fsdp", help="how ranks share the model")
    group.add_argument(
        "--lora-rank",
        type=_count,
        default=None,
        help="train adapters of this rank; a run without adapters is fine-tuned in a new run",
    )
    group.add_argument(
        "--amp", nargs="?", choices=_AMP, const="bf16", default=None, help="mixed precision; bf16 if bare"
    )
    group.add_argument("--compile", action="store_true", help="compile the blocks of the model")
    group.add_argument("--model-size", choices=_MODEL_SIZES, default="small", help="layers, width, context")
    group.add_argument("--dropout", type=_probability, default=0.0, help="probability, below 1")
    group.add_argument("--steps", type=_count, default=200, help="train up to this step")
    group.add_argument(
        "--epochs", type=_count, default=None, help="train up to the end of this epoch instead"
    )
    group.add_argument("--batch-size", type=_count, default=120, help="samples a step, over all ranks")
    group.add_argument("--workers", type=_amount, default=0, help="data-loading processes of each rank")
    group.add_argument(
        "--grad-accum", type=_count, default=1, help="micro-batches a step; pp: at least one for each stage"
    )
    group.add_argument("--lr", type=_positive, default=1e-3, help="peak learning rate")
    group.add_argument(
        "--lr-steps", type=_count, default=2000, help="length of the schedule; extending --steps keeps it"
    )
    group.add_argument("--seed", type=_amount, default=0, help="of weights, order of samples and dropout")
    group.add_argument("--eval-every", type=_count, default=50, help="steps between validations")
    group.add_argument(
        "--max-minutes", type=_minutes, default=None, help="save and stop after this much time; exits with 0"
    )
    group.add_argument("--eval-iters", type=_count, default=4, help="global batches a validation")


def _add_saving_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save-strategy", choices=_SAVE_STRATEGIES, default="steps", help="when to save")
    group.add_argument(
        "--save-every",
        type=_count,
        default=None,
        help="steps between saves (default: 50), or epochs with --save-strategy epoch (default: 1)",
    )
    group.add_argument(
        "--save-every-minutes", type=_positive, default=None, help="save also when so much time has passed"
    )
    group.add_argument(
        "--save-at", type=_count, nargs="+", default=(), metavar="STEP", help="save also at these steps"
    )
    group.add_argument(
        "--mtbf-hours",
        type=_positive,
        default=None,
        help="mean time between failures of the job: save also as often as then costs least",
    )
    group.add_argument(
        "--export-final",
        default=None,
        metavar="DIR",
        help="when the last step is reached, export the model to safetensors there, adapters merged",
    )
    group.add_argument("--keep-last", type=_count, default=2, help="newest checkpoints to keep")
    group.add_argument(
        "--keep-every", type=_amount, default=0, help="keep besides every step that is a multiple of this"
    )
    group.add_argument("--keep-best", type=_amount, default=0, help="best checkpoints to keep besides")
    group.add_argument("--monitor", choices=("val_loss",), default="val_loss", help="what `best` compares")
    group.add_argument("--mode", choices=("min", "max"), default="min", help="whether less or more is better")
    group.add_argument(
        "--overlap", choices=_OVERLAPS, default="step", help="whether a save copies beside the next step"
    )
