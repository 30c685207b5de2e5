"""The states of the benchmark: wrong bytes are found, and an update can be taken back."""

from __future__ import annotations

import pytest

from benchmarks.measure import WrongBytes
from benchmarks.workload import COLUMNS, NUM_TENSORS, TrainingStep, replicated_state

SMALL = NUM_TENSORS * COLUMNS * 4 * 2


def test_contents_follow_from_the_name_and_an_update_is_undone_by_another():
    state, other = replicated_state(SMALL), replicated_state(SMALL)
    state.fill()
    other.fill()
    expected = state.digests()
    assert state.local_bytes == SMALL
    other.check(expected, "other")
    state.update()
    assert not set(state.digests().items()) & set(expected.items())
    state.update()
    state.check(expected, "state")


def test_one_wrong_bit_is_found():
    state = replicated_state(SMALL)
    state.fill()
    expected = state.digests()
    state.locals[7].view(-1)[-1].neg_()
    with pytest.raises(WrongBytes, match=r"peer .* tensor 7, block 0"):
        state.check(expected, "peer")
    state.scramble()
    with pytest.raises(WrongBytes):
        state.check(expected, "peer")


def test_a_training_step_only_reads_and_lasts_as_long_as_asked():
    state = replicated_state(SMALL)
    state.fill()
    expected = state.digests()
    step = TrainingStep(state)
    seconds = iter((0.3, 0.2, 0.4))
    step.last_at_least(0.5, lambda run: next(seconds))
    assert step.num_passes == 3
    step.run()
    state.check(expected, "state")
    assert all(parameter.grad is None for parameter in state.model.parameters())
