"""A damaged step is passed over, trained and saved again, and never taken for a checkpoint any more."""

from __future__ import annotations

from contextlib import closing

import pytest

from dcp_ckpt.storage import open_storage
from tests.crash.run_files import committed_manifests, contents, debris
from tests.crash.starts import LAST_STEP, expected
from tests.epochs.places import Place

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

DAMAGED = f"step-{LAST_STEP:08}"
AGAIN = f"{DAMAGED}.e2"


def flip_a_bit(place: Place) -> bytes:
    """In the middle of the newest checkpoint's data file; gives the bytes that stand there now."""
    (name,) = [name for name in contents(place.url) if name.startswith(f"{DAMAGED}/__0_0.")]
    with closing(open_storage(place.url)) as storage:
        data = bytearray(storage.read(name))
        data[len(data) // 2] ^= 4
        storage.put(name, bytes(data))
    return bytes(data)


def steps_by_directory(place: Place) -> dict[str, int]:
    return {name: found.epoch for name, found in committed_manifests(place.url).items()}


def fall_back_and_train_again(place: Place) -> None:
    with place.start("first") as first:
        first.start.succeed()
    damaged = flip_a_bit(place)

    with place.start("second", "--salt", "1") as second:
        second.start.succeed()
        (resume,) = second.start.events("resume")
        assert (resume["step"], resume["digest"]) == (LAST_STEP - 1, expected(1)[0][LAST_STEP - 1])
        (trained,) = second.start.events("step")
        assert second.start.steps("save", outcome="committed") == [LAST_STEP]
    older = f"step-{LAST_STEP - 1:08}"
    assert steps_by_directory(place) == {older: 1, DAMAGED: 1, AGAIN: 2}

    with place.start("third", "--steps", str(LAST_STEP + 2)) as third:
        third.start.succeed()
        (resume,) = third.start.events("resume")
        assert (resume["step"], resume["digest"]) == (LAST_STEP, trained["digest"]), third.start.output()
    # Two are kept besides the one resumed from; the damaged one is none of them, and stays to be looked at.
    assert steps_by_directory(place) == {
        DAMAGED: 1,
        AGAIN: 2,
        **{f"step-{step:08}": 3 for step in (LAST_STEP + 1, LAST_STEP + 2)},
    }
    found = contents(place.url)
    assert [data for name, data in found.items() if name.startswith(f"{DAMAGED}/__0_0.")] == [damaged]
    assert len([name for name in found if name.startswith(f"marks/{DAMAGED}/bad-")]) == 1
    assert debris(place.url) == []


def test_a_damaged_step_is_trained_and_saved_again(files: Place) -> None:
    fall_back_and_train_again(files)


@pytest.mark.crash
def test_a_damaged_step_in_a_store_is_trained_and_saved_again(store: Place) -> None:
    fall_back_and_train_again(store)
