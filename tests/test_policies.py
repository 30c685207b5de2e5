"""Policies: what is due and what is kept, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.policies import (
    AnyOf,
    AtFirstStep,
    AtLastStep,
    AtSteps,
    BestN,
    EveryEpochs,
    EveryNSeconds,
    EveryNSteps,
    EverySeconds,
    EverySteps,
    LatestN,
    LossSpike,
    Moment,
    NotFinite,
    SaveCosts,
    Young,
    is_keep_policy,
    is_save_policy,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Point:
    step: int
    epoch: int = 1
    created_at: datetime = START
    metrics: Mapping[str, Any] = field(default_factory=dict)
    is_suspect: bool = False


def with_losses(*losses: Any) -> list[Point]:
    return [Point(step, metrics={"loss": loss}) for step, loss in enumerate(losses)]


def at_seconds(*seconds: float) -> list[Point]:
    return [Point(i, created_at=START + timedelta(seconds=s)) for i, s in enumerate(seconds)]


def test_save_policies() -> None:
    assert [s for s in range(1, 9) if EverySteps(3).is_due(Moment(step=s, seconds_since_save=0))] == [3, 6]
    assert [s for s in range(1, 9) if AtSteps(2, 5).is_due(Moment(step=s, seconds_since_save=0))] == [2, 5]
    assert not EverySeconds(60).is_due(Moment(step=1, seconds_since_save=59.9))
    assert EverySeconds(60).is_due(Moment(step=1, seconds_since_save=60))
    both = AnyOf(EverySteps(3), EverySeconds(60))
    assert both.is_due(Moment(step=3, seconds_since_save=0))
    assert both.is_due(Moment(step=4, seconds_since_save=61))
    assert not both.is_due(Moment(step=4, seconds_since_save=1))


def test_keep_latest_and_every() -> None:
    points = [Point(step) for step in (10, 20, 30, 40)]
    assert sorted(LatestN(2).keeps(points)) == [2, 3]
    assert sorted(LatestN(9).keeps(points)) == [0, 1, 2, 3]
    assert sorted(EveryNSteps(20).keeps(points)) == [1, 3]
    assert LatestN(1).keeps([]) == {}


def test_keep_every_seconds_is_stable_when_the_rest_is_removed() -> None:
    points = at_seconds(0, 5, 10, 14, 21, 30)
    kept = EveryNSeconds(10).keeps(points)
    assert sorted(kept) == [0, 2, 4]
    survivors = [points[i] for i in sorted(kept)]
    assert sorted(EveryNSeconds(10).keeps(survivors)) == [0, 1, 2]


def test_keep_every_seconds_with_a_clock_that_went_back() -> None:
    assert sorted(EveryNSeconds(10).keeps(at_seconds(100, 0, 10))) == [0, 1, 2]


def test_best_ranks_finite_numbers_only_and_prefers_the_newer() -> None:
    points = with_losses(3.0, 1, math.nan, math.inf, True, "low", 1.0, None)
    assert BestN(3, "loss").ranked(points) == [6, 1, 0]
    assert sorted(BestN(1, "loss", "max").keeps(points)) == [0]
    assert BestN(1, "accuracy").keeps(points) == {}


def test_any_of_joins_reasons() -> None:
    kept = AnyOf(LatestN(1), EveryNSteps(10)).keeps([Point(10), Point(15), Point(20)])
    assert kept == {2: "among the latest 1, every 10 steps", 0: "every 10 steps"}


def test_any_of_is_of_one_kind() -> None:
    assert is_keep_policy(AnyOf(AnyOf(LatestN(1))))
    assert not is_save_policy(AnyOf(LatestN(1)))
    assert is_save_policy(AnyOf(EverySteps(1)))
    with pytest.raises(ConfigError, match="either save policies or keep policies"):
        AnyOf(LatestN(1), EverySteps(1))
    with pytest.raises(ConfigError, match="at least one"):
        AnyOf()


@pytest.mark.parametrize(
    "make",
    [
        lambda: LatestN(0),
        lambda: EveryNSteps(-1),
        lambda: EverySteps(True),
        lambda: EverySteps(1.5),  # type: ignore[arg-type]
        lambda: AtSteps(),
        lambda: AtSteps(0),
        lambda: EverySeconds(0),
        lambda: EveryNSeconds(math.nan),
        lambda: EverySeconds(math.inf),
        lambda: BestN(1, ""),
        lambda: BestN(1, "loss", "least"),  # type: ignore[arg-type]
    ],
    ids=range(11),
)
def test_wrong_arguments_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_policies_are_values() -> None:
    assert AnyOf(LatestN(2), BestN(1, "loss")) == AnyOf(LatestN(2), BestN(1, "loss"))
    assert hash(AtSteps(1, 2)) == hash(AtSteps(1, 2))
    assert repr(AnyOf(LatestN(2))) == "AnyOf(LatestN(n=2))"


def test_epochs_first_and_last_step() -> None:
    assert EveryEpochs(2).is_due(Moment(step=9, finished_epoch=4))
    assert not EveryEpochs(2).is_due(Moment(step=9, finished_epoch=3))
    assert not EveryEpochs().is_due(Moment(step=9))
    assert AtFirstStep().is_due(Moment(step=501, is_first=True))
    assert not AtFirstStep().is_due(Moment(step=1))
    assert AtLastStep().is_due(Moment(step=77, is_last=True))
    assert not AtLastStep().is_due(Moment(step=77))


def test_young_finds_the_interval_that_costs_least() -> None:
    policy = Young(4 * 3600.0)
    costs = SaveCosts(stall_seconds=2.0, durable_seconds=30.0, load_seconds=60.0)
    interval = policy.interval_seconds(costs)
    assert interval == pytest.approx(math.sqrt(2 * 2.0 * (4 * 3600 + 90)))

    def share_lost(seconds: float) -> float:
        """Stalls, and what a failure half-way takes away, as a share of the time."""
        return costs.stall_seconds / seconds + seconds / 2 / (policy.mtbf_seconds + 90)

    assert all(share_lost(interval) < share_lost(interval * factor) for factor in (0.8, 0.9, 1.1, 1.25))
    assert not policy.is_due(Moment(step=1, seconds_since_save=interval - 1, costs=costs))
    assert policy.is_due(Moment(step=1, seconds_since_save=interval, costs=costs))


def test_young_is_bounded_and_works_before_anything_was_measured() -> None:
    assert Young(60.0).interval_seconds(SaveCosts(stall_seconds=10.0, durable_seconds=1.0)) == 200.0
    assert Young(60.0).interval_seconds(SaveCosts(stall_seconds=0.001, durable_seconds=99.0)) == 99.0
    assert Young(3600.0, first_seconds=45.0).interval_seconds(None) == 45.0
    # What ranks rely on, whatever each of them has measured.
    free = SaveCosts(stall_seconds=0.0, durable_seconds=0.0)
    for costs in (None, free):
        assert not Young(60.0).is_due(Moment(step=1, costs=costs))
        assert Young(60.0).is_due(Moment(step=1, seconds_since_save=math.inf, costs=costs))


def test_suspects() -> None:
    before = [{"loss": loss} for loss in (9.0, 2.0, 2.2, math.nan, 2.1, 1.9, 2.0)]
    rule = LossSpike("loss", factor=2.0, window=5)
    assert rule.reason({"loss": 3.9}, before) is None
    assert rule.reason({"loss": 4.1}, before) == "loss jumped to 4.1, from a median of 2"
    assert rule.reason({"loss": 100.0}, before[:2]) is None, "of two, none is usual"
    assert rule.reason({}, before) is None
    assert rule.reason({"loss": 2.0, "norm": math.inf}, before) == "norm is inf"
    assert (
        NotFinite().reason({"a": math.nan, "b": 1, "c": "nan", "d": -math.inf}, []) == "a is nan, d is -inf"
    )


def test_a_suspect_is_never_the_best() -> None:
    points = [Point(1, metrics={"loss": 2.0}), Point(2, metrics={"loss": 1.0}, is_suspect=True)]
    assert BestN(2, "loss").ranked(points) == [0]


def test_new_policies_refuse_what_makes_no_sense() -> None:
    for make in (
        lambda: Young(0.0),
        lambda: Young(60.0, max_overhead=0.0),
        lambda: EveryEpochs(0),
        lambda: LossSpike("loss", factor=1.0),
        lambda: LossSpike(""),
    ):
        with pytest.raises(ConfigError):
            make()
