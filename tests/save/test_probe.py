"""Opening a run tries the storage out: what is wrong shows there, by rank and path, and nothing is left."""

from __future__ import annotations

import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer
from dcp_ckpt.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    StorageError,
    StorageFull,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.storage.keys import temporary_name
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.fault_proxy import FaultProxy

CONFIG = CheckpointConfig(keep=None, grace_seconds=0.0, timeout_seconds=30.0)

_HOOK = """\
import errno, os, sys
if any("dcp_ckpt.writer.program" in argument for argument in sys.orig_argv):
    def where(path):
        return os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)

    def replaces(name, directories=False):
        real = getattr(os, name)
        def put(function):
            def call(path, *rest, **named):
                of_directory = directories and where(path).endswith("/deep/run")
                if "run/.probe." in where(path) or of_directory:
                    return function(real, path, *rest, **named)
                return real(path, *rest, **named)
            setattr(os, name, call)
        return put

    def refuse(code):
        def fail(real, path, *rest, **named):
            raise OSError(code, os.strerror(code), where(path))
        return fail

"""


@pytest.fixture
def in_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs code at the start of every writer, to do to calls on its probe what a bad storage does."""

    def install(code: str) -> None:
        directory = tmp_path / "hook"
        directory.mkdir()
        body = "".join(f"    {line}\n" for line in code.splitlines())
        (directory / "sitecustomize.py").write_text(_HOOK + body)
        monkeypatch.setenv("PYTHONPATH", str(directory))

    return install


def error_of_opening(run: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(run, config=CONFIG)
    return caught.value


def test_opening_makes_the_run_directory_and_leaves_nothing_in_it(tmp_path):
    run = tmp_path / "deep" / "run"
    with Checkpointer(run, config=CONFIG):
        assert list(run.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        ('replaces("open")(refuse(errno.EROFS))', StorageError, "mounted read-only"),
        ('replaces("mkdir", directories=True)(refuse(errno.EACCES))', StorageError, "check the permissions"),
        ('replaces("open")(refuse(errno.EDQUOT))', StorageFull, "the quota is used up"),
        ('replaces("pwrite")(refuse(errno.EIO))', StorageError, "the device failed"),
        (
            'replaces("fsync", directories=True)(refuse(errno.ESTALE))',
            StorageTransient,
            "cannot finish writing",
        ),
        (
            'replaces("pwrite")(lambda real, path, data, at: real(path, bytes(len(data)), at))',
            StorageUnsuitable,
            "does not give back what was written",
        ),
        (
            'replaces("fsync")(lambda real, path: os.unlink(where(path)))',
            StorageUnsuitable,
            "does not give back what was written",
        ),
    ],
    ids=["read-only", "permission", "quota", "device", "lost answer", "loses bytes", "loses names"],
)
def test_a_storage_that_does_not_work_is_told_when_opening(tmp_path, in_writers, code, kind, told):
    in_writers(code)
    error = error_of_opening(tmp_path / "deep" / "run")
    assert type(error) is kind
    assert told in error.message
    assert (error.rank, error.phase) == (0, "open")
    assert str(tmp_path / "deep" / "run") in str(error.path)
    assert not (tmp_path / "deep").exists(), "no directory is left that was made for the run"


def test_an_empty_directory_that_was_there_stays(tmp_path, in_writers):
    (tmp_path / "deep").mkdir()
    in_writers('replaces("fsync", directories=True)(refuse(errno.EIO))')
    error_of_opening(tmp_path / "deep" / "run")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_storage_that_lets_nothing_be_deleted_is_told_when_opening(tmp_path, in_writers):
    in_writers('replaces("unlink")(refuse(errno.EPERM))')
    error = error_of_opening(tmp_path / "run")
    assert (type(error), error.rank) == (StorageError, 0)
    assert "cannot delete the file" in error.message


def test_a_probe_that_another_start_sweeps_is_written_again(tmp_path, in_writers):
    in_writers(
        "swept = []\n"
        "def sweep_once(real, path):\n"
        "    real(path)\n"
        "    if not swept:\n"
        "        swept.append(os.unlink(where(path)))\n"
        'replaces("fsync")(sweep_once)'
    )
    with Checkpointer(tmp_path / "run", config=CONFIG):
        assert list((tmp_path / "run").iterdir()) == []


def test_the_probe_of_a_start_that_died_is_swept_by_the_next(tmp_path):
    leftover = tmp_path / temporary_name("probe", secrets.token_hex(8))
    leftover.write_bytes(b"dead")
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        assert leftover.exists(), "opening sweeps nothing: it owns nothing yet"
        checkpointer.load({"x": torch.zeros(1)})
        assert not leftover.exists()


def test_a_missing_package_is_told_when_opening(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    error = error_of_opening("s3://bucket/run")
    assert isinstance(error, MissingDependencyError)
    assert "pip install" in error.message
    assert error.rank == 0


@pytest.mark.parametrize(("url", "kind"), [("", ConfigError), ("memory://place", StorageUnsuitable)])
def test_what_is_no_place_for_a_run_is_told_when_opening(url, kind):
    assert isinstance(error_of_opening(url), kind)


def test_wrong_credentials_are_told_when_opening_s3(s3_prefix, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    error = error_of_opening(s3_prefix)
    assert isinstance(error, StorageError)
    assert (error.rank, error.phase) == (0, "open")
    assert str(error.path).startswith(s3_prefix)


def test_opening_costs_three_requests_of_s3_and_leaves_nothing(s3_prefix, s3_environment, monkeypatch):
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        with Checkpointer(s3_prefix, config=CONFIG):
            pass
        assert Counter(str(kind) for kind in proxy.counts().elements()) in (
            {"PUT": 1, "GET": 1, "DELETE": 1},
            {"PUT": 1, "GET": 1, "DELETE_MANY": 1},
        )


# The root that a storage makes


def test_only_the_directories_that_a_storage_made_are_removed_with_its_root(tmp_path):
    (tmp_path / "there").mkdir()
    storage = LocalStorage(tmp_path / "there" / "a" / "b")
    storage.put("x", b"1")
    storage.remove_own_root()
    assert storage.read("x") == b"1", "it is not empty"
    other = LocalStorage(tmp_path / "there" / "c" / "d")
    other.make_directory("e")
    other.remove_directory("e")
    other.remove_own_root()
    assert sorted(os.listdir(tmp_path / "there")) == ["a"]
    other.remove_own_root()
