"""Owners of one run at once, in every order of their operations, and a crash of all at every moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model.explorer import Scene, explore
from tests.model.places import FilePlace, ObjectPlace, Place
from tests.model.scenes import LONG, QUICK
from tests.model.world import World

BOTH = pytest.mark.parametrize("kind", [FilePlace, ObjectPlace])


@BOTH
@pytest.mark.parametrize("scene", QUICK, ids=lambda scene: scene.__name__)
def test_every_order_keeps_the_promises(
    repeatable: Callable[[World], World], kind: type[Place], scene: Callable[[World], Scene]
) -> None:
    explored = explore(lambda: scene(repeatable(World(kind()))), most_states=10_000)
    assert explored.is_complete
    assert explored.num_states > 50


@pytest.mark.crash
@pytest.mark.timeout(900)
@BOTH
@pytest.mark.parametrize("scene", LONG, ids=lambda scene: scene.__name__)
def test_more_orders_keep_the_promises(
    repeatable: Callable[[World], World], kind: type[Place], scene: Callable[[World], Scene]
) -> None:
    explored = explore(lambda: scene(repeatable(World(kind()))), most_states=25_000)
    assert explored.num_states > 100
