"""Two nodes, as two agents of torchrun on this machine: a training saves and resumes, and storage is shared.

The nodes are processes with directories, mounts or networks of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt import hosts, verify

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
SMALL = ("--model-size", "tiny", "--batch-size", "8", "--eval-iters", "1", "--run-dir", "runs")
END_SECONDS = 100.0
OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((hosts.LOOPBACK, 0))
        return int(probe.getsockname()[1])


class Node:
    """One agent with two ranks; `before` is put in front of its command."""

    def __init__(self, directory: Path, port: int, arguments: Sequence[str], before: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "x"]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.LOOPBACK}:{port}"]
        command = [*before, sys.executable, *agent, *meeting, "--local-addr", hosts.LOOPBACK, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, deadline: float) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self._process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        return self._process.returncode, output

    def close(self) -> None:
        if self._process.poll() is None:
            # The agent ends its workers; should it hang, its session goes.
            self._process.terminate()
            try:
                self._process.communicate(timeout=10.0)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.communicate()


@contextmanager
def two_nodes(
    directories: Sequence[Path], arguments: Sequence[str], *, before: Sequence[Sequence[str]] = ((), ())
) -> Iterator[list[Node]]:
    port = free_port()
    with ExitStack() as stack:
        nodes = []
        for directory, prefix in zip(directories, before, strict=True):
            node = Node(directory, port, arguments, prefix)
            stack.callback(node.close)
            nodes.append(node)
        yield nodes


def train(directories: Sequence[Path], *flags: str) -> list[tuple[int, str]]:
    deadline = time.monotonic() + END_SECONDS
    with two_nodes(directories, [str(TRAIN), *SMALL, *flags]) as nodes:
        return [node.wait(deadline) for node in nodes]


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.crash
def test_a_training_on_two_nodes_saves_and_resumes(tmp_path):
    common = ("--save-every", "2", "--log-json", str(tmp_path / "log.jsonl"))
    for last, resume in (("2", "auto"), ("4", "must")):
        for code, output in train([tmp_path, tmp_path], "--steps", last, "--resume", resume, *common):
            assert code == 0, output
    found = events(tmp_path / "log.jsonl")
    assert [event["step"] for event in found if event["event"] == "step"] == [1, 2, 3, 4]
    (resumed,) = [event for event in found if event["event"] == "resume"]
    assert (resumed["step"], resumed["from_world"], resumed["to_world"]) == (2, 4, 4)
    checked = verify(tmp_path / "runs" / "run-001")
    assert checked.ok
    assert [checkpoint.step for checkpoint in checked.checkpoints] == [2, 4]


def require_told(results: Sequence[tuple[int, str]], *parts: str) -> None:
    """Both agents end with a failure, and a rank of each says why."""
    for code, output in results:
        assert code != 0, output
        assert "file system" in output, output
        for part in parts:
            assert part in output, output


def test_nodes_with_other_directories_of_the_same_relative_path_are_told(tmp_path):
    directories = [tmp_path / "one", tmp_path / "two"]
    results = train(directories, "--steps", "1")
    require_told(results, f"{directories[0]}/runs/run-001", f"{directories[1]}/runs/run-001")
    # One of them held rank 0, which chose the run; nothing else was made anywhere.
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert made in (["one/runs/run-001/run.json"], ["two/runs/run-001/run.json"])


@pytest.mark.crash
def test_nodes_with_a_directory_of_their_own_at_the_same_path_are_told(tmp_path):
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True
        ).returncode
    ):
        pytest.skip("no private mounts here")
    (tmp_path / "runs").mkdir()
    private = [*OWN_MOUNTS, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "runs")]
    deadline = time.monotonic() + END_SECONDS
    arguments = [str(TRAIN), *SMALL, "--steps", "1"]
    with two_nodes([tmp_path, tmp_path], arguments, before=((), private)) as nodes:
        results = [node.wait(deadline) for node in nodes]
    require_told(
        results, f"were both given {tmp_path}/runs/run-001", "on each node is not a shared file system"
    )


# How ranks of several hosts find rank 0


def test_a_host_is_told_from_another_by_its_network():
    program = "from dcp_ckpt.hosts import host_identity; print(host_identity())"

    def ask(before: Sequence[str]) -> str:
        command = [*before, sys.executable, "-c", program]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    assert ask(()) == hosts.host_identity()
    alone = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which("unshare") and not subprocess.run([*alone, "true"], capture_output=True).returncode:
        assert ask(alone) != hosts.host_identity()


def test_the_first_address_that_answers_is_taken():
    with socket.create_server((hosts.LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        assert hosts.reachable_address(["no.such.host.invalid", hosts.LOOPBACK], port) == hosts.LOOPBACK
    assert hosts.reachable_address([hosts.LOOPBACK], port) is None
    assert hosts.reachable_address([], port) is None


def test_own_addresses_are_never_loopback():
    found = hosts.own_addresses()
    assert len(found) == len(set(found))
    assert not [address for address in found if address.startswith("127.") or address == "::1"]


_TWO_NETWORKS = """\
set -e
exec 3>&1
unshare --net sleep 100 & other=$!
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
ip link add name here type veth peer name there netns $other
ip address add 10.77.0.1/24 dev here; ip link set here up; ip link set lo up
nsenter --net=/proc/$other/ns/net sh -c \
  'ip address add 10.77.0.2/24 dev there; ip link set there up; ip link set lo up'
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 WORLD_SIZE=2 OMP_NUM_THREADS=1
GLOO_SOCKET_IFNAME=there RANK=1 nsenter --net=/proc/$other/ns/net "$@" & second=$!
code=0; GLOO_SOCKET_IFNAME=here RANK=0 "$@" || code=$?
wait $second || code=$?
kill $other
exit $code
"""

_SAVE = """\
import sys, torch, torch.distributed as dist
from dcp_ckpt import Checkpointer, CheckpointConfig
dist.init_process_group("gloo")
with Checkpointer(sys.argv[1], config=CheckpointConfig(timeout_seconds=30.0)) as checkpointer:
    channel = checkpointer._channel
    assert len(channel.host_ranks) == 1, channel.host_ranks
    checkpointer.save({"x": torch.ones(3)}, step=1).result(30)
dist.destroy_process_group()
"""


@pytest.mark.crash
def test_ranks_on_two_networks_reach_rank_0_where_there_is_no_default_route(tmp_path):
    """Two network namespaces joined by a cable: to each other they are two hosts."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    tried = ["sh", "-c", "ip link add name here type veth peer name there"]
    if not (shutil.which("unshare") and shutil.which("nsenter") and shutil.which("ip")) or (
        subprocess.run([*alone, *tried], capture_output=True).returncode
    ):
        pytest.skip("no networks can be made here")
    command = [
        *alone,
        "bash",
        "-c",
        _TWO_NETWORKS,
        "bash",
        sys.executable,
        "-c",
        _SAVE,
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=END_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(tmp_path / "run").ok
