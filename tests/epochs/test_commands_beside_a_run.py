"""`recover` and `prune` while a training runs, after it died, and against a start at the same moment."""

from __future__ import annotations

import pytest

from tests.crash.run_files import committed_steps, contents, debris, require_all_verify
from tests.crash.starts import Start, wait_until
from tests.epochs.commands import command, run_command
from tests.epochs.endings import OWNER_LAST_STEP, SALTED, require_fenced, require_one_lineage, require_resumed
from tests.epochs.moments import AFTER_CLAIM, BEFORE_DATA, BEFORE_NEXT_DATA, claim_of
from tests.epochs.places import HELD_SECONDS, Place

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

RECOVER = ("recover", "--wait-seconds", "0")
PRUNE = ("prune", "--keep-last", "1", "--grace-seconds", "0")
EXIT_USAGE = 2


def without_leases(place: Place) -> dict[str, bytes]:
    return {name: data for name, data in contents(place.url).items() if not name.endswith(".lease")}


def require_refused(place: Place, *words: str) -> None:
    before = without_leases(place)
    code, output = run_command(place, *words)
    assert code == EXIT_USAGE, output
    assert "epoch(s) 1 of this run are still live" in output
    assert "--force" in output
    assert without_leases(place) == before, "nothing was claimed, nothing was touched"


def refuse_then_insist(place: Place, words: tuple[str, ...], kept: list[int]) -> None:
    with place.start("live", hold=BEFORE_DATA) as live:
        live.wait_held()
        require_refused(place, *RECOVER)
        require_refused(place, *PRUNE)
        code, output = run_command(place, *words, "--force")
        assert code == 0, output
        assert "(epoch 2)" in output
        assert committed_steps(place.url) == kept
        live.release()
        assert live.start.wait() == [0], live.start.output()
        live.start.require_gone()
        require_fenced(live.start, from_step=3)
    assert committed_steps(place.url) == kept
    # It was told that step 3 is not known: its writer had finished, and no newer training has committed.
    with place.start("owner", *SALTED) as owner:
        owner.start.succeed()
        require_resumed(owner.start, 3)
        require_one_lineage(place, owner.start, epoch=3, kept=(3,))


def test_a_command_is_refused_while_the_owner_lives_and_fences_it_by_force(files: Place) -> None:
    refuse_then_insist(files, PRUNE, [2])


@pytest.mark.crash
@pytest.mark.parametrize(("words", "kept"), [(RECOVER, [1, 2]), (PRUNE, [2])], ids=["recover", "prune"])
def test_both_commands_anywhere(place: Place, words: tuple[str, ...], kept: list[int]) -> None:
    refuse_then_insist(place, words, kept)


@pytest.mark.crash
def test_commands_work_once_the_owner_is_dead(place: Place) -> None:
    with place.start("killed", hold=BEFORE_DATA) as killed:
        killed.wait_held()
        for member in killed.start.book.members():
            member.kill()
        killed.start.wait()
        killed.start.require_gone()
    # By default it waits for as long as a lease may take to run out.
    code, output = run_command(place, "recover")
    assert code == 0, output
    assert "0 committed" in output
    assert committed_steps(place.url) == [1, 2]
    assert debris(place.url) == []
    code, output = run_command(place, *PRUNE)
    assert code == 0, output
    assert committed_steps(place.url) == [2]
    require_all_verify(place.url)
    assert debris(place.url) == []
    with place.start("owner", *SALTED) as owner:
        owner.start.succeed()
        require_resumed(owner.start, 2)
        require_one_lineage(place, owner.start, epoch=4, kept=(2,))


def leave_history(place: Place) -> None:
    """Steps 1 and 2 are committed, and step 3 is debris."""
    with place.start("killed", hold=BEFORE_DATA) as killed:
        killed.wait_held()
        for member in killed.start.book.members():
            member.kill()
        killed.start.wait()


def require_trained_from_2(start: Start) -> None:
    start.succeed()
    require_resumed(start, 2)
    assert start.steps("save", outcome="committed") == list(range(3, OWNER_LAST_STEP + 1)), start.output()


@pytest.mark.crash
def test_a_command_that_loses_the_race_against_a_start_does_not_fence_it(place: Place) -> None:
    """It finds nobody alive, and then a start claims the number that it was about to claim."""
    leave_history(place)
    place.wait_for_leases()
    with command(place, *RECOVER, hold=claim_of(2, after=False)) as recover:
        recover.wait_held()
        with place.start("owner", "--wait", "0", *SALTED, hold=BEFORE_NEXT_DATA) as owner:
            owner.wait_held()
            recover.release()
            code, output = recover.wait()
            assert code == EXIT_USAGE, output
            # Its own lease stood in the way of the second, which no owner ever had.
            assert "epoch(s) 3 of this run are still live" in output
            owner.release()
            require_trained_from_2(owner.start)
            require_one_lineage(place, owner.start, epoch=3, kept=(2,))


@pytest.mark.crash
def test_a_start_that_loses_the_race_against_a_command_waits_for_it(place: Place) -> None:
    leave_history(place)
    with command(place, "recover", hold=AFTER_CLAIM) as recover:
        recover.wait_held()
        with place.start("owner", *SALTED) as owner:
            wait_until(lambda: "still live; waiting" in owner.start.output(), HELD_SECONDS, owner.start)
            recover.release()
            code, output = recover.wait()
            assert code == 0, output
            require_trained_from_2(owner.start)
            require_one_lineage(place, owner.start, epoch=3, kept=(2,))
