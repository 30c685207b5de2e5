"""The flags of the training driver: parsed and checked.

Called by `train.py`. Knows nothing of torch; turning options into objects is the caller's business.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Options", "parse_options"]

_MODEL_SIZES = ("tiny", "small", "base")
_PARALLEL = ("fsdp", "ddp", "hsdp", "fsdp+tp", "pp")
_AMP = ("bf16", "fp16")
_SAVE_STRATEGIES = ("steps", "epoch", "no")
_OVERLAPS = ("step", "off")
_RESUMES = ("auto", "never", "must", "ask")
_OTHER_NAMES = {
    "--save-total-limit": "--keep-last",
    "--max-to-keep": "--keep-last",
    "--keep-latest-k": "--keep-last",
    "--save-top-k": "--keep-best",
    "--interval": "--save-every",
    "--save-steps": "--save-every",
    "--checkpoint-dir": "--run-dir",
    "--output-dir": "--run-dir",
    "--resume-from-checkpoint": "--resume",
    "--max-steps": "--steps",
    "--num-train-epochs": "--epochs",
    "--learning-rate": "--lr",
}
"""What other trainers call a flag -> its name here."""


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
        """All options as JSON types, to be recorded in a new run."""
        paths = {"log_json": self.log_json, "tensorboard": self.tensorboard}
        return asdict(self) | {name: path and str(path) for name, path in paths.items()}


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
    for flag in (argument.partition("=")[0].replace("_", "-") for argument in unknown):
        if flag in _OTHER_NAMES:
            parser.error(f"there is no {flag} here; it is called {_OTHER_NAMES[flag]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    parsed = vars(known)
    if parsed["export_final"] is not None and parsed["save_strategy"] == "no":
        parser.error("--export-final exports the last checkpoint, and with --save-strategy no there is none")
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


def _positive(text: str) -> float:
    number = _minutes(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _parser() -> _OneLineParser:
    parser = _OneLineParser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    group.add_argument("--dropout", type=float, default=0.0, help="probability")
    group.add_argument("--steps", type=_count, default=200, help="train up to this step")
    group.add_argument(
        "--epochs", type=_count, default=None, help="train up to the end of this epoch instead"
    )
    group.add_argument("--batch-size", type=_count, default=120, help="samples a step, over all ranks")
    group.add_argument("--workers", type=_amount, default=0, help="data-loading processes of each rank")
    group.add_argument(
        "--grad-accum", type=_count, default=1, help="micro-batches a step; pp: at least one for each stage"
    )
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    group.add_argument(
        "--lr-steps", type=_count, default=2000, help="length of the schedule; extending --steps keeps it"
    )
    group.add_argument("--seed", type=int, default=0, help="of weights, order of samples and dropout")
    group.add_argument("--eval-every", type=_count, default=50, help="steps between validations")
    group.add_argument(
        "--max-minutes", type=_minutes, default=None, help="save and stop after this much time; exits with 0"
    )
    group.add_argument("--eval-iters", type=_count, default=4, help="global batches a validation")


def _add_saving_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save-strategy", choices=_SAVE_STRATEGIES, default="steps", help="when to save")
    group.add_argument("--save-every", type=_count, default=50, help="steps, or epochs, between saves")
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
        "--keep-every", type=int, default=0, help="keep every step that is a multiple of this; 0: none"
    )
    group.add_argument("--keep-best", type=int, default=0, help="best checkpoints to keep besides")
    group.add_argument("--monitor", choices=("val_loss",), default="val_loss", help="what `best` compares")
    group.add_argument("--mode", choices=("min", "max"), default="min", help="whether less or more is better")
    group.add_argument(
        "--overlap", choices=_OVERLAPS, default="step", help="whether a save copies beside the next step"
    )
