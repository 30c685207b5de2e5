"""The arithmetic of samples, and rows made of them."""

from __future__ import annotations

import pytest

from benchmarks.measure import Samples, median_and_mad, slowest, total
from benchmarks.ratios import OURS, SUCCESSOR
from benchmarks.report import make_rows


@pytest.mark.parametrize(
    ("values", "median", "mad"),
    [([3.0], 3.0, 0.0), ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0, 1.0), ([4.0, 1.0, 2.0, 3.0], 2.5, 1.0)],
)
def test_median_and_mad_ignore_outliers(values, median, mad):
    assert median_and_mad(values) == (median, mad)


def test_the_slowest_rank_counts_and_totals_add_up():
    parts = [{"seconds": 1.0, "bytes": 2.0}, {}, {"seconds": 3.0}]
    assert slowest(parts) == {"seconds": 3.0, "bytes": 2.0}
    assert total(parts) == {"seconds": 4.0, "bytes": 2.0}


def test_warm_up_is_not_counted_and_a_failure_leaves_no_number():
    samples = Samples()
    samples.counting = False
    samples.add("durable", OURS, 100.0)
    samples.counting = True
    for value in (1.0, 2.0, 4.0):
        samples.add("durable", OURS, value)
    samples.add("durable", SUCCESSOR, 0.5)
    samples.fail("durable", SUCCESSOR, "rank 3: OSError")

    assert samples.medians() == {("durable", OURS): 2.0}
    ours, failed = make_rows(samples, {OURS: "a note"})
    assert (ours.median, ours.mad, ours.unit, ours.values) == (2.0, 1.0, "s", (1.0, 2.0, 4.0))
    assert ours.note == "a note"
    assert (failed.median, failed.mad, failed.note) == (None, None, "failed: rank 3: OSError")
