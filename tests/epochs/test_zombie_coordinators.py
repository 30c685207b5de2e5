"""Rank 0 of an old start goes on late: before it publishes a manifest, or takes a checkpoint back."""

from __future__ import annotations

import signal

import pytest

from tests.crash.run_files import contents, files_of
from tests.crash.starts import wait_until
from tests.epochs.endings import OWNER_LAST_STEP, SALTED, require_fenced, require_one_lineage, require_resumed
from tests.epochs.moments import (
    AFTER_CLAIM,
    BEFORE_DATA,
    BEFORE_MANIFEST,
    BEFORE_NEXT_DATA,
    BEFORE_REMOVAL,
    data_of,
)
from tests.epochs.places import HELD_SECONDS, Held, Moment, Place

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


def wake(old: Held) -> None:
    """It trains to its end, and finds itself fenced."""
    old.release()
    old.start.trainer().send_signal(signal.SIGCONT)
    assert old.start.wait() == [0], old.start.output()
    old.start.require_gone()
    require_fenced(old.start, from_step=4)


def has_written(place: Place, step: int) -> bool:
    """Whether rank 0 has published its fragment."""
    return any(name.startswith(f"step-{step:08}/rank-00000.") for name in files_of(place.url))


def outcome_of_step_3(old: Held) -> str:
    (event,) = [event for event in old.start.events("save") if event["step"] == 3]
    return str(event.get("kind", event["outcome"]))


@pytest.mark.crash
@pytest.mark.parametrize(
    ("moment", "resumed"),
    [
        # What its writer finishes until then is seen, also the save of which it was told that it is fenced.
        pytest.param(AFTER_CLAIM, 4, id="before the new owner looks"),
        pytest.param(BEFORE_MANIFEST, 3, id="before the new owner commits the same"),
        pytest.param(BEFORE_NEXT_DATA, 3, id="after the new owner committed the same"),
    ],
)
def test_a_manifest_published_late_is_the_one_that_recovery_makes(
    place: Place, moment: Moment, resumed: int
) -> None:
    with place.start("old", hold=BEFORE_MANIFEST) as old:
        old.wait_held()
        with place.start("new", "--wait", "0", *SALTED, hold=moment) as new:
            new.wait_held()
            wake(old)
            assert outcome_of_step_3(old) == "committed"
            new.release()
            new.start.succeed()
            require_resumed(new.start, resumed)
            require_one_lineage(place, new.start, kept=(resumed,))


def manifest_after_the_end(place: Place) -> None:
    with place.start("old", hold=BEFORE_MANIFEST) as old:
        old.wait_held()
        with place.start("new", "--wait", "0", *SALTED) as new:
            new.start.succeed()
            require_resumed(new.start, 3)
        # A third start keeps two of its own: step 3 is removed, and its name is closed or gone.
        with place.start("third", "--steps", str(OWNER_LAST_STEP + 2), "--salt", "2") as third:
            third.start.succeed()
        before = contents(place.url)
        wake(old)
        assert outcome_of_step_3(old) in ("StorageNotFound", "SaveFailed", "Fenced"), old.start.output()
        after = contents(place.url)
        assert {name: after.get(name) for name in before if ".lease" not in name} == {
            name: data for name, data in before.items() if ".lease" not in name
        }
        assert not [name for name in after if name not in before and name.startswith("step-00000003")]


@pytest.mark.crash
def test_a_manifest_published_after_its_step_was_removed_brings_nothing_back(place: Place) -> None:
    manifest_after_the_end(place)


@pytest.mark.crash
@pytest.mark.parametrize(
    ("moment", "resumed"),
    [
        pytest.param(AFTER_CLAIM, 4, id="during the claim"),
        pytest.param(data_of(5), 4, id="during training"),
        pytest.param(None, 4, id="after the end"),
    ],
)
def test_a_removal_that_goes_on_late_takes_nothing_from_the_new_owner(
    place: Place, moment: Moment | None, resumed: int
) -> None:
    with place.start("old", hold=BEFORE_REMOVAL) as old:
        old.wait_held()
        # Training goes on meanwhile, for one more save.
        wait_until(lambda: has_written(place, 4), HELD_SECONDS, old.start)
        # Of a store, tidying asks for some seconds only: time stands still until it is woken.
        old.start.trainer().send_signal(signal.SIGSTOP)
        with place.start("new", "--wait", "0", *SALTED, hold=moment) as new:
            if moment is not None:
                new.wait_held()
                wake(old)
                new.release()
            new.start.succeed()
            # What the old writer has finished by the time of the listing counts.
            require_resumed(new.start, resumed)
        if moment is None:
            wake(old)
        require_one_lineage(place, new.start, kept=(resumed,))


@pytest.mark.crash
def test_a_whole_start_that_stops_and_goes_on_is_fenced(place: Place) -> None:
    """SIGSTOP of trainer and writer, so no lease is renewed: where a lease runs out, the next start waits."""
    with place.start("old", hold=BEFORE_DATA) as old:
        old.wait_held()
        for member in old.start.book.members():
            member.kill(signal.SIGSTOP)
        wait = "0" if place.endpoint_url is None else "60"
        with place.start("new", "--wait", wait, *SALTED) as new:
            new.start.succeed()
            require_resumed(new.start, 2)
        for member in old.start.book.members():
            member.kill(signal.SIGCONT)
        wake(old)
        assert outcome_of_step_3(old) == "Fenced"
        require_one_lineage(place, new.start, kept=(2,))
