"""The order of the data: which samples make a global batch, whatever the number of ranks.

Owns the permutation and the position in it. Knows indices only, no dataset and no loader.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dcp_ckpt.errors import ConfigError, StateMismatch

__all__ = ["BatchPart", "ElasticSampler"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """One rank's part of one global batch.

    Args:
        seed, epoch: of the order.
        start: position in the epoch of the part's first sample.
        indices: of its samples; may be empty in the last batch of an epoch.
    """

    seed: int
    epoch: int
    start: int
    indices: list[int]


class ElasticSampler:
    """A batch sampler whose global order depends on seed and epoch alone, so a run may change its world.

    Iterating yields this rank's part of one global batch after the other, without end: epoch follows
    epoch. The part of rank r is positions floor(B*r/W) to floor(B*(r+1)/W) of the batch.

    A batch counts as consumed once it has been yielded; the state never includes batches beyond it. So take
    the state at a step boundary, and do not let a loader draw ahead of the training step (a DataLoader with
    workers does): what was drawn and not trained on would be skipped after a resume.
    `dcp_ckpt.data.ElasticLoader` is a loader with workers that counts what was trained on.

    Args:
        num_samples: size of the dataset.
        global_batch_size: samples of all ranks in one step.
        rank: this rank; with tensor, context or pipeline parallelism `MeshRoles.data_coordinate`, so that all
            peers get the same samples.
        world_size: number of ranks that share each batch; likewise `MeshRoles.data_size`.
        seed: of the order; a loaded state replaces it.
        fingerprint: names the dataset (a digest of its files, say); a state with another one is refused.
        drop_last: leave out the last, smaller batch of each epoch; otherwise some ranks may get an empty
            list there.
        allow_other_dataset: take a state of another dataset. Its position means nothing in this one, so the
            epoch in which it stands begins anew.

    Raises:
        ConfigError: sizes that cannot work, such as fewer samples in a batch than ranks.
    """

    is_elastic = True

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        *,
        fingerprint: str = "",
        drop_last: bool = True,
        allow_other_dataset: bool = False,
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
        self._allow_other_dataset = allow_other_dataset
        self._epoch = 0
        self._consumed = 0
        self._order: tuple[tuple[int, int], torch.Tensor] | None = None
        self._last: torch.Tensor | None = None

    @property
    def num_samples(self) -> int:
        """The size of the dataset."""
        return self._num_samples

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
        """Sample indices of the whole global batch that was consumed last; the same on every rank."""
        return [] if self._last is None else self._last.tolist()

    @property
    def position(self) -> tuple[int, int, int]:
        """Seed, epoch and samples consumed: two samplers at the same position go on with the same samples."""
        return self._seed, self._epoch, self._consumed

    @property
    def is_epoch_over(self) -> bool:
        """Whether no batch of the current epoch is left."""
        return not self._has_batch(self._consumed)

    def smallest_part(self, samples_consumed: int = 0) -> int:
        """The fewest samples that a rank gets in a batch, after a position in an epoch and in later ones."""
        full, left = self._global_batch_size, max(self._num_samples - samples_consumed, 0)
        remainders = [] if self._drop_last else [left % full, self._num_samples % full]
        return min(size for size in (full, *remainders) if size) // self._world_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; does nothing inside of that epoch, so a resumed position stays."""
        if epoch != self._epoch:
            self._epoch, self._consumed = epoch, 0

    def begin_next_epoch(self) -> None:
        """Go to the start of the epoch after this one, whatever is left of this one."""
        self.set_epoch(self._epoch + 1)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            if self.is_epoch_over:
                self.begin_next_epoch()
            part = next(self.rest_of_epoch())
            self.consume()
            yield part.indices

    def rest_of_epoch(self) -> Iterator[BatchPart]:
        """This rank's parts of the batches that are left in this epoch, from here on; consumes none."""
        seed, epoch, position = self.position
        while self._has_batch(position):
            batch = self._batch_at(seed, epoch, position)
            first = len(batch) * self._rank // self._world_size
            stop = len(batch) * (self._rank + 1) // self._world_size
            indices = batch[first:stop].tolist()
            yield BatchPart(seed=seed, epoch=epoch, start=position + first, indices=indices)
            position += len(batch)

    def consume(self) -> None:
        """Count the next batch as consumed; there must be one in this epoch."""
        self._last = self._batch_at(*self.position)
        self._consumed += len(self._last)

    def _has_batch(self, position: int) -> bool:
        return self._num_samples - position >= (self._global_batch_size if self._drop_last else 1)

    def _batch_at(self, seed: int, epoch: int, position: int) -> torch.Tensor:
        """The global batch that starts at a position of an epoch."""
        return self._permutation(seed, epoch)[position : position + self._global_batch_size]

    def _permutation(self, seed: int, epoch: int) -> torch.Tensor:
        """The order of an epoch: int64 of shape (num_samples,), from the CPU generator of torch."""
        key = (seed, epoch)
        if self._order is None or self._order[0] != key:
            digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
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

    def state_problem(self, state: Any) -> str | None:
        """Why `load_state_dict` would refuse a state, or None."""
        if not isinstance(state, dict) or not self.state_dict().keys() <= state.keys():
            return "is not the state of an ElasticSampler"
        if self._allow_other_dataset or (other := self._other_dataset(state)) is None:
            return None
        return (
            f"{other}; use the same data, begin the epoch anew in this one (allow_other_dataset=True), or "
            'load with exclude=("dataloader",) to start from the first epoch'
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stands, also with another world or global batch size.

        Raises:
            StateMismatch: it belongs to another dataset. Nothing was changed.
        """
        if problem := self.state_problem(state):
            raise StateMismatch(problem)
        other = self._other_dataset(state)
        if other is not None:
            log.warning("%s; epoch %d begins anew", other, state["epoch"])
        self._seed, self._epoch, self._last = state["seed"], state["epoch"], None
        self._consumed = self.consumed_after_loading(state)

    def consumed_after_loading(self, state: dict[str, Any]) -> int:
        """What `samples_consumed` would be after loading a state that is not refused."""
        consumed: int = state["samples_consumed"]
        return consumed if self._other_dataset(state) is None else 0

    def _other_dataset(self, state: dict[str, Any]) -> str | None:
        """How the dataset of a state differs from this one, or None."""
        if state["num_samples"] != self._num_samples:
            return (
                f"the checkpoint stands in a dataset of {state['num_samples']} samples, this one has "
                f"{self._num_samples}"
            )
        # A side that names no dataset says nothing about it.
        if state["fingerprint"] and self._fingerprint and state["fingerprint"] != self._fingerprint:
            return f"the checkpoint stands in dataset {state['fingerprint']}, this one is {self._fingerprint}"
        return None
