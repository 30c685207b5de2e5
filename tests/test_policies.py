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
    AtSteps,
    BestN,
    EveryNSeconds,
    EveryNSteps,
    EverySeconds,
    EverySteps,
    LatestN,
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


def with_losses(*losses: Any) -> list[Point]:
    return [Point(step, metrics={"loss": loss}) for step, loss in enumerate(losses)]


def at_seconds(*seconds: float) -> list[Point]:
    return [Point(i, created_at=START + timedelta(seconds=s)) for i, s in enumerate(seconds)]


def test_save_policies() -> None:
    assert [s for s in range(1, 9) if EverySteps(3).is_due(step=s, seconds_since_save=0)] == [3, 6]
    assert [s for s in range(1, 9) if AtSteps(2, 5).is_due(step=s, seconds_since_save=0)] == [2, 5]
    assert not EverySeconds(60).is_due(step=1, seconds_since_save=59.9)
    assert EverySeconds(60).is_due(step=1, seconds_since_save=60)
    both = AnyOf(EverySteps(3), EverySeconds(60))
    assert both.is_due(step=3, seconds_since_save=0)
    assert both.is_due(step=4, seconds_since_save=61)
    assert not both.is_due(step=4, seconds_since_save=1)


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
