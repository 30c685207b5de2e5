"""Who may use a store: wrong credentials and places are told in seconds, with advice and without secrets."""

from __future__ import annotations

import logging
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.objects.opening import open_object_storage
from dcp_ckpt.storage.objects.retry import RetryPolicy
from dcp_ckpt.testing.s3_server import S3Server

WRONG = "bm90IHRoZSByaWdodCBzZWNyZXQ"
SECONDS = 10.0

OPERATIONS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: storage.read("a"),
    "size": lambda storage: storage.size("a"),
    "list": lambda storage: storage.list(""),
    "create_exclusive": lambda storage: storage.create_exclusive("a", b"1"),
    "upload": lambda storage: storage.open_writer("a", size_bytes=0, direct=False).finish(),
    "delete": lambda storage: storage.delete(["a", "b"]),
}


@pytest.fixture
def secrets(s3_server: S3Server, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What must be in no message and no record."""
    with caplog.at_level(logging.INFO), caplog.at_level(logging.DEBUG, logger="dcp_ckpt"):
        yield [s3_server.secret_key, WRONG, "AWS4-HMAC", "Signature="]


def failure(act: Callable[[], object], secrets: list[str], log: pytest.LogCaptureFixture) -> str:
    """The message of the error that `act` raises in time, without secrets in it or around it."""
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        act()
    assert time.monotonic() - started < SECONDS
    told = "".join(traceback.format_exception(caught.value)) + log.text
    assert not [secret for secret in secrets if secret in told]
    return caught.value.message


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
class TestAdvice:
    def test_wrong_secret(self, operation, s3_prefix, secrets, caplog, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRONG)
        self._check(operation, s3_prefix, secrets, caplog, "AWS_SECRET_ACCESS_KEY")

    def test_unknown_key(self, operation, s3_prefix, secrets, caplog, monkeypatch):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        self._check(operation, s3_prefix, secrets, caplog, "AWS_ACCESS_KEY_ID")

    def test_no_credentials(self, operation, s3_prefix, secrets, caplog, monkeypatch, tmp_path):
        forget_credentials(monkeypatch, tmp_path)
        self._check(operation, s3_prefix, secrets, caplog, "no credentials were found")

    def test_missing_bucket(self, operation, s3_environment, s3_server, secrets, caplog):
        self._check(operation, "s3://no-such-bucket/runs", secrets, caplog, "never created here")
        assert s3_server.requests().send("HEAD", "/no-such-bucket").status == 404

    def test_unknown_profile(self, operation, s3_prefix, secrets, caplog, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        self._check(operation, s3_prefix, secrets, caplog, "AWS_PROFILE")

    def _check(self, operation, url, secrets, caplog, advice):
        with closing(open_storage(url)) as storage:
            assert advice in failure(lambda: operation(storage), secrets, caplog)


def forget_credentials(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Nothing but files below `home` may tell."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))


def test_a_wrong_port_is_told_in_seconds(s3_prefix, secrets, caplog, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    retry = RetryPolicy(first_contact_seconds=1.0)
    with closing(open_object_storage(s3_prefix, retry=retry)) as storage:
        message = failure(lambda: storage.read("a"), secrets, caplog)
    assert "AWS_ENDPOINT_URL" in message
    assert "gave up after" in message


def test_an_endpoint_without_scheme_is_told_at_once(s3_prefix, secrets, caplog, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with closing(open_storage(s3_prefix)) as storage:
        assert "127.0.0.1:9000" in failure(lambda: storage.read("a"), secrets, caplog)


@pytest.fixture
def profile(s3_server: S3Server, s3_environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials, endpoint and region in the files of the AWS tools, under a profile of their own."""
    home = tmp_path / "aws"
    home.mkdir()
    forget_credentials(monkeypatch, home)
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "train")
    (home / "credentials").write_text(
        f"[train]\naws_access_key_id = {s3_server.access_key}\n"
        f"aws_secret_access_key = {s3_server.secret_key}\n"
    )
    (home / "config").write_text(
        f"[profile train]\nregion = {s3_server.region}\nendpoint_url = {s3_server.endpoint_url}\n"
    )


def test_a_profile_is_enough_in_the_writer_process_too(s3_prefix, profile, s3_server, secrets, caplog):
    weight = torch.arange(100.0)
    config = CheckpointConfig(timeout_seconds=60.0)
    with Checkpointer(s3_prefix, config=config) as checkpointer:
        checkpointer.save({"weight": weight}, step=1).result(60)
    loaded = {"weight": torch.zeros(100)}
    with Checkpointer(s3_prefix, config=config) as checkpointer:
        assert checkpointer.load(loaded) is not None
    assert torch.equal(loaded["weight"], weight)
    with closing(open_storage(s3_prefix)) as storage:
        contents = b"".join(storage.read(info.key) for info in storage.list(""))
    assert s3_server.secret_key.encode() not in contents
    assert s3_server.access_key.encode() not in contents
    assert not [secret for secret in secrets if secret in caplog.text]
