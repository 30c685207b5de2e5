"""One pool of warm ranks for all tests that need several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dcp_ckpt.testing.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to five ranks, one thread each."""
    with RankPool(5) as ranks:
        yield ranks
