"""The places where the runs of these tests live."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.epochs.places import Place


@pytest.fixture
def files(tmp_path: Path) -> Place:
    """On a file system."""
    return Place(directory=tmp_path, url=str(tmp_path / "run"), endpoint_url=None)


@pytest.fixture
def store(tmp_path: Path, s3_prefix: str, s3_environment: dict[str, str]) -> Place:
    """On a real S3 server."""
    return Place(directory=tmp_path, url=s3_prefix, endpoint_url=s3_environment["AWS_ENDPOINT_URL"])


@pytest.fixture(params=["files", "store"])
def place(request: pytest.FixtureRequest) -> Place:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Place)
    return found
