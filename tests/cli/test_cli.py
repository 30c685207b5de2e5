"""The command line: what it prints, its exit codes, and that it starts without heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dcp_ckpt.cli.main import cli
from dcp_ckpt.cli.output import column_widths, exit_code, human_bytes, print_table, printable, short_json_pair
from dcp_ckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    Fenced,
    FormatTooNew,
    StateMismatch,
    StorageError,
)
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.runs import RunParent, open_run
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

STEP_10 = "step-00000010"
DATA_1 = "__1_0.e0001-s000001.distcp"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two runs; the first has two checkpoints, one attempt without a manifest, a pin and a bad mark."""
    run = open_run(tmp_path, name="exp")
    storage = open_storage(run.path)
    for step, loss in ((10, 0.25), (20, 1 / 3), (30, float("nan"))):
        write_tiny_checkpoint(
            storage, step=step, run_id=run.run_id, metrics={"loss": loss}, tags=["t"] if step == 10 else []
        )
    write_tiny_checkpoint(storage, step=40, run_id=run.run_id, commit=False)
    for step, kind in ((10, "pin"), (30, "bad")):
        write_mark(storage, StepDir(step), kind=kind, epoch=1, step=step, attempt="e0001-s000001")  # type: ignore[arg-type]
    open_run(tmp_path, resume="never")
    return tmp_path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def as_json(*arguments: str | Path, code: int = 0) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_list_golden(base: Path) -> None:
    result = invoke("list", base / "run-001")
    assert result.exit_code == 0
    created = "2026-01-01 00:00:00"
    assert result.stdout.splitlines() == [
        f"step  directory      epoch  created (UTC){' ' * 6}  world  bytes     metrics        tags  marks",
        f"10    step-00000010  1      {created}  2      12.0 KiB  loss=0.25      t     pinned",
        f"20    step-00000020  1      {created}  2      12.0 KiB  loss=0.333333        latest",
        f"30    step-00000030  1      {created}  2      12.0 KiB  loss=nan             bad",
        "not a checkpoint: step-00000040: no manifest: the save is not finished, has failed, or was removed",
    ]


def test_list_json_is_complete_and_exact(base: Path) -> None:
    document = as_json("list", base / "run-001")
    assert document["latest"] == "step-00000020"
    assert document["run"]["name"] == "exp"
    assert document["checkpoints"][1] == {
        "directory": "step-00000020",
        "step": 20,
        "epoch": 1,
        "created_at": "2026-01-01T00:00:00.000000Z",
        "world_size": 2,
        "bytes": 12288,
        "written_bytes": 12288,
        "metrics": {"loss": 1 / 3},
        "tags": [],
        "bad": False,
        "pinned": False,
        "suspect": None,
    }
    assert document["checkpoints"][2]["metrics"] == {"loss": {"$float": "nan"}}
    assert document["rejected"][0]["state"] == "uncommitted"


def test_a_run_without_checkpoints_is_no_error(base: Path) -> None:
    result = invoke("list", base / "run-002")
    assert (result.exit_code, result.stdout) == (0, "no checkpoints\n")


def test_runs(base: Path) -> None:
    document = as_json("runs", base)
    assert [(run["number"], run["checkpoints"], run["latest_step"]) for run in document["runs"]] == [
        (1, 3, 20),
        (2, 0, None),
    ]
    lines = invoke("runs", base).stdout.splitlines()
    assert lines[0].split() == [
        "run",
        "name",
        "created",
        "(UTC)",
        "checkpoints",
        "latest",
        "step",
        "best",
        "bytes",
        "host",
    ]
    assert lines[1].split()[:2] == ["1", "exp"]


def test_inspect_golden(base: Path) -> None:
    result = invoke("inspect", f"{base}/run-001@10", "--stats")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(
        "\n"
        "tensor        dtype     shape   placements  bytes  min  max  mean  non-finite\n"
        "model.bias    bfloat16  3       whole       6 B    -1   2    0.5   0\n"
        "model.count   int64     scalar  whole       8 B    7    7    7     0\n"
        "model.empty   float32   0x2     whole       0 B                    0\n"
        "model.weight  float32   6x4     S0 on 2     96 B   0    23   11.5  0\n"
        "\n"
        "value           content\n"
        'optim.betas     {"$tuple":[0.9,0.999]}\n'
        "optim.lr        0.001\n"
        'optim.schedule  {"epoch":2,"warm":true}\n'
    )
    assert "step        10 (epoch 1, attempt e0001-s000001)\n" in result.stdout
    assert "tags        t\n" in result.stdout


def test_inspect_json_and_key(base: Path) -> None:
    document = as_json("inspect", base / "run-001" / STEP_10, "--key", "*.w*")
    assert document["tensors"] == [
        {
            "name": "model.weight",
            "aliases": [],
            "dtype": "float32",
            "shape": [6, 4],
            "placements": ["S0"],
            "mesh_shape": [2],
            "bytes": 96,
        }
    ]
    assert document["values"] == {}
    assert document["run"]["number"] == 1
    assert document["step"] == 10


def test_verify(base: Path) -> None:
    result = invoke("verify", base / "run-001")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].startswith("ok step-00000010: 5 files, ")
    assert result.stdout.endswith("3 checked, 0 damaged\n")

    path = base / "run-001" / STEP_10 / DATA_1
    path.write_bytes(b"x" + path.read_bytes()[1:])
    result = invoke("verify", f"{base}/run-001@10")
    assert result.exit_code == 4
    assert result.stdout == (
        f"DAMAGED {STEP_10}/{DATA_1}: block 0, bytes 0 to 4096: differs from its digest; "
        "touches tensor model.count, tensor model.weight\n"
        "1 checked, 1 damaged\n"
    )
    document = as_json("verify", base / "run-001", code=4)
    assert document["ok"] is False
    (problem,) = document["checkpoints"][0]["problems"]
    assert problem["tensors"] == ["model.count", "model.weight"]
    assert [one["directory"] for one in document["skipped"]] == ["step-00000040"]


def test_recover_commits_what_was_finished(base: Path) -> None:
    document = as_json("recover", base / "run-001")
    assert document["committed"] == ["step-00000040"]
    assert as_json("list", base / "run-001")["latest"] == "step-00000040"
    again = invoke("recover", base / "run-001")
    assert again.exit_code == 0
    assert again.stdout.startswith("nothing to recover (epoch ")


@pytest.mark.parametrize("command", ["list", "recover", "runs", "verify", "inspect"])
def test_what_does_not_exist_is_exit_3_and_is_not_made(tmp_path: Path, command: str) -> None:
    target = tmp_path / "none"
    result = invoke(command, target)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("dcp-ckpt: ")
    assert result.stderr.count("\n") == 1
    document = as_json(command, target, code=3)
    assert document["error"]["type"] == "CheckpointNotFound"
    assert document["error"]["exit_code"] == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("list", "{base}"), "not a run, but a directory of runs: name one of them, as {base}/run-002 "),
        (("recover", "{base}/run-001/step-00000010"), "not a run, but a checkpoint: name the run around it "),
        (("watch", "{base}/none"), "not a run: nothing is there "),
        (("runs", "{base}/run-001"), "this is a run itself: dcp-ckpt list {base}/run-001 "),
    ],
)
def test_what_is_no_run_is_told_with_what_it_is(base: Path, arguments: list[str], answer: str) -> None:
    result = invoke(*(argument.format(base=base) for argument in arguments))
    assert result.exit_code == 3
    assert answer.format(base=base) in result.stderr


def test_a_name_that_matches_nothing_is_no_empty_table(base: Path) -> None:
    result = invoke("inspect", f"{base}/run-001@10", "--key", "nope*")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "key 'nope*' matches nothing; the checkpoint holds model.bias, " in result.stderr


def test_the_best_checkpoint_is_marked_and_forks_say_where_they_come_from(tmp_path: Path) -> None:
    run = open_run(tmp_path, config={"monitor": "loss", "mode": "min"})
    storage = open_storage(run.path)
    for step, loss in ((10, 0.1), (20, 0.2)):
        write_tiny_checkpoint(storage, step=step, run_id=run.run_id, metrics={"loss": loss})
    marks = [line.split()[-1] for line in invoke("list", run.path).stdout.splitlines()]
    assert marks == ["marks", "best", "latest"]
    assert as_json("list", run.path)["best"] == "step-00000010"
    assert "from" not in invoke("runs", tmp_path).stdout
    parent = RunParent(run="run-001", run_id=run.run_id, epoch=1, step=10)
    open_run(tmp_path, resume="never", parent=parent)
    assert "run-001@10" in invoke("runs", tmp_path).stdout


def test_values_that_differ_late_are_shown_where_they_differ() -> None:
    history = [number / 7 for number in range(20)]
    a, b = short_json_pair(history, [*history, 0.5])
    assert a != b
    assert max(len(a), len(b)) <= 60
    assert b.endswith(",0.5]")
    assert short_json_pair(1, [2]) == ("1", "[2]")


def test_corrupt_is_exit_4(base: Path) -> None:
    (base / "run-001" / STEP_10 / "manifest.json").write_bytes(b"{}")
    for ref in (f"{base}/run-001@10", base / "run-001" / STEP_10):
        result = invoke("inspect", ref)
        assert result.exit_code == 4
        assert "manifest.json" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["unknown"], ["list"], ["inspect", "a", "b"], ["verify", "--fast", "r"]]
)
def test_wrong_usage_is_exit_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_a_reference_that_says_too_little_is_exit_2(base: Path) -> None:
    assert invoke("inspect", f"{base}/run-001@best").exit_code == 2
    assert as_json("inspect", f"{base}/run-001@best:loss:min")["step"] == 10


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError, 1),
        (FormatTooNew, 1),
        (Fenced, 1),
        (ConfigError, 2),
        (CheckpointNotFound, 3),
        (CorruptCheckpoint, 4),
        (StateMismatch, 5),
    ],
)
def test_exit_codes(error: Any, code: int) -> None:
    assert exit_code(error("x")) == code


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        assert f"  {name} " in result.stdout
        assert invoke(name, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_human_bytes(num_bytes: int, text: str) -> None:
    assert human_bytes(num_bytes) == text


HEAVY = """
import runpy, sys
sys.argv = ["dcp-ckpt", *sys.argv[1:]]
try:
    runpy.run_module("dcp_ckpt", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
found = sorted({"torch", "numpy", "rich", "fsspec"} & set(sys.modules))
assert not found, found
"""


@pytest.mark.parametrize("command", ["--help", "runs", "list", "inspect", "verify", "recover"])
def test_commands_run_without_torch_numpy_and_rich(base: Path, command: str) -> None:
    target = {
        "--help": [], "runs": [str(base)], "inspect": [f"{base}/run-001@latest"],
    }.get(command, [str(base / "run-001")])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, command, *target],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_terminal_gets_a_drawn_table(base: Path) -> None:
    reader, terminal = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "dcp_ckpt", "list", str(base / "run-001")],
            stdout=terminal,
            env={**os.environ, "COLUMNS": "200", "TERM": "xterm"},
            timeout=60,
            check=True,
        )
        shown = os.read(reader, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(reader)
    assert "───" in shown
    assert "step-00000020" in shown


def test_names_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [("\x1b[2J",)])
    assert capsys.readouterr().out == "name\n\\x1b[2J\n"
    assert printable("model.é.weight 重み") == "model.é.weight 重み"
    assert printable("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"


def test_tables_fold_long_cells_and_never_cut_them() -> None:
    lines = [("tensor", "time", "n"), ("a" * 40, "2026-01-01 00:00:00", "12 of 12"), ("b", "", "")]
    natural = [40, 19, 8]
    assert column_widths(lines, 200) == natural
    assert column_widths(lines, sum(natural) + 6) == natural
    assert column_widths(lines, 60) == [36, 10, 8]  # times at the space, names anywhere, short cells never
    assert column_widths(lines, 20) == [24, 10, 8]  # the terminal breaks what is longer
    assert column_widths([("a", "b")], 80) == [1, 1]


def test_the_shell_completes_commands_and_options() -> None:
    def completed(*words: str) -> set[str]:
        shown = subprocess.run(
            [Path(sys.executable).parent / "dcp-ckpt"],
            env={
                **os.environ,
                "_DCP_CKPT_COMPLETE": "bash_complete",
                "COMP_WORDS": " ".join(("dcp-ckpt", *words)),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        return {line.partition(",")[2] for line in shown.splitlines()}

    assert {"pin", "plan", "prune"} <= completed("p")
    assert "--keep-last" in completed("prune", "--keep")
