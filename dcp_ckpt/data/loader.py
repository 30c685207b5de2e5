"""A data loader with worker processes whose position is that of the training, not of the workers.

Owns the torch DataLoader behind it, and when that has to begin again. The order of the samples is
`sampler`'s; what makes a batch is `batches`'.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from dcp_ckpt.closing import Closing
from dcp_ckpt.data.batches import BatchDataset, WorkerStart
from dcp_ckpt.data.sampler import BatchPart, ElasticSampler
from dcp_ckpt.errors import ConfigError, StateMismatch
from dcp_ckpt.forks import spare_forked_children

__all__ = ["ElasticLoader"]


class ElasticLoader(Closing):
    """Batches of this rank, in the order of an `ElasticSampler`, made by worker processes ahead of time.

        loader = ElasticLoader(dataset, sampler, num_workers=4)
        state = TrainState(model=model, optimizer=optimizer, dataloader=loader)
        ...
        for epoch in range(loader.epoch, num_epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                ...

    **Position.** Its state is the sampler's, and counts the batches that were handed to the training loop;
    what workers have made ahead is not in it. So take it at a step boundary, and any number of ranks goes on
    with every sample exactly once. Iterating yields what is left of the current epoch and then ends: the
    whole of it, unless a state was loaded or an earlier iteration was broken off, which the next one
    continues. A state that was taken after the last batch of an epoch ends the first iteration at once, as it
    did where it was taken. A state that is loaded, or an epoch that is set, while an iteration is under way
    holds from its next batch on. A batch that could not be made raises the error of whoever failed, is not
    counted, and is tried again.

    **Random numbers.** Iterating draws nothing from the global generators of this process, with or without
    workers. What a dataset draws from those of Python, NumPy and torch's CPU in `__getitem__` depends on the
    order's seed, the epoch and the sample alone: it repeats after a resume, on any number of ranks and of
    workers. In `__getitems__` and in `collate_fn` it depends on the seed, the epoch and which samples are
    together: it repeats on the same data-parallel and batch size. What does not repeat: generators that a
    dataset keeps itself or seeds by time, unless it derives them from `torch.initial_seed()`, which is the
    sample's; what it draws on an accelerator; what it carries over from one sample to the next, since workers
    come and go.

    **Workers** let SIGTERM and SIGINT pass, so that a final save gets its batches, and leave when the trainer
    ends, also by `kill -9`. `close` ends them; what is iterated later starts new ones.

    Args:
        dataset: with `__len__`, and `__getitem__` of one index or `__getitems__` of a list of them.
        sampler: of this rank, over as many samples; moved by this loader alone from now on.
        collate_fn: makes a batch of a list of samples; None means torch's `default_collate`. It gets an empty
            list where a rank has no sample in the last batch of an epoch, which `default_collate` cannot do.
        num_workers, prefetch_factor, persistent_workers, pin_memory, multiprocessing_context: see
            `torch.utils.data.DataLoader`. Without `persistent_workers` every epoch starts new ones.
        timeout_seconds: for one batch of a worker; 0 waits without limit.
        worker_init_fn: called in every worker with its number, after signals are taken care of.

    Raises:
        ConfigError: sizes that do not fit, or a dataset without indices.
    """

    is_elastic = True

    def __init__(
        self,
        dataset: Any,
        sampler: ElasticSampler,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        timeout_seconds: float = 0.0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigError(
                "an elastic loader needs a dataset with indices and a length, not an iterable one"
            )
        if len(dataset) != sampler.num_samples:
            raise ConfigError(
                f"the dataset has {len(dataset)} samples, and the sampler orders {sampler.num_samples}"
            )
        self._sampler = sampler
        self._takes_empty = collate_fn is not None
        if problem := self._empty_part(sampler.samples_consumed):
            raise ConfigError(problem)
        self._generator = torch.Generator()  # the global one would be drawn from by every iteration
        self._settings: dict[str, Any] = {
            "dataset": BatchDataset(dataset, collate_fn or default_collate),
            "batch_size": None,
            "sampler": _RestOfEpoch(sampler),
            "collate_fn": _as_it_is,
            "num_workers": num_workers,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "pin_memory": pin_memory,
            "timeout": timeout_seconds,
            "worker_init_fn": WorkerStart(worker_init_fn),
            "multiprocessing_context": multiprocessing_context,
            "generator": self._generator,
        }
        self._loader: DataLoader[Any] | None = DataLoader(**self._settings)
        self._ahead: Iterator[Any] | None = None
        self._position = sampler.position

    @property
    def sampler(self) -> ElasticSampler:
        """Where the training stands; `last_global_batch` is that of the batch that was handed out last."""
        return self._sampler

    @property
    def epoch(self) -> int:
        """The epoch of the last batch, or of the first one."""
        return self._sampler.epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._sampler.batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; does nothing inside of that epoch, so a resumed position stays."""
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        while not self._sampler.is_epoch_over:
            yield self._next()
        self._end_ahead()
        self._sampler.begin_next_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position of the training; equal on all ranks and independent of their number."""
        return self._sampler.state_dict()

    def state_problem(self, state: Any) -> str | None:
        """Why `load_state_dict` would refuse a state, or None."""
        return self._sampler.state_problem(state) or self._empty_part(
            self._sampler.consumed_after_loading(state)
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stands, also with another world or global batch size.

        Raises:
            StateMismatch: it belongs to another dataset, or leaves a batch of which some rank has no sample.
                Nothing was changed.
        """
        if problem := self.state_problem(state):
            raise StateMismatch(problem)
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """End the workers. Idempotent."""
        ahead, self._ahead = self._ahead, None
        self._loader = None
        shut_down = getattr(ahead, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()  # and not left to its end: the traceback of an error may hold on to it

    def _next(self) -> Any:
        if self._ahead is None or self._position != self._sampler.position:
            self._begin()
        assert self._ahead is not None
        try:
            batch = next(self._ahead)
        except BaseException as error:
            # The batch was not handed out: whoever asks again gets it, and not the one after.
            self.close()
            if isinstance(error, StopIteration):
                raise RuntimeError("the dataset or collate_fn raised StopIteration") from error
            raise
        self._sampler.consume()
        self._position = self._sampler.position
        return batch

    def _begin(self) -> None:
        """Make batches from where the sampler stands."""
        self._end_ahead()
        if self._loader is None:
            self._loader = DataLoader(**self._settings)
        self._generator.manual_seed(self._sampler.position[0] % 2**63)  # torch takes no larger ones
        with _starting_workers(self._loader):
            self._ahead = iter(self._loader)
        self._position = self._sampler.position

    def _end_ahead(self) -> None:
        """Forget what was made ahead; ends workers that are not persistent."""
        self._ahead = None

    def _empty_part(self, samples_consumed: int) -> str | None:
        """Why some batch cannot be made on some rank, or None."""
        if self._takes_empty or self._sampler.smallest_part(samples_consumed):
            return None
        return (
            "in the last batch of an epoch some rank has no samples, and default_collate makes no batch of "
            "none; use drop_last=True, another global batch size, or a collate_fn that takes an empty list"
        )


@contextmanager
def _starting_workers(loader: DataLoader[Any]) -> Iterator[None]:
    """Let processes begin with SIGTERM blocked, in all threads that they will have.

    A spawned one has some before `ignore_stop_signals` is called, which would take the signal and lose it.
    """
    spare_forked_children()
    context = loader.multiprocessing_context or multiprocessing
    if loader.num_workers and context.get_start_method() != "fork":
        ensure_running()  # the first spawning does it, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _RestOfEpoch:
    """What the workers are asked for: the parts that are left each time."""

    def __init__(self, sampler: ElasticSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[BatchPart]:
        return self._sampler.rest_of_epoch()


def _as_it_is(batch: Any) -> Any:
    return batch
