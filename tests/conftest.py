"""Settings for all tests: what pyproject.toml cannot say, and the S3 server that they share."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from dcp_ckpt.testing.s3_server import S3Server

# Fixed examples, so that a red run is red again; no deadline, since a busy machine is no failure;
# no database, so that nothing is left on disk.
settings.register_profile("dcp_ckpt", derandomize=True, deadline=None, database=None)
settings.load_profile("dcp_ckpt")

S3_BUCKET = "checkpoints"
# They would send a client elsewhere, or give it other credentials.
FOREIGN_AWS_VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION")


THREAD_END_SECONDS = 10.0

LONGEST_FIRST = ("launch", "benchmarks", "crash", "layouts", "epochs", "distributed", "cli")
"""Directories whose tests take long. One that is begun last would keep a single process busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    directory = item.path.parent.name
    return LONGEST_FIRST.index(directory) if directory in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every thread of this package that a test starts has an owner, who ends it before the test does."""
    before = {*threading.enumerate()}
    yield
    deadline = time.monotonic() + THREAD_END_SECONDS
    started = [thread for thread in threading.enumerate() if thread not in before]
    ours = [thread for thread in started if thread.name.startswith("dcp_ckpt")]
    for thread in ours:
        thread.join(max(deadline - time.monotonic(), 0.0))
    left = [thread.name for thread in ours if thread.is_alive()]
    assert not left, f"threads that nobody ended: {', '.join(left)}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, started by the first test that asks. Tests that kill a server start their own."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """The name of the bucket that all tests share, since each bucket takes much disk space of the server."""
    s3_server.make_bucket(S3_BUCKET)
    return S3_BUCKET


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of this process, and what it starts, leads S3 clients to the shared server."""
    for name in FOREIGN_AWS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.environment()


@pytest.fixture
def s3_prefix(s3_bucket: str, s3_environment: dict[str, str]) -> str:
    """A URL `s3://bucket/prefix` below which nothing is stored yet; the environment leads to its server."""
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}"
