"""The text that the driver trains on, and the batches of one rank.

The text is the Python standard library's own sources: real, and on every machine. Which samples make a
global batch, and where training stands, is the business of `dcp_ckpt.data`; this module cuts the text into
samples and makes tensors of them. Called by `train.py`; knows nothing of models or checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dcp_ckpt.data import ElasticLoader, ElasticSampler

__all__ = ["IGNORED", "Batch", "Corpus", "FillUp", "TextLoader", "Windows", "read_corpus"]

IGNORED = -100
"""Target of a position that counts in no loss; the default `ignore_index` of `cross_entropy`."""

_EXCLUDED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation text, uint8, and a digest of both."""

    train: torch.Tensor
    validation: torch.Tensor
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of one global batch, of the same size at every step.

    Args:
        inputs: byte values, int64, (rows, context); rows beyond the samples of this rank are zeros.
        targets: the byte after each input, or `IGNORED` in those rows; same shape.
        sample_ids: ids of the whole global batch, in its order; the same on every rank.
        num_tokens: targets of the whole global batch that count.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    sample_ids: Sequence[int]
    num_tokens: int


def read_corpus(
    root: Path | None = None, *, max_bytes: int = 4 << 20, validation_fraction: float = 0.1
) -> Corpus:
    """Read `*.py` below `root` (default: the standard library), sorted by path, up to `max_bytes`.

    The tail is the validation text, so that extending or repeating training never meets it.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    text = bytearray()
    for path in _sources(root):
        if len(text) >= max_bytes:
            break
        text += path.read_bytes()
    del text[max_bytes:]
    if not text:
        raise FileNotFoundError(f"no Python sources to train on below {root}")
    everything = torch.frombuffer(text, dtype=torch.uint8)
    split = len(text) - int(len(text) * validation_fraction)
    digest = hashlib.blake2b(text, digest_size=16).hexdigest()
    return Corpus(train=everything[:split], validation=everything[split:], fingerprint=digest)


def _sources(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _EXCLUDED_DIRECTORIES]
        found += [Path(directory, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


class Windows:
    """Text cut into samples: sample i is the i-th stretch of `context` bytes and the byte after it."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        if len(text) <= context:
            raise ValueError(f"{len(text)} bytes of text hold no window of {context} bytes")
        self.context = context
        self._windows = text.unfold(0, context + 1, context)

    def __len__(self) -> int:
        return len(self._windows)

    def samples(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Byte values, uint8, each (context + 1)."""
        return list(self._windows[list(indices)])

    __getitems__ = samples  # as data loaders call it


@dataclass(frozen=True, kw_only=True)
class FillUp:
    """Makes the rows of a batch of samples: as many as there are, and others that count in no loss.

    All ranks go through the same collectives, also those that have fewer samples or none, and every step has
    the same shapes.
    """

    num_rows: int
    context: int

    def __call__(self, samples: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64, (num_rows, context); the samples are uint8, each (context + 1)."""
        rows = torch.zeros(self.num_rows, self.context + 1, dtype=torch.int64)
        for row, sample in zip(rows, samples, strict=False):
            row.copy_(sample)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        targets[len(samples) :] = IGNORED
        return inputs, targets


class TextLoader:
    """One rank's share of the text as batches of one shape, the same global batches on any number of ranks.

    Args:
        corpus: the whole text.
        context: bytes of a sample.
        global_batch_size: samples of all ranks in one step.
        num_micro_batches: parts of equal size that a batch will be cut into.
        rank: the part of each global batch that this rank trains on; ranks may share one.
        world_size: the number of parts.
        seed: of the order of the samples.
        num_workers: processes that make batches ahead of time; 0: this one makes each when it is asked for.
        device: where batches are put.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        context: int,
        global_batch_size: int,
        num_micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        train = Windows(corpus.train, context)
        self._validation = Windows(corpus.validation, context)
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._device = device
        self.num_micro_batches = num_micro_batches
        largest_part = math.ceil(global_batch_size / world_size)
        self.num_rows = math.ceil(largest_part / num_micro_batches) * num_micro_batches
        self._fill_up = FillUp(num_rows=self.num_rows, context=context)
        sampler = ElasticSampler(
            num_samples=len(train),
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            fingerprint=f"{corpus.fingerprint}-{context}",
            drop_last=False,
        )
        self.loader = ElasticLoader(
            train,
            sampler,
            collate_fn=self._fill_up,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    @property
    def finished_epoch(self) -> int | None:
        """The number of the epoch, from 1, that the last batch has completed; None in the midst of one."""
        sampler = self.loader.sampler
        return sampler.epoch + 1 if sampler.is_epoch_over else None

    def steps_left(self, num_epochs: int) -> int:
        """Steps from where the loader stands to the end of so many epochs, counted from the first."""
        sampler = self.loader.sampler
        left = math.ceil((sampler.num_samples - sampler.samples_consumed) / self._global_batch_size)
        return max((num_epochs - sampler.epoch - 1) * sampler.batches_per_epoch + left, 0)

    def training(self) -> Iterator[Batch]:
        """Batches without end, in shuffled order, from where the loader stands."""
        while True:
            for inputs, targets in self.loader:
                yield self._batch(inputs, targets, self.loader.sampler.last_global_batch)

    def validation(self, num_batches: int) -> Iterator[Batch]:
        """The same first `num_batches` global batches at every call; fewer where the text ends."""
        size = self._global_batch_size
        for start in range(0, len(self._validation), size)[:num_batches]:
            sample_ids = range(start, min(start + size, len(self._validation)))
            own = self._validation.samples(sample_ids[self._rank :: self._world_size])
            yield self._batch(*self._fill_up(own), sample_ids)

    def _batch(self, inputs: torch.Tensor, targets: torch.Tensor, sample_ids: Sequence[int]) -> Batch:
        return Batch(
            inputs=inputs.to(self._device),
            targets=targets.to(self._device),
            sample_ids=sample_ids,
            num_tokens=len(sample_ids) * self._validation.context,
        )
