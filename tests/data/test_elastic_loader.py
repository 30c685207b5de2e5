"""The elastic loader: its position is the training's, its batches and their random numbers repeat."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from dcp_ckpt.data import ElasticLoader, ElasticSampler
from dcp_ckpt.errors import ConfigError, StateMismatch
from tests.data import datasets
from tests.data.datasets import as_list
from tests.eventually import eventually

SIZE, BATCH = 53, 12
WORKERS: list[dict[str, Any]] = [
    {},
    {"num_workers": 2},
    {"num_workers": 2, "prefetch_factor": 5, "persistent_workers": True},
]
with_workers = pytest.mark.parametrize("workers", WORKERS, ids=["none", "two", "persistent"])


def sampler(rank: int = 0, world_size: int = 1, **settings: Any) -> ElasticSampler:
    return ElasticSampler(SIZE, BATCH, rank, world_size, **{"seed": 3, "drop_last": False} | settings)


@contextmanager
def loader(
    dataset: Any = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    collate: Any = as_list,
    order: Any = None,
    **workers: Any,
) -> Iterator[ElasticLoader]:
    dataset = datasets.Numbers() if dataset is None else dataset
    made = ElasticLoader(dataset, sampler(rank, world_size, **order or {}), collate_fn=collate, **workers)
    with made:
        yield made


def expected(num_batches: int, **order: Any) -> list[list[int]]:
    """What the bare sampler gives."""
    return list(islice(sampler(**order), num_batches))


@with_workers
@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_follow_each_other_in_the_order_of_the_sampler(workers, drop_last):
    order = {"drop_last": drop_last}
    with loader(order=order, **workers) as made:
        per_epoch = 4 if drop_last else 5
        assert len(made) == per_epoch
        for epoch in range(2):
            seen = []
            for batch in made:
                seen.append(batch)
                assert made.sampler.last_global_batch == batch
                assert made.epoch == epoch
            assert seen == expected(10, **order)[per_epoch * epoch : per_epoch * (epoch + 1)]
            assert made.state_dict()["epoch"] == epoch + 1


@with_workers
def test_the_state_counts_what_was_handed_out_and_not_what_was_made_ahead(workers):
    with loader(**workers) as made:
        batches = iter(made)
        assert made.state_dict() == sampler().state_dict()
        for number in range(1, 4):
            next(batches)
            assert made.state_dict()["samples_consumed"] == number * BATCH
        state = made.state_dict()
        rest = list(batches)
    with loader(**workers) as resumed:
        resumed.load_state_dict(state)
        assert list(resumed) == rest


@with_workers
def test_a_resume_at_the_end_of_an_epoch_goes_on_as_the_run_would_have(workers):
    """The loop over epochs of a resumed run does the steps that an uninterrupted one has left."""
    with loader(**workers) as made:
        states, whole = [], []
        for epoch in range(2):
            made.set_epoch(epoch)
            for batch in made:
                whole.append(batch)
                states.append(made.state_dict())
    for number in (4, 5, 6):
        with loader(**workers) as made:
            made.load_state_dict(states[number - 1])
            rest = []
            for epoch in range(made.epoch, 2):
                made.set_epoch(epoch)
                rest += list(made)
        assert rest == whole[number:], f"after batch {number}"


@with_workers
def test_an_iteration_that_was_broken_off_is_continued_by_the_next(workers):
    with loader(**workers) as made:
        seen = []
        for batch in made:
            seen.append(batch)
            if len(seen) == 2:
                break
        seen += list(made)
        assert seen == expected(5)


@with_workers
def test_a_loaded_state_and_a_set_epoch_hold_from_the_next_batch_of_a_live_iteration(workers):
    with loader(**workers) as made:
        start = made.state_dict()
        batches = iter(made)
        first = [next(batches) for _ in range(3)]
        made.load_state_dict(start)
        assert [next(batches) for _ in range(3)] == first
        made.set_epoch(7)
        other = sampler()
        other.set_epoch(7)
        assert list(batches) == list(islice(other, 5))
        made.set_epoch(0)
        assert next(iter(made)) == first[0]


def drawn_by_the_trainer() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), torch.rand(()).item()


@with_workers
def test_iterating_draws_nothing_from_the_generators_of_the_trainer(workers):
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    undisturbed = [drawn_by_the_trainer() for _ in range(6)]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    with loader(datasets.Augmented(), collate=datasets.with_noise, **workers) as made:
        drawn = [drawn_by_the_trainer()]
        for _ in made:
            drawn.append(drawn_by_the_trainer())
    assert drawn == undisturbed


def test_the_loader_of_torch_does_draw_from_them():
    """Why that needs care: every iteration takes a seed for its workers."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    iter(DataLoader(datasets.Numbers(), batch_size=4))
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_random_numbers_of_a_sample_depend_on_seed_epoch_and_sample_alone():
    found: dict[int, list[Any]] = {}
    for world_size, workers in ((1, WORKERS[0]), (1, WORKERS[2]), (3, WORKERS[0]), (2, WORKERS[1])):
        numpy.random.seed(world_size)
        samples = []
        for rank in range(world_size):
            with loader(datasets.Augmented(), rank=rank, world_size=world_size, **workers) as made:
                state = {**made.state_dict(), "samples_consumed": BATCH * (world_size - 1)}
                made.load_state_dict(state)
                samples += list(chain(*made))
        for index, *numbers in samples:
            found.setdefault(index, []).append(numbers)
    assert len(found) == SIZE
    for index, alike in found.items():
        assert all(numbers == alike[0] for numbers in alike), f"sample {index}"
    assert len({tuple(alike[0]) for alike in found.values()}) == SIZE, "samples differ"
    with loader(datasets.Augmented()) as made:
        made.set_epoch(1)
        (index, *numbers), *_ = next(iter(made))
    assert numbers != found[index][0], "epochs differ"


def test_random_numbers_of_whole_batches_repeat_whatever_the_workers():
    runs = []
    for workers in WORKERS:
        with loader(datasets.AugmentedTogether(), collate=datasets.with_noise, **workers) as made:
            runs.append(list(made))
        with loader(datasets.AugmentedTogether(), collate=datasets.with_noise, **workers) as made:
            made.load_state_dict({**made.state_dict(), "samples_consumed": 2 * BATCH})
            assert list(made) == runs[0][2:], "after a resume"
    assert runs[0] == runs[1] == runs[2]
    assert len({noise for _, noise in runs[0]}) == 5


@pytest.mark.parametrize("workers", WORKERS[1:], ids=["two", "persistent"])
@pytest.mark.parametrize(
    ("how", "error"), [(datasets.no_such_file, FileNotFoundError), (datasets.out_of_memory, RuntimeError)]
)
def test_a_batch_that_failed_is_not_counted_and_is_tried_again(tmp_path, workers, how, error):
    there = tmp_path / "there"
    there.touch()
    wanted = expected(5)
    seen: list[list[int]] = []
    with loader(datasets.Failing(wanted[2][5], there, how), **workers) as made:
        for _ in range(2):
            with pytest.raises(error):
                seen.extend(made)
        # A process that dies takes down what it had made ahead.
        assert len(seen) == 2 if how is datasets.no_such_file else len(seen) <= 2
        assert made.state_dict()["samples_consumed"] == len(seen) * BATCH
        there.unlink()
        assert [*seen, *made] == wanted


def test_a_dataset_that_stops_is_a_failure_and_not_the_end_of_the_epoch(tmp_path):
    (tmp_path / "there").touch()
    dataset = datasets.Failing(expected(1)[0][0], tmp_path / "there", datasets.stop_iteration)
    for workers in WORKERS[:2]:
        with loader(dataset, **workers) as made, pytest.raises(RuntimeError, match="raised StopIteration"):
            list(made)


def test_closing_ends_the_workers_and_iterating_starts_new_ones():
    with loader(datasets.WhoAmI(), **WORKERS[2]) as made:
        first = set(chain(*islice(made, 2)))
        assert os.getpid() not in first
        made.close()
        made.close()
        assert eventually(lambda: not any(map(is_running, first)), timeout_seconds=10)
        second = set(chain(*made))
        assert len(second) == 2
        assert not first & second
    assert eventually(lambda: not any(map(is_running, second)), timeout_seconds=10)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_rank_without_samples_needs_a_collate_function_that_takes_none():
    with pytest.raises(ConfigError, match="some rank has no samples"):
        ElasticLoader(datasets.Numbers(), sampler(5, 6))
    ElasticLoader(datasets.Numbers(), sampler(5, 6, drop_last=True))
    parts = []
    for rank in range(6):
        with loader(rank=rank, world_size=6) as made:
            parts.append(list(made)[-1])
    assert [len(part) for part in parts] == [0, 1, 1, 1, 1, 1]
    made = ElasticLoader(datasets.Numbers(48), ElasticSampler(48, 12, 0, 5, 3, drop_last=False))
    for consumed, is_refused in ((12, False), (19, False), (20, True)):  # the last batch has 12, 5, 4
        state = {**made.state_dict(), "samples_consumed": consumed}
        assert (made.state_problem(state) is not None) == is_refused
    with pytest.raises(StateMismatch, match="some rank has no samples"):
        made.load_state_dict({**made.state_dict(), "samples_consumed": 20})
    assert made.sampler.samples_consumed == 0


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


@pytest.mark.parametrize(
    "dataset", [Endless(), datasets.Numbers(7), iter([1])], ids=["iterable", "size", "iter"]
)
def test_a_dataset_that_does_not_fit_is_refused(dataset):
    with pytest.raises(ConfigError):
        ElasticLoader(dataset, sampler())


def test_another_dataset_is_refused_or_begins_the_epoch_anew():
    state = {**sampler(fingerprint="a").state_dict(), "epoch": 2, "samples_consumed": 24}
    with loader(order={"fingerprint": "b"}) as made:
        with pytest.raises(StateMismatch, match="use the same data"):
            made.load_state_dict(state)
        assert made.state_problem(state) is not None
        assert made.epoch == 0
    with loader(order={"fingerprint": "b", "allow_other_dataset": True}) as made:
        made.load_state_dict(state)
        assert (made.epoch, len(list(made))) == (2, 5)


def test_an_epoch_that_begins_anew_in_another_dataset_is_judged_from_its_start():
    """From position 14, the last of its batches would leave ranks without samples."""
    state = ElasticSampler(30, 7, 0, 1, seed=1).state_dict() | {"samples_consumed": 14}
    order = ElasticSampler(16, 8, 0, 4, seed=1, drop_last=False, allow_other_dataset=True)
    with ElasticLoader(datasets.Numbers(16), order) as made:
        assert made.state_problem(state) is None
        made.load_state_dict(state)
        assert len(list(made)) == 2


@pytest.mark.parametrize("seed", [2**128 + 1, -1])
def test_any_whole_number_is_a_seed(seed):
    order = ElasticSampler(8, 4, 0, 1, seed=seed)
    with ElasticLoader(datasets.Numbers(8), order) as made:
        assert len(list(made)) == 2
