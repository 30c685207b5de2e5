"""One pool of warm ranks for the layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dcp_ckpt.testing.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to four ranks, one thread each."""
    with RankPool(4) as ranks:
        yield ranks
