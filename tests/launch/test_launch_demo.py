"""How the demo judges: what it takes for a save in flight, and when it fails."""

from __future__ import annotations

import math

import pytest

from launch.demo import chain_problem, largest_difference, read_events, save_in_flight


def step(number, loss=1.0, samples="a"):
    return {"event": "step", "step": number, "loss": loss, "lr": 0.1, "samples": samples}


REFERENCE = [step(1), step(2), step(3)]


def problem(chain, reference=REFERENCE):
    return chain_problem(reference, chain, last_step=3, band=0.01)


def test_chain_within_the_band_passes_also_with_steps_done_twice():
    chain = [step(1), step(2), {"event": "resume", "step": 1}, step(2, 1.005), step(3)]
    assert problem(chain) is None
    difference, number = largest_difference(REFERENCE, chain)
    assert difference == pytest.approx(0.005)
    assert number == 2


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ([step(1), step(3)], r"lacks steps \[2\]"),
        ([step(1), step(2), step(3), step(4)], r"has \[4\] too many"),
        ([step(1), step(2), step(3, samples="b")], "step 3 used other samples"),
        ([step(1), step(2, 1.02), step(3)], "loss of step 2 differs by 2.00e-02"),
        ([step(1), step(2, math.nan), step(3)], "loss of step 2 differs by inf"),
        ([step(1), step(2, 2.0), step(2), step(3)], "loss of step 2 differs"),
    ],
)
def test_chain_that_differs_fails_with_the_reason(chain, said):
    with pytest.raises(AssertionError, match=said):
        assert problem(chain) is None, problem(chain)


def test_short_reference_is_no_reference():
    assert problem(REFERENCE, REFERENCE[:2]) is not None


def test_only_the_newest_step_can_be_a_save_in_flight(tmp_path):
    assert save_in_flight(tmp_path) is None
    old, new = tmp_path / "step-00000002", tmp_path / "step-00000004"
    old.mkdir()
    (old / "__0_0.e0001-s000001.distcp").touch()
    assert save_in_flight(tmp_path) == old
    new.mkdir()
    assert save_in_flight(tmp_path) is None
    (new / "__0_0.e0001-s000002.distcp").touch()
    assert save_in_flight(tmp_path) == new
    (new / "manifest.json").touch()
    assert save_in_flight(tmp_path) is None


def test_line_cut_off_by_a_kill_is_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    assert read_events(log) == []
    log.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert read_events(log) == [{"event": "step", "step": 1}]
