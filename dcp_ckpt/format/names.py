"""Names of directories and files of a run, and nothing else.

The only place where names are made or taken apart (docs/format.md, section 2). Parsing is
whole-match and accepts exactly what formatting produces, so `step-1` is never `step-10`
and a hostile name never becomes a path. Numbers have at most 18 digits: all of them fit into 64 bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "DCP_METADATA",
    "EPOCHS",
    "MANIFEST",
    "MARKS",
    "MAX_STEP",
    "RUN_JSON",
    "TRASH",
    "AttemptId",
    "StepDir",
    "data_file_name",
    "epoch_name",
    "fragment_name",
    "lease_name",
    "parse_data_file_name",
    "parse_epoch_name",
    "parse_fragment_name",
    "parse_lease_name",
    "parse_run_name",
    "resumed_name",
    "run_name",
]

MANIFEST = "manifest.json"
DCP_METADATA = ".metadata"
RUN_JSON = "run.json"
EPOCHS = "epochs"
MARKS = "marks"
TRASH = "trash"

MAX_STEP = 10**18 - 1
_STEP = re.compile(r"step-([0-9]{8,18})(?:\.e([1-9][0-9]{0,17}))?")
_ATTEMPT = re.compile(r"e([0-9]{4,18})-s([0-9]{6,18})")
_FRAGMENT = re.compile(r"rank-([0-9]{5,18})\.(e[0-9]{4,18}-s[0-9]{6,18})\.json")
_DATA = re.compile(r"__([0-9]{1,18})_([0-9]{1,18})\.(e[0-9]{4,18}-s[0-9]{6,18})\.distcp")
_EPOCH = re.compile(r"([0-9]{8,18})\.json")
_LEASE = re.compile(r"([0-9]{8,18})\.lease")
_RUN = re.compile(r"run-([0-9]{3,18})")


@dataclass(frozen=True, order=True)
class AttemptId:
    """One try to save one step: the epoch and the number of the save call in it."""

    epoch: int
    save: int

    def __str__(self) -> str:
        return f"e{self.epoch:04d}-s{self.save:06d}"

    @classmethod
    def parse(cls, text: str) -> AttemptId | None:
        match = _ATTEMPT.fullmatch(text)
        attempt = cls(int(match[1]), int(match[2])) if match else None
        return attempt if attempt and str(attempt) == text else None


@dataclass(frozen=True)
class StepDir:
    """The directory of one step: the plain name, or that of one epoch."""

    step: int
    epoch: int | None = None

    def __lt__(self, other: StepDir) -> bool:
        """By step, the plain name first."""
        return (self.step, self.epoch or 0) < (other.step, other.epoch or 0)

    def __str__(self) -> str:
        suffix = "" if self.epoch is None else f".e{self.epoch}"
        return f"step-{self.step:08d}{suffix}"

    @classmethod
    def parse(cls, text: str) -> StepDir | None:
        match = _STEP.fullmatch(text)
        if not match:
            return None
        directory = cls(int(match[1]), int(match[2]) if match[2] else None)
        return directory if str(directory) == text else None


def fragment_name(rank: int, attempt: AttemptId) -> str:
    return f"rank-{rank:05d}.{attempt}.json"


def parse_fragment_name(text: str) -> tuple[int, AttemptId] | None:
    match = _FRAGMENT.fullmatch(text)
    attempt = AttemptId.parse(match[2]) if match else None
    if not match or not attempt:
        return None
    rank = int(match[1])
    return (rank, attempt) if fragment_name(rank, attempt) == text else None


def data_file_name(rank: int, index: int, attempt: AttemptId) -> str:
    return f"__{rank}_{index}.{attempt}.distcp"


def parse_data_file_name(text: str) -> tuple[int, int, AttemptId] | None:
    match = _DATA.fullmatch(text)
    attempt = AttemptId.parse(match[3]) if match else None
    if not match or not attempt:
        return None
    rank, index = int(match[1]), int(match[2])
    return (rank, index, attempt) if data_file_name(rank, index, attempt) == text else None


def epoch_name(epoch: int) -> str:
    return f"{epoch:08d}.json"


def resumed_name(epoch: int) -> str:
    return f"{epoch:08d}.resumed.json"


def lease_name(epoch: int) -> str:
    return f"{epoch:08d}.lease"


def parse_lease_name(text: str) -> int | None:
    match = _LEASE.fullmatch(text)
    return int(match[1]) if match and lease_name(int(match[1])) == text else None


def parse_epoch_name(text: str) -> int | None:
    match = _EPOCH.fullmatch(text)
    return int(match[1]) if match and epoch_name(int(match[1])) == text else None


def run_name(number: int) -> str:
    return f"run-{number:03d}"


def parse_run_name(text: str) -> int | None:
    match = _RUN.fullmatch(text)
    return int(match[1]) if match and run_name(int(match[1])) == text else None
