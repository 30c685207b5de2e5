"""Every command on a run in a bucket: the same answers and exit codes as on disk."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.cli.commands import as_json, invoke

COMMANDS = {
    "runs": ["runs", "{}"],
    "list": ["list", "{}"],
    "inspect": ["inspect", "{}@latest"],
    "inspect a directory": ["inspect", "{}/step-00000010"],
    "verify": ["verify", "{}"],
    "recover": ["recover", "{}"],
    "prune": ["prune", "{}", "--keep-last", "1"],
    "pin": ["pin", "{}@10"],
    "plan": ["plan", "{}@10", "--world-size", "2"],
    "copy": ["copy", "{}@10", "backup"],
}


@pytest.fixture
def base(s3_prefix: str) -> str:
    """One run of steps 10, 20 and 30, whose loss is least at 20."""
    run = open_run(s3_prefix, name="exp")
    with closing(open_storage(run.path)) as storage:
        for step in (10, 20, 30):
            metrics = {"loss": abs(step - 20.0)}
            write_tiny_checkpoint(storage, step=step, run_id=run.run_id, metrics=metrics)
    return s3_prefix


@pytest.fixture
def run(base: str) -> str:
    return f"{base}/run-001"


def steps(run: str) -> list[int]:
    return [checkpoint["step"] for checkpoint in as_json("list", run)["checkpoints"]]


def test_runs_and_list(base: str, run: str) -> None:
    (found,) = as_json("runs", base)["runs"]
    assert (found["number"], found["name"], found["checkpoints"], found["latest_step"]) == (1, "exp", 3, 30)
    listed = as_json("list", run)
    assert listed["latest"] == "step-00000030"
    assert [checkpoint["metrics"] for checkpoint in listed["checkpoints"]] == [
        {"loss": 10.0},
        {"loss": 0.0},
        {"loss": 10.0},
    ]
    assert invoke("list", run).stdout.count("\n") == 4


@pytest.mark.parametrize(
    ("ref", "step"), [("@latest", 30), ("@20", 20), ("@best:loss:min", 20), ("/step-00000010", 10)]
)
def test_references(run: str, ref: str, step: int) -> None:
    assert as_json("inspect", run + ref)["step"] == step
    assert as_json("verify", run + ref)["ok"]


def test_inspect_reads_values_and_statistics(run: str) -> None:
    shown = as_json("inspect", f"{run}@30", "--stats", "--key", "model.weight")
    (weight,) = shown["tensors"]
    assert (weight["name"], weight["shape"], weight["stats"]["max"]) == ("model.weight", [6, 4], 23.0)
    assert invoke("inspect", f"{run}@30", "--stats").exit_code == 0


def test_what_is_missing(base: str, run: str) -> None:
    for arguments in (
        ["inspect", f"{run}@99"],
        ["list", f"{base}/run-007"],
        ["verify", f"{run}/step-00000099"],
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (3, ""), result.output


def test_damage_is_named(run: str) -> None:
    key = "step-00000020/__0_0.e0001-s000001.distcp"
    with closing(open_storage(run)) as storage:
        storage.put(key, b"x" + storage.read(key)[1:])
    result = invoke("verify", run)
    assert result.exit_code == 4
    assert key.rpartition("/")[2] in result.output
    checked = as_json("verify", run, code=4)["checkpoints"]
    assert [bool(checkpoint["problems"]) for checkpoint in checked] == [False, True, False]


def test_pin_prune_and_unpin(run: str) -> None:
    assert as_json("pin", f"{run}@10")["pinned"]
    plan = as_json("prune", run, "--keep-last", "1", "--dry-run")
    assert [item["step"] for item in plan["removed"]] == [20]
    assert steps(run) == [10, 20, 30]
    pruned = as_json("prune", run, "--keep-last", "1", "--grace-seconds", "0")
    assert [item["step"] for item in pruned["removed"]] == [20]
    assert steps(run) == [10, 30]
    assert invoke("unpin", f"{run}@10").exit_code == 0
    assert invoke("prune", run, "--keep-last", "1", "--grace-seconds", "0").exit_code == 0
    assert steps(run) == [30]
    removed = invoke("inspect", f"{run}@20")
    assert removed.exit_code == 3, "a tombstone is no damage"


def test_recover_commits_what_was_finished(run: str) -> None:
    with closing(open_storage(run)) as storage:
        run_id = as_json("list", run)["run"]["run_id"]
        write_tiny_checkpoint(storage, step=40, save=2, run_id=run_id, commit=False)
    assert steps(run) == [10, 20, 30]
    assert as_json("recover", run)["committed"] == ["step-00000040"]
    assert steps(run) == [10, 20, 30, 40]
    with closing(open_storage(run)) as storage:
        assert not [info.key for info in storage.list("epochs/") if info.key.endswith(".lease")]


def test_a_live_owner_is_respected(run: str) -> None:
    with closing(open_storage(run)) as storage, storage.hold_lease("epochs/00000001.lease"):
        refused = invoke("prune", run, "--keep-last", "1")
        assert refused.exit_code == 2
        assert "--force" in refused.stderr
        assert steps(run) == [10, 20, 30]


def test_from_disk_to_the_bucket_and_back(base: str, run: str, tmp_path: Path) -> None:
    down = as_json("copy", f"{run}@20", f"{tmp_path}/disk/")
    up = as_json("copy", f"{tmp_path}/disk/step-00000020", f"{base}/archive/")
    assert up["path"] == f"{base}/archive/step-00000020"
    back = as_json("copy", up["path"], f"{tmp_path}/back/")
    assert down["num_files"] == up["num_files"] == back["num_files"] == 5
    first, last = (Path(report["path"]) for report in (down, back))
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files == {path.name: path.read_bytes() for path in last.iterdir()}
    with closing(open_storage(up["path"])) as storage:
        assert {info.key: storage.read(info.key) for info in storage.list("")} == files
    assert as_json("verify", up["path"])["ok"]


def test_plan(run: str) -> None:
    planned = as_json("plan", f"{run}@30", "--world-size", "3")
    assert len(planned["ranks"]) == 3
    assert sum(rank["needed_bytes"] for rank in planned["ranks"]) == planned["needed_bytes"] > 0


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_missing_bucket_is_one_line_of_advice(
    s3_environment: dict[str, str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*(argument.format("s3://no-such-bucket/run-001") for argument in arguments))
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.count("\n") == 1
    assert "never created here" in result.stderr


def test_wrong_credentials_are_one_line_of_advice(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "bm90IHRoZSByaWdodCBzZWNyZXQ"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    result = invoke("list", run)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "AWS_SECRET_ACCESS_KEY" in result.stderr
    assert secret not in result.stderr
    assert "AWS_SECRET_ACCESS_KEY" in as_json("list", run, code=1)["error"]["message"]


def test_a_wrong_address_is_told_in_seconds(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    result = invoke("list", run)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "AWS_ENDPOINT_URL" in result.stderr
