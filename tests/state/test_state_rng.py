from __future__ import annotations

import random

import numpy
import pytest
import torch

from dcp_ckpt.state import RngComponent
from tests.state import in_memory


@pytest.fixture(autouse=True)
def keep_generators():
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])


def seed(value: int) -> None:
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


def draw() -> tuple[object, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    )


def test_the_same_world_continues_every_stream():
    seed(1)
    draw()  # leaves half a pair of gaussians behind in every generator
    saved = in_memory.save([RngComponent()])
    expected = draw(), draw()
    seed(2)
    assert in_memory.load(saved, [RngComponent()]) == []
    assert (draw(), draw()) == expected


def test_capture_draws_nothing():
    seed(1)
    expected = draw()
    seed(1)
    RngComponent().capture()
    assert draw() == expected


def test_another_world_derives_distinct_repeatable_streams_with_a_note():
    saved = in_memory.save([RngComponent()], world_size=4)
    drawn: list[tuple[object, ...]] = []
    for rank in (0, 1, 0):
        seed(rank + 10 * len(drawn))  # what was there before does not matter
        (note,) = in_memory.load(saved, [RngComponent()], rank=rank, world_size=2)
        assert "saved on 4 ranks, loaded on 2" in note
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))


def test_a_checkpoint_without_streams_derives_them_with_a_note():
    (note,) = in_memory.load(in_memory.InMemory(), [RngComponent()])
    assert "holds no streams" in note
