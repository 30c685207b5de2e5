"""The order of the data: which samples make a global batch, whatever the number of ranks.

Owns the permutation and the position in it. Knows indices only, no dataset and no loader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from dcp_ckpt.errors import ConfigError, StateMismatch

__all__ = ["ElasticSampler"]


class ElasticSampler:
    """A batch sampler whose global order depends on seed and epoch alone, so a run may change its world.

    Iterating yields this rank's part of one global batch after the other, without end: epoch follows
    epoch. The part of rank r is positions floor(B*r/W) to floor(B*(r+1)/W) of the batch.

    A batch counts as consumed once it has been yielded; the state never includes batches beyond it. So take
    the state at a step boundary, and do not let a loader draw ahead of the training step (a DataLoader with
    workers does): what was drawn and not trained on would be skipped after a resume.

    Args:
        num_samples: size of the dataset.
        global_batch_size: samples of all ranks in one step.
        rank: this rank.
        world_size: number of ranks that share each batch.
        seed: of the order; a loaded state replaces it.
        fingerprint: names the dataset (a digest of its files, say); a state with another one is refused.
        drop_last: leave out the last, smaller batch of each epoch; otherwise some ranks may get an empty
            list there.

    Raises:
        ConfigError: sizes that cannot work, such as fewer samples in a batch than ranks.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        fingerprint: str = "",
        drop_last: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not in a world of {world_size}")
        if global_batch_size < world_size:
            raise ConfigError(
                f"a global batch of {global_batch_size} samples cannot feed {world_size} ranks; "
                "use at least one sample per rank"
            )
        if num_samples < (global_batch_size if drop_last else 1):
            raise ConfigError(
                f"{num_samples} samples do not fill one global batch of {global_batch_size}; use a smaller "
                "batch, or drop_last=False"
            )
        self._num_samples = num_samples
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._fingerprint = fingerprint
        self._drop_last = drop_last
        self._epoch = 0
        self._consumed = 0
        self._order: tuple[tuple[int, int], torch.Tensor] | None = None
        self._last: torch.Tensor | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the last batch, or of the first one."""
        return self._epoch

    @property
    def samples_consumed(self) -> int:
        """Samples of the current epoch that all ranks together have consumed."""
        return self._consumed

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one whole epoch."""
        full, rest = divmod(self._num_samples, self._global_batch_size)
        return full if self._drop_last or not rest else full + 1

    @property
    def last_global_batch(self) -> list[int]:
        """Sample indices of the whole global batch that was yielded last; the same on every rank."""
        return [] if self._last is None else self._last.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; does nothing inside of that epoch, so a resumed position stays."""
        if epoch != self._epoch:
            self._epoch, self._consumed = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            batch = self._next_batch()
            first = len(batch) * self._rank // self._world_size
            stop = len(batch) * (self._rank + 1) // self._world_size
            yield batch[first:stop].tolist()

    def _next_batch(self) -> torch.Tensor:
        left = self._num_samples - self._consumed
        if left < (self._global_batch_size if self._drop_last else 1):
            self._epoch, self._consumed = self._epoch + 1, 0
        start = self._consumed
        stop = min(start + self._global_batch_size, self._num_samples)
        self._last = self._permutation()[start:stop]
        self._consumed = stop
        return self._last

    def _permutation(self) -> torch.Tensor:
        """The order of the current epoch: int64 of shape (num_samples,), from the CPU generator of torch."""
        key = (self._seed, self._epoch)
        if self._order is None or self._order[0] != key:
            digest = hashlib.sha256(f"{self._seed}/{self._epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            self._order = (key, torch.randperm(self._num_samples, generator=generator))
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        """The position; equal on all ranks and independent of their number."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "samples_consumed": self._consumed,
            "num_samples": self._num_samples,
            "global_batch_size": self._global_batch_size,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stands, also with another world or global batch size.

        Raises:
            StateMismatch: it belongs to another dataset. Nothing was changed.
        """
        if state["num_samples"] != self._num_samples:
            raise StateMismatch(
                f"the checkpoint stands in a dataset of {state['num_samples']} samples, this one has "
                f"{self._num_samples}; use the same data, or load without the dataloader to start it anew"
            )
        # A side that names no dataset says nothing about it.
        if state["fingerprint"] and self._fingerprint and state["fingerprint"] != self._fingerprint:
            raise StateMismatch(
                f"the checkpoint stands in dataset {state['fingerprint']}, this one is {self._fingerprint}; "
                "use the same data, or load without the dataloader to start it anew"
            )
        self._seed, self._epoch = state["seed"], state["epoch"]
        self._consumed, self._last = state["samples_consumed"], None
