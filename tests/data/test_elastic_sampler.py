from __future__ import annotations

from itertools import chain, islice

import pytest
import torch

from dcp_ckpt.data import ElasticSampler
from dcp_ckpt.errors import ConfigError, StateMismatch

NUM_SAMPLES, BATCH = 53, 12


def world(size: int, **kwargs) -> list[ElasticSampler]:
    return [ElasticSampler(NUM_SAMPLES, BATCH, rank, size, seed=3, **kwargs) for rank in range(size)]


def draw(samplers: list[ElasticSampler], num_batches: int) -> list[list[int]]:
    """Global batches, put together from what each rank yields."""
    per_rank = [list(islice(sampler, num_batches)) for sampler in samplers]
    batches: list[list[int]] = [list(chain(*parts)) for parts in zip(*per_rank, strict=True)]
    if batches:
        assert all(sampler.last_global_batch == batches[-1] for sampler in samplers)
    return batches


def moved(samplers: list[ElasticSampler], size: int, **kwargs) -> list[ElasticSampler]:
    states = [sampler.state_dict() for sampler in samplers]
    assert all(state == states[0] for state in states)  # replicated: equal on all ranks
    new = world(size, **kwargs)
    for sampler in new:
        sampler.load_state_dict(states[0])
    return new


def test_every_sample_comes_exactly_once_across_worlds_of_4_2_and_3():
    whole = draw(world(1, drop_last=False), 10)
    four = world(4, drop_last=False)
    batches = draw(four, 2)
    two = moved(four, 2, drop_last=False)
    batches += draw(two, 1)
    three = moved(two, 3, drop_last=False)
    batches += draw(three, 7)
    assert batches == whole
    assert sorted(chain(*batches[:5])) == list(range(NUM_SAMPLES))
    assert sorted(chain(*batches[5:])) == list(range(NUM_SAMPLES))


def test_parts_are_contiguous_and_even():
    samplers = [ElasticSampler(100, 10, rank, 4, seed=0) for rank in range(4)]
    parts = [next(iter(sampler)) for sampler in samplers]
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    assert [*chain(*parts)] == samplers[0].last_global_batch


def test_drop_last_leaves_out_the_remainder_of_each_epoch():
    (sampler,) = world(1)
    assert sampler.batches_per_epoch == 4
    first = draw([sampler], 4)
    assert (sampler.epoch, sampler.samples_consumed) == (0, 48)
    second = draw([sampler], 4)
    assert (sampler.epoch, sampler.samples_consumed) == (1, 48)
    assert len(set(chain(*first))) == len(set(chain(*second))) == 48
    assert first != second


def test_without_drop_last_the_last_batch_is_smaller():
    samplers = world(1, drop_last=False)
    assert samplers[0].batches_per_epoch == 5
    assert [len(batch) for batch in draw(samplers, 5)] == [12, 12, 12, 12, 5]


def test_another_global_batch_size_continues_at_the_same_sample():
    (sampler,) = world(1, drop_last=False)
    seen = [*chain(*draw([sampler], 2))]
    other = ElasticSampler(NUM_SAMPLES, 7, 0, 1, seed=9, drop_last=False)
    other.load_state_dict(sampler.state_dict())
    seen += chain(*draw([other], 5))
    assert sorted(seen) == list(range(NUM_SAMPLES))


def test_a_loaded_seed_replaces_that_of_the_call():
    (sampler,) = world(1)
    other = ElasticSampler(NUM_SAMPLES, BATCH, 0, 1, seed=99)
    other.load_state_dict(sampler.state_dict())
    assert draw([other], 3) == draw([sampler], 3)


def test_state_is_that_of_yielded_batches():
    (sampler,) = world(1)
    batches = iter(sampler)
    assert sampler.state_dict()["samples_consumed"] == 0
    next(batches)
    assert sampler.state_dict()["samples_consumed"] == BATCH


def test_set_epoch_starts_another_epoch_and_keeps_a_resumed_one():
    (sampler,) = world(1)
    first = draw([sampler], 2)
    sampler.set_epoch(0)
    assert sampler.samples_consumed == 2 * BATCH
    sampler.set_epoch(1)
    sampler.set_epoch(0)
    assert draw([sampler], 2) == first


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(world(1), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draw(world(1), 3) == first


def test_the_order_is_pinned():
    """A change of the order would silently repeat and skip samples in every run that is resumed."""
    assert next(iter(ElasticSampler(20, 8, 0, 1, seed=0))) == [1, 12, 19, 10, 5, 17, 13, 6]


@pytest.mark.parametrize("change", [{"num_samples": 54}, {"fingerprint": "other"}])
def test_another_dataset_is_refused_and_nothing_changes(change):
    sampler = ElasticSampler(NUM_SAMPLES, BATCH, 0, 1, seed=3, fingerprint="data")
    state = {**sampler.state_dict(), "samples_consumed": 12, **change}
    with pytest.raises(StateMismatch, match="use the same data"):
        sampler.load_state_dict(state)
    assert sampler.samples_consumed == 0


def test_another_dataset_begins_the_epoch_anew_when_told_to(caplog):
    (sampler,) = world(1, drop_last=False)
    draw([sampler], 7)
    assert (sampler.epoch, sampler.samples_consumed) == (1, 24)
    other = ElasticSampler(60, BATCH, 0, 1, seed=9, allow_other_dataset=True)
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, other.samples_consumed) == (1, 0)
    assert "epoch 1 begins anew" in caplog.text
    anew = ElasticSampler(60, BATCH, 0, 1, seed=3)
    anew.set_epoch(1)
    assert draw([other], 5) == draw([anew], 5)
    other.load_state_dict(other.state_dict())
    assert other.samples_consumed == 60, "its own state keeps its position"


def test_a_state_of_something_else_is_refused():
    (sampler,) = world(1)
    for state in ({}, {"position": 3}, [1]):
        with pytest.raises(StateMismatch, match="not the state of an ElasticSampler"):
            sampler.load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "smallest"),
    [
        ({"num_samples": 53, "global_batch_size": 12, "world_size": 4}, 3),
        ({"num_samples": 53, "global_batch_size": 12, "world_size": 4, "drop_last": False}, 1),
        ({"num_samples": 53, "global_batch_size": 12, "world_size": 6, "drop_last": False}, 0),
        ({"num_samples": 48, "global_batch_size": 12, "world_size": 12, "drop_last": False}, 1),
    ],
)
def test_the_smallest_part_is_that_of_the_last_batch(arguments, smallest):
    sampler = ElasticSampler(rank=0, seed=0, **arguments)
    assert sampler.smallest_part() == smallest
    parts = [
        len(part.indices)
        for rank in range(arguments["world_size"])
        for part in ElasticSampler(rank=rank, seed=0, **arguments).rest_of_epoch()
    ]
    assert min(parts) == smallest


def test_looking_ahead_consumes_nothing_and_sees_what_comes():
    samplers = world(3, drop_last=False)
    draw(samplers, 2)
    ahead = [list(sampler.rest_of_epoch()) for sampler in samplers]
    assert all(sampler.samples_consumed == 2 * BATCH for sampler in samplers)
    assert [part.start for part in ahead[1]] == [28, 40, 49]
    coming = draw(samplers, 3)
    assert [[*chain(*(part.indices for part in parts))] for parts in zip(*ahead, strict=True)] == coming
    assert all(sampler.is_epoch_over for sampler in samplers)
    assert list(samplers[0].rest_of_epoch()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 2, "world_size": 2},
        {"global_batch_size": 3, "world_size": 4},
        {"num_samples": 10},
        {"num_samples": 0, "drop_last": False},
    ],
    ids=["rank", "batch", "samples", "empty"],
)
def test_sizes_that_cannot_work_are_refused(arguments):
    with pytest.raises(ConfigError):
        ElasticSampler(
            **{"num_samples": 53, "global_batch_size": 12, "rank": 0, "world_size": 1, "seed": 0, **arguments}
        )
