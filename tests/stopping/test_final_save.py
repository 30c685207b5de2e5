"""The last save before the end: finish the one in flight, else save, else keep what there is."""

from __future__ import annotations

import pytest

from dcp_ckpt.save.final_save import plan_final_save


def plan(**given: object) -> tuple[bool, str]:
    defaults: dict[str, object] = {
        "step": 10,
        "in_flight": None,
        "committed": None,
        "is_fenced": False,
        "seconds_left": 20.0,
        "save_seconds": 5.0,
    }
    found = plan_final_save(**{**defaults, **given})  # type: ignore[arg-type]
    return found.saves, found.reason


@pytest.mark.parametrize(
    ("given", "saves", "why"),
    [
        ({}, True, "20.0 s are left"),
        ({"committed": 8}, True, "20.0 s are left"),
        ({"save_seconds": None, "seconds_left": 0.5}, True, "0.5 s are left"),
        ({"seconds_left": 5.0}, True, "5.0 s are left"),
        ({"seconds_left": 4.9, "committed": 8}, False, "step 8 is the newest"),
        ({"seconds_left": -3.0}, False, "0.0 s are left; nothing new was saved"),
        ({"in_flight": 8}, False, "step 8 is still being saved"),
        ({"in_flight": 10}, False, "being saved already"),
        ({"committed": 10}, False, "saved already"),
        ({"is_fenced": True}, False, "a newer start owns the run"),
    ],
)
def test_a_save_is_begun_only_when_it_can_end(given: dict[str, object], saves: bool, why: str) -> None:
    decided, reason = plan(**given)
    assert decided is saves
    assert why in reason
