"""A model of a run begins anew in each history: time, chance and the ledger with it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tests.model.stepping import make_time_and_chance_repeat
from tests.model.world import World, follow_removals


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[World], World]:
    """Makes a world the current one, with time and chance at their beginning."""
    again = make_time_and_chance_repeat(monkeypatch)
    worlds: list[World] = []
    follow_removals(monkeypatch, lambda: worlds[-1])
    # What the product has to say in so many histories costs more than the histories.
    caplog.set_level(logging.CRITICAL + 1, logger="dcp_ckpt")

    def begin(world: World) -> World:
        again()
        worlds[:] = [world]
        return world

    return begin
