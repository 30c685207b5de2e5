"""`dcp-ckpt prune`, `pin` and `unpin`: what they say, what they do, and what they never do by a slip."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dcp_ckpt.storage import open_storage
from tests.cli.commands import as_json, invoke, small_run

NO_GRACE = ("--grace-seconds", "0")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path)


def steps(run: Path) -> list[int]:
    return [checkpoint["step"] for checkpoint in as_json("list", run)["checkpoints"]]


def tree(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_dry_run_golden(run: Path) -> None:
    before = tree(run)
    result = invoke("prune", run, "--keep-last", "1", "--keep-every", "20", "--dry-run")
    assert result.exit_code == 0, result.output
    removed = "not kept by AnyOf(LatestN(n=1), EveryNSteps(n=20))"
    size = as_json("prune", run, "--keep-last", "1", "--dry-run")["removed"][0]["bytes"] / 1024
    assert result.stdout.splitlines() == [
        "step  directory      epoch  bytes     verdict  reason",
        f"10    step-00000010  1      {size:.1f} KiB  remove   {removed}",
        f"20    step-00000020  1      {size:.1f} KiB  keep     every 20 steps",
        f"30    step-00000030  1      {size:.1f} KiB  remove   {removed}",
        f"40    step-00000040  1      {size:.1f} KiB  keep     every 20 steps",
        f"50    step-00000050  1      {size:.1f} KiB  keep     newest valid, among the latest 1",
        f"3 to keep, 2 to remove, {2 * size:.1f} KiB to free; nothing was touched",
    ]
    assert tree(run) == before, "not even an epoch is claimed"


def test_it_does_what_the_dry_run_says(run: Path) -> None:
    options = ("--keep-best", "2", "--monitor", "loss", "--mode", "min")
    planned = as_json("prune", run, *options, "--dry-run")
    done = as_json("prune", run, *options, *NO_GRACE)
    for key in ("kept", "removed", "freed_bytes"):
        assert done[key] == planned[key]
    assert [(planned["dry_run"], planned["epoch"]), (done["dry_run"], done["epoch"])] == [
        (True, None),
        (False, 2),
    ]
    assert steps(run) == [20, 30, 50], "of 10 and 30, equally good, the newer; and 50, the newest"
    assert not (run / "step-00000010").exists()


def test_it_says_what_it_did(run: Path) -> None:
    result = invoke("prune", run, "--keep-last", "4", *NO_GRACE)
    lines = result.stdout.splitlines()
    assert lines[1].split()[:2] == ["10", "step-00000010"]
    assert " removed " in lines[1]
    assert " kept " in lines[2]
    assert lines[-1].startswith("4 kept, 1 removed, ")
    assert lines[-1].endswith("KiB freed (epoch 2)")
    again = invoke("prune", run, "--keep-last", "4", *NO_GRACE)
    assert again.stdout.splitlines()[-1] == "4 kept, 0 removed, 0 B freed (epoch 3)"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--keep-last", "0"],
        ["--keep-last", "-1"],
        ["--keep-every", "x"],
        ["--keep-best", "1"],
        ["--keep-best", "1", "--monitor", "loss"],
        ["--keep-best", "1", "--mode", "min"],
        ["--keep-last", "1", "--monitor", "loss"],
        ["--monitor", "loss", "--mode", "min"],
        ["--keep-last", "1", "--grace-seconds", "-1"],
    ],
    ids=" ".join,
)
def test_saying_too_little_or_nonsense_is_exit_2_and_removes_nothing(run: Path, options: list[str]) -> None:
    before = tree(run)
    result = invoke("prune", run, *options)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert tree(run) == before


def test_a_mistyped_metric_removes_nothing(run: Path) -> None:
    result = invoke("prune", run, "--keep-best", "1", "--monitor", "los", "--mode", "min")
    assert result.exit_code == 2
    assert "'los'" in result.stderr
    assert "metrics: loss" in result.stderr
    assert steps(run) == [10, 20, 30, 40, 50]


def test_a_run_that_lives_is_left_alone(run: Path) -> None:
    with open_storage(run).hold_lease("epochs/00000001.lease"):
        result = invoke("prune", run, "--keep-last", "1")
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert steps(run) == [10, 20, 30, 40, 50]
        assert invoke("prune", run, "--keep-last", "1", "--dry-run").exit_code == 0
        assert invoke("prune", run, "--keep-last", "1", "--force", *NO_GRACE).exit_code == 0
    assert steps(run) == [50]


def test_an_empty_run_is_no_error(run: Path) -> None:
    for step in run.glob("step-*"):
        shutil.rmtree(step)
    result = invoke("prune", run, "--keep-last", "1", *NO_GRACE)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "no checkpoints")


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_no_run_is_exit_3_and_is_not_made(tmp_path: Path, dry_run: bool) -> None:
    options = ["--dry-run"] if dry_run else []
    assert invoke("prune", tmp_path / "none", "--keep-last", "1", *options).exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_pin_is_kept_by_prune_until_it_is_taken_back(run: Path) -> None:
    first = invoke("pin", f"{run}@10", "--reason", "results of the paper")
    assert (first.exit_code, first.stdout) == (0, f"pinned {run}/step-00000010\n")
    again = invoke("pin", run / "step-00000010", "--reason", "other")
    assert again.stdout == f"{run}/step-00000010 was pinned already (results of the paper)\n"
    assert invoke("prune", run, "--keep-last", "1", *NO_GRACE).exit_code == 0
    assert steps(run) == [10, 50]
    assert invoke("unpin", f"{run}@10").stdout == f"unpinned {run}/step-00000010\n"
    assert invoke("unpin", f"{run}@10").stdout == f"{run}/step-00000010 was not pinned\n"
    assert invoke("prune", run, "--keep-last", "1", *NO_GRACE).exit_code == 0
    assert steps(run) == [50]


def test_pin_json(run: Path) -> None:
    pinned = {"run": str(run), "directory": "step-00000050", "step": 50, "epoch": 1, "pinned": True}
    assert as_json("pin", f"{run}@latest", "--reason", "why") == {**pinned, "changed": True, "reason": "why"}
    assert as_json("pin", f"{run}@latest") == {**pinned, "changed": False, "reason": "why"}
    unpinned = {**pinned, "pinned": False, "reason": None}
    assert as_json("unpin", f"{run}@latest") == {**unpinned, "changed": True}
    assert as_json("unpin", f"{run}@latest") == {**unpinned, "changed": False}


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_what_is_no_checkpoint_of_a_run_cannot_be_pinned(run: Path, command: str, tmp_path: Path) -> None:
    shutil.copytree(run / "step-00000010", tmp_path / "copy")
    before = tree(tmp_path)
    for ref in (f"{run}@60", tmp_path / "none", tmp_path / "copy", run):
        result = invoke(command, ref)
        assert result.exit_code == 3, result.output
        assert result.stdout == ""
    assert tree(tmp_path) == before
