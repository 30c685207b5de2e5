"""Planning at scale: what a rank reads to resume, what rank 0 says, and that both are what real ranks do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dcp_ckpt.coordination import error_fields
from dcp_ckpt.errors import CorruptCheckpoint, SaveFailed
from dcp_ckpt.load.fit_verdict import verdict_of_all
from dcp_ckpt.save.record import Report
from dcp_ckpt.testing.simulated_ranks import Resumed, SimulatedWorld

NUM_TENSORS = 20
CALL = 3


def save(world_size: int) -> list[Resumed]:
    """What ranks of the same and of a smaller world read of the second steady save."""
    world = SimulatedWorld(world_size=world_size, num_tensors=NUM_TENSORS)
    middle = world_size // 2
    reports, tensors = {}, {}
    for number in (0, middle, middle + 1):
        with world.rank(number) as rank:
            for call in range(2, CALL + 1):
                reports[number] = rank.save(call)
            tensors[number] = rank.tensors
    with world.coordinator() as coordinator:
        coordinator.first_save(reports[0])
        coordinator.report(CALL, reports)
        coordinator.conclude(CALL)
    halves = [tensors[middle], tensors[middle + 1]]
    return [
        world.resume(CALL, halves[:1], rank=middle, world_size=world_size),
        world.resume(CALL, halves, rank=middle // 2, world_size=world_size * 3 // 4),
    ]


def test_a_resume_reads_a_few_fragments_of_a_world_however_many_there_are():
    small, large = save(64), save(512)
    assert all(resumed.is_equal for resumed in (*small, *large))
    for few, many in zip(small, large, strict=True):
        # Numbers have a digit more.
        assert many.fragment_bytes < 1.05 * few.fragment_bytes
        # One entry for each rank, whatever it stores.
        assert many.manifest_bytes < 130 * 512


def test_a_save_that_rank_0_refuses_is_not_taken_for_committed():
    world = SimulatedWorld(world_size=4, num_tensors=1)
    with world.rank(0) as rank:
        report = rank.save(2)
    assert report.summary is not None
    other = replace(report.summary, rank=1, created_at=None, replicated="f" * 32)
    with world.coordinator() as coordinator:
        coordinator.first_save(report)
        coordinator.report(2, {0: report, 1: Report(summary=other)})
        with pytest.raises(SaveFailed, match="hold other replicated state"):
            coordinator.conclude(2)


def test_what_all_ranks_are_told_of_a_fit_does_not_grow_with_them():
    fine = {"failure": None, "fits": True, "is_part": False, "unmatched": ["a.*", "b.*"]}
    damaged = error_fields(CorruptCheckpoint("wrong", rank=1))
    odd = {"failure": damaged, "fits": False, "is_part": True, "unmatched": ["b.*"]}
    told = verdict_of_all([fine, odd])
    assert (told["fits"], told["is_part"], told["unmatched"]) == (False, True, ["b.*"])
    assert told["failures"]["errors"] == [damaged]
    many = verdict_of_all([fine, *[odd] * 1000])
    assert many == {**told, "failures": {**told["failures"], "num_ranks": 1000}}
