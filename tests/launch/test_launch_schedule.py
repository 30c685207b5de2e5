"""The learning rate: its shape, and what of it is kept."""

from __future__ import annotations

import pytest
import torch

from launch.schedule import FINAL_LR_FRACTION, WARM_UP_STEPS, WarmUpCosine, lr_factor


def scheduler(lr: float, lr_steps: int) -> WarmUpCosine:
    return WarmUpCosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr), lr_steps)


def rates(schedule: WarmUpCosine, num_steps: int) -> list[float]:
    """The learning rates of the next steps."""
    found = []
    for _ in range(num_steps):
        found.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return found


def test_schedule_warms_up_decays_and_stays():
    factors = [lr_factor(step, 100) for step in range(150)]
    assert 0 < factors[0] < factors[WARM_UP_STEPS - 1] == 1.0
    assert factors[WARM_UP_STEPS:] == sorted(factors[WARM_UP_STEPS:], reverse=True)
    assert factors[100:] == pytest.approx([FINAL_LR_FRACTION] * 50)


def test_a_resumed_schedule_goes_on_bit_for_bit():
    whole = scheduler(1e-3, 50)
    expected = rates(whole, 60)
    first, second = scheduler(1e-3, 50), scheduler(1e-3, 50)
    before = rates(first, 23)
    second.load_state_dict(first.state_dict())
    assert [rate.hex() for rate in before + rates(second, 37)] == [rate.hex() for rate in expected]


def test_another_peak_and_length_count_from_the_next_step_on():
    first, changed = scheduler(1e-3, 50), scheduler(5e-4, 200)
    rates(first, 30)
    changed.load_state_dict(first.state_dict())
    assert rates(changed, 5) == [5e-4 * lr_factor(step, 200) for step in range(30, 35)]
