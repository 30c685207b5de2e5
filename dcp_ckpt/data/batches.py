"""What makes a batch of samples, in a data-loading process or in the trainer itself.

Owns the random streams that samples are made with: they depend on the sample and the epoch, never on who
loads it or when. Knows the user's dataset and collate function; called by torch's DataLoader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from dcp_ckpt.data.sampler import BatchPart
from dcp_ckpt.state.generators import HOST_KINDS, live_kinds, seed_host_streams, undisturbed_streams
from dcp_ckpt.stopping.signals import ignore_stop_signals

__all__ = ["BatchDataset", "WorkerStart"]


class BatchDataset(Dataset[Any]):
    """A dataset whose items are batches and whose index is a `BatchPart`.

    Args:
        dataset: of samples, with `__getitem__` or `__getitems__`.
        collate: makes a batch of a list of samples.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, part: BatchPart) -> Any:
        if get_worker_info() is not None:
            return self._batch(part)
        with undisturbed_streams([kind for kind in live_kinds() if kind in HOST_KINDS]):
            return self._batch(part)

    def _batch(self, part: BatchPart) -> Any:
        samples = self._samples(part)
        _begin_streams(part, f"batch {part.start}")
        return self._collate(samples)

    def _samples(self, part: BatchPart) -> Any:
        fetch_all = getattr(self._dataset, "__getitems__", None)
        if fetch_all is not None:
            _begin_streams(part, f"samples {part.start}")
            return fetch_all(part.indices)
        samples = []
        for index in part.indices:
            _begin_streams(part, f"sample {index}")
            samples.append(self._dataset[index])
        return samples


def _begin_streams(part: BatchPart, what: str) -> None:
    digest = hashlib.blake2b(f"{part.seed}/{part.epoch}/{what}".encode(), digest_size=8).digest()
    seed_host_streams(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class WorkerStart:
    """The first thing that a data-loading process does; `then` is the user's own."""

    then: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        ignore_stop_signals(worker_id)
        if self.then is not None:
            self.then(worker_id)
