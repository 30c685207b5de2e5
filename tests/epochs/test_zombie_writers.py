"""A writer that outlives its trainer and goes on late: before, during and after the next start."""

from __future__ import annotations

import pytest

from tests.crash.starts import wait_until
from tests.epochs.endings import SALTED, require_one_lineage, require_resumed
from tests.epochs.moments import (
    AFTER_CLAIM,
    AFTER_FRAGMENT,
    AFTER_SEAL,
    BEFORE_DATA,
    BEFORE_FRAGMENT,
    BEFORE_MANIFEST,
    BEFORE_NEXT_DATA,
    BEFORE_SEAL,
)
from tests.epochs.places import HELD_SECONDS, Held, Moment, Place

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

PHASES = {
    "before its data": BEFORE_DATA,
    "before its fragment": BEFORE_FRAGMENT,
    "after its fragment": AFTER_FRAGMENT,
}
IN_TIME = [
    # Claimed, and nothing is listed yet: whatever the writer finishes is seen.
    pytest.param(phase, AFTER_CLAIM, 3, id=f"{name}, during the claim")
    for name, phase in PHASES.items()
]
TOO_LATE = [
    pytest.param(PHASES[name], moment, 2, id=f"{name}, {when}")
    for name in ("before its data", "before its fragment")
    for when, moment in (
        ("before its directory is sealed", BEFORE_SEAL),
        ("after its directory is sealed", AFTER_SEAL),
        ("when the step was saved anew", BEFORE_NEXT_DATA),
    )
]
COMPLETE = [
    # Its part was there before the next start looked: that one commits it.
    pytest.param(AFTER_FRAGMENT, BEFORE_MANIFEST, 3, id="after its fragment, before it is committed"),
    pytest.param(AFTER_FRAGMENT, BEFORE_NEXT_DATA, 3, id="after its fragment, during training"),
]


def leave_zombie(old: Held) -> None:
    """Its writer is held, its trainer dead."""
    old.wait_held()
    old.start.trainer().kill()
    assert old.start.wait() == [-9]
    assert len(old.start.book.alive("writer")) == 1


def wake(old: Held) -> None:
    old.release()
    old.start.require_gone()


def wake_during(place: Place, phase: Moment, moment: Moment, resumed: int) -> None:
    with place.start("old", hold=phase) as old:
        leave_zombie(old)
        with place.start("new", "--wait", "0", *SALTED, hold=moment) as new:
            new.wait_held()
            wake(old)
            new.release()
            new.start.succeed()
            require_resumed(new.start, resumed)
            require_one_lineage(place, new.start, kept=(resumed,))


@pytest.mark.crash
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_writer_that_goes_on_before_the_next_start_has_its_save_committed(
    place: Place, phase: Moment
) -> None:
    with place.start("old", hold=phase) as old:
        leave_zombie(old)
        with place.start("new", *SALTED) as new:
            wait_until(lambda: "still live; waiting" in new.start.output(), HELD_SECONDS, new.start)
            wake(old)
            new.start.succeed()
            require_resumed(new.start, 3)
            require_one_lineage(place, new.start, kept=(3,))


def test_a_writer_that_goes_on_after_its_name_was_closed_changes_nothing(files: Place) -> None:
    wake_during(files, BEFORE_FRAGMENT, AFTER_SEAL, 2)


@pytest.mark.crash
@pytest.mark.parametrize(("phase", "moment", "resumed"), [*IN_TIME, *TOO_LATE, *COMPLETE])
def test_a_writer_that_goes_on_during_the_next_start(
    place: Place, phase: Moment, moment: Moment, resumed: int
) -> None:
    wake_during(place, phase, moment, resumed)


@pytest.mark.crash
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES)
def test_a_writer_that_goes_on_after_the_next_start_ended(place: Place, phase: Moment) -> None:
    resumed = 3 if phase is AFTER_FRAGMENT else 2
    with place.start("old", hold=phase) as old:
        leave_zombie(old)
        with place.start("new", "--wait", "0", *SALTED) as new:
            new.start.succeed()
            require_resumed(new.start, resumed)
        wake(old)
        require_one_lineage(place, new.start, kept=(resumed,))
