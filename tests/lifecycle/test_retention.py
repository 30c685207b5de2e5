"""Retention: every checkpoint gets a decision and a reason; what is protected is never removed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.retention import Candidate, plan_retention
from dcp_ckpt.policies import AnyOf, BestN, EveryNSteps, KeepPolicy, LatestN

START = datetime(2026, 1, 1, tzinfo=UTC)


def candidate(step: int, *, epoch: int = 1, **fields: Any) -> Candidate:
    return Candidate(
        directory=StepDir(step),
        epoch=epoch,
        step=step,
        created_at=START + timedelta(seconds=step),
        **fields,
    )


def steps(decisions: Any) -> list[int]:
    return [decision.directory.step for decision in decisions]


def test_golden_plan() -> None:
    plan = plan_retention(
        [
            candidate(50, is_bad=True),
            candidate(10, metrics={"loss": 0.1}),
            candidate(20, is_pinned=True),
            candidate(30, metrics={"loss": 0.5}),
            candidate(40, metrics={"loss": 0.4}),
            candidate(35),
        ],
        AnyOf(LatestN(1), BestN(1, "loss")),
        protected={StepDir(30): "resumed from"},
    )
    assert [(d.directory.step, d.reason) for d in plan.kept] == [
        (10, "among the best 1 by min loss"),
        (20, "pinned"),
        (30, "resumed from"),
        (40, "newest valid, among the latest 1"),
        (50, "marked bad, kept for inspection"),
    ]
    assert steps(plan.removed) == [35]
    assert "LatestN" in plan.removed[0].reason


def test_order_is_epoch_then_step() -> None:
    plan = plan_retention([candidate(100, epoch=1), candidate(50, epoch=2)], LatestN(1))
    assert steps(plan.kept) == [50]
    assert steps(plan.removed) == [100]


def test_bad_ones_do_not_count() -> None:
    plan = plan_retention([candidate(10), candidate(20), candidate(30, is_bad=True)], LatestN(2))
    assert steps(plan.kept) == [10, 20, 30]
    assert plan.removed == ()


def test_no_policy_keeps_everything() -> None:
    plan = plan_retention([candidate(10), candidate(20)], None)
    assert steps(plan.kept) == [10, 20]


def test_nothing_to_decide() -> None:
    plan = plan_retention([], LatestN(2))
    assert (plan.kept, plan.removed) == ((), ())


@pytest.mark.parametrize("keep", [LatestN(1), EveryNSteps(1000), BestN(1, "none")], ids=str)
@given(
    flags=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=8),
    epochs=st.lists(st.integers(1, 3), min_size=8, max_size=8),
)
def test_protection_holds_for_any_policy(
    keep: KeepPolicy, flags: list[tuple[bool, bool, bool]], epochs: list[int]
) -> None:
    candidates = [
        candidate(i + 1, epoch=epochs[i], is_bad=bad, is_pinned=pinned)
        for i, (bad, pinned, _) in enumerate(flags)
    ]
    protected = {StepDir(i + 1): "in flight" for i, (_, _, flying) in enumerate(flags) if flying}
    plan = plan_retention(candidates, keep, protected=protected)
    removed = set(steps(plan.removed))
    assert sorted([*steps(plan.kept), *removed]) == [c.step for c in candidates]
    valid = [c for c in candidates if not c.is_bad]
    if valid:
        newest = max(valid, key=lambda c: (c.epoch, c.step))
        assert newest.step not in removed
    assert not removed & {c.step for c in candidates if c.is_bad or c.is_pinned}
    assert not removed & {directory.step for directory in protected}


def test_suspect_ones_take_nobodys_place() -> None:
    plan = plan_retention(
        [
            candidate(10, metrics={"loss": 0.5}),
            candidate(20, metrics={"loss": 0.9}),
            candidate(30, metrics={"loss": 0.1}, is_suspect=True),
            candidate(40, is_suspect=True),
            candidate(50, is_suspect=True),
        ],
        AnyOf(LatestN(1), BestN(1, "loss")),
    )
    assert [(d.directory.step, d.reason) for d in plan.kept] == [
        (10, "among the best 1 by min loss"),
        (20, "newest that is not suspect, among the latest 1"),
        (50, "newest valid, among the latest 1 of the suspect ones"),
    ]


def test_the_newest_good_one_stays_whatever_the_policy_says() -> None:
    plan = plan_retention([candidate(10), candidate(20), candidate(30, is_suspect=True)], EveryNSteps(100))
    assert steps(plan.kept) == [20, 30]
