"""Datasets for the tests of loaders, in a module of their own so that spawned workers find them."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, get_worker_info


class Numbers(Dataset[int]):
    """Sample i is the number i."""

    def __init__(self, size: int = 53) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index


class Augmented(Numbers):
    """Sample i with random numbers of every kind."""

    def __getitem__(self, index: int) -> Any:
        return index, random.gauss(0, 1), float(numpy.random.randn()), torch.randn(()).item()


class AugmentedTogether(Numbers):
    """The same, of many samples at once."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [
            (index, random.random(), float(numpy.random.rand()), torch.rand(()).item()) for index in indices
        ]


class Failing(Numbers):
    """One sample cannot be read, as long as a file is there."""

    def __init__(self, bad: int, while_there: Path, how: Callable[[], Any]) -> None:
        super().__init__()
        self._bad, self._while_there, self._how = bad, while_there, how

    def __getitem__(self, index: int) -> int:
        if index == self._bad and self._while_there.exists():
            self._how()
        return index


def no_such_file() -> None:
    raise FileNotFoundError("sample.png")


def out_of_memory() -> None:
    """What the kernel does to a process."""
    assert get_worker_info() is not None
    os.kill(os.getpid(), signal.SIGKILL)


def stop_iteration() -> None:
    raise StopIteration


class Heavy(Numbers):
    """Samples that do not go through shared memory and fill a pipe: what a worker hands over then waits."""

    def __getitem__(self, index: int) -> Any:
        return bytes(300_000)


class WhoAmI(Numbers):
    """The process that makes the sample."""

    def __getitem__(self, index: int) -> int:
        return os.getpid()


class Collecting(Numbers):
    """A worker that collects garbage, as every process does now and then."""

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def as_list(samples: list[Any]) -> list[Any]:
    """A collate function that takes what comes, also nothing."""
    return list(samples)


def with_noise(samples: list[Any]) -> tuple[list[Any], float]:
    return samples, random.random() + float(numpy.random.rand()) + torch.rand(()).item()
