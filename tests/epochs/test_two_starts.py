"""Two starts of one run at the same moment: whichever claims first, one of them owns the run in the end."""

from __future__ import annotations

import pytest

from tests.crash.run_files import committed_manifests, debris, require_all_verify
from tests.crash.starts import LAST_STEP, Start, wait_until
from tests.epochs.endings import OWNER_LAST_STEP, SALTED, require_fenced, require_one_lineage
from tests.epochs.moments import BEFORE_CLAIM, BEFORE_DATA, claim_of
from tests.epochs.places import HELD_SECONDS, Place

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]


def require_trained_alone(start: Start) -> None:
    """From the beginning to the end, and every save of it was committed."""
    start.succeed()
    assert start.steps("resume") == [0], start.output()
    assert start.steps("save", outcome="committed") == list(range(1, OWNER_LAST_STEP + 1)), start.output()


def the_first_to_claim_is_fenced(place: Place) -> None:
    """It has claimed and saves; the other one does not wait for it."""
    with place.start("first", hold=BEFORE_DATA) as first:
        first.wait_held()
        with place.start("second", "--wait", "0", *SALTED) as second:
            second.start.succeed()
            assert second.start.steps("resume") == [2], second.start.output()
        first.release()
        assert first.start.wait() == [0], first.start.output()
        first.start.require_gone()
        require_fenced(first.start, from_step=3)
        require_one_lineage(place, second.start, kept=(2,))


@pytest.mark.crash
def test_the_first_to_claim_is_fenced_by_the_second(place: Place) -> None:
    the_first_to_claim_is_fenced(place)


@pytest.mark.crash
def test_the_number_is_taken_just_before_it_is_claimed(place: Place) -> None:
    """Both saw an empty run, and both go for number 1: the late one takes another, and owns the run."""
    with place.start("late", "--wait", "0", *SALTED, hold=BEFORE_CLAIM) as late:
        late.wait_held()
        # The late one's lease has made number 1 look used: it is claimed for nobody, to leave no gap.
        with place.start("early", "--wait", "0", hold=BEFORE_DATA) as early:
            early.wait_held()
            late.release()
            late.start.succeed()
            assert "another start took epoch 1" in late.start.output()
            early.release()
            assert early.start.wait() == [0], early.start.output()
            early.start.require_gone()
            require_fenced(early.start, from_step=3)
            assert late.start.steps("resume") == [2], late.start.output()
            require_one_lineage(place, late.start, epoch=3, kept=(2,))


def one_after_the_other(place: Place) -> None:
    with place.start("owner", *SALTED, hold=claim_of(1, after=True)) as owner:
        owner.wait_held()
        with place.start("waiting", *SALTED) as waiting:
            wait_until(lambda: "still live; waiting" in waiting.start.output(), HELD_SECONDS, waiting.start)
            owner.release()
            require_trained_alone(owner.start)
            waiting.start.succeed()
            assert waiting.start.steps("resume") == [OWNER_LAST_STEP], waiting.start.output()
            assert waiting.start.steps("save") == []
        require_one_lineage(place, owner.start, epoch=1)


def test_a_start_that_waits_finds_all_that_the_other_saved(files: Place) -> None:
    one_after_the_other(files)


@pytest.mark.crash
def test_a_start_that_waits_in_a_store_finds_all_that_the_other_saved(store: Place) -> None:
    one_after_the_other(store)


@pytest.mark.crash
@pytest.mark.parametrize("wait", ["0", "30"])
def test_whatever_two_starts_do_to_each_other_the_run_is_whole(place: Place, wait: str) -> None:
    """Nothing is held: the order is what it happens to be."""
    with place.start("a", "--wait", wait) as one, place.start("b", "--wait", wait) as other:
        for started in (one.start, other.start):
            assert started.wait() == [0], started.output()
            started.require_gone()
        with place.start("last") as last:
            last.start.succeed()
        require_all_verify(place.url)
        assert debris(place.url) == []
        assert LAST_STEP in {found.step for found in committed_manifests(place.url).values()}
