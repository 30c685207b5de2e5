"""Lists of ranks are judged as if they were written out."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_ckpt.format.boxes import expand_ranks
from dcp_ckpt.format.consistency import _are_among, ranks_problem

runs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=5)


@settings(max_examples=500)
@given(runs, st.integers(1, 14))
def test_ranks_are_listed_once_and_in_their_world(runs, world_size):
    ranks = expand_ranks(runs)
    beyond = any(first + count > world_size for first, count in runs)
    assert (ranks_problem(runs, world_size) is None) == (not beyond and len(set(ranks)) == len(ranks))


@settings(max_examples=500)
@given(runs, runs)
def test_some_ranks_are_among_others(runs, others):
    if ranks_problem(others, 17) is None:
        assert _are_among(runs, others) == (set(expand_ranks(runs)) <= set(expand_ranks(others)))


def test_long_runs_take_no_longer_than_short_ones():
    started = time.process_time()
    assert ranks_problem([[0, 10**12], [10**12, 10**12]], 3 * 10**12) is None
    assert ranks_problem([[0, 10**12], [10**12 - 1, 1]], 3 * 10**12) is not None
    assert _are_among([[5, 10**12]], [[10**12, 10**12], [0, 10**12]])
    assert time.process_time() - started < 1
