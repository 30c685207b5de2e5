"""The driver's flags: what is refused, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.model import MODEL_SIZES
from launch.options import parse_options


@pytest.mark.parametrize(
    ("arguments", "here"),
    [
        (["--save-total-limit", "3"], "--keep-last"),
        (["--max_to_keep=3"], "--keep-last"),
        (["--save-top-k", "3"], "--keep-best"),
        (["--interval", "3"], "--save-every"),
        (["--checkpoint-dir", "x"], "--run-dir"),
    ],
)
def test_flags_of_other_trainers_are_answered_with_their_name_here(arguments, here, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"it is called {here}")


def test_a_checkpoint_to_resume_from():
    assert parse_options(["--resume", "runs/run-001@100"]).resume_ref == "runs/run-001@100"
    assert parse_options(["--resume", "ask"]).resume_ref is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "x"],
        ["--batch-size", "-1"],
        ["--max-minutes", "-1"],
        ["--max-minutes", "nan"],
        ["--epochs", "0"],
        ["--save-every-minutes", "0"],
        ["--mtbf-hours", "-2"],
        ["--save-at", "0"],
        ["--parallel", "magic"],
        ["--step", "3"],
        ["--run-number", "2", "--resume", "never"],
        ["--run-number", "2", "--resume", "runs/run-001@5"],
        ["--resume", "maybe"],
        ["--amp", "fp8"],
        ["--grad-accum", "0"],
        ["--workers", "-1"],
        ["--lora-rank", "0"],
    ],
)
def test_wrong_flag_is_refused_in_one_line_of_one_rank(arguments, capsys):
    for announce in (True, False):
        with pytest.raises(SystemExit) as stopped:
            parse_options(arguments, announce=announce)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == (1 if announce else 0)


def test_defaults_need_no_flag():
    options = parse_options([])
    assert (options.run_dir, options.resume, options.parallel) == ("runs", "auto", "fsdp")
    assert all(options.batch_size % world_size == 0 for world_size in (1, 2, 3, 4, 5, 6, 8))
    assert options.model_size in MODEL_SIZES
    assert options.saves
    assert options.overlap == "step"
    assert parse_options(["--overlap", "off"]).overlap == "off"


def test_bare_amp_means_bfloat16():
    assert parse_options([]).amp is None
    assert parse_options(["--amp"]).amp == "bf16"
    assert parse_options(["--amp", "fp16", "--compile"]).amp == "fp16"


def test_options_are_recorded_as_json():
    options = parse_options(["--log-json", "logs/a.jsonl", "--save-strategy", "no"])
    assert not options.saves
    assert options.log_json == Path("logs/a.jsonl")
    assert json.loads(json.dumps(options.as_json()))["log_json"] == "logs/a.jsonl"


def test_every_model_size_can_be_chosen():
    assert [parse_options(["--model-size", size]).model_size for size in MODEL_SIZES] == list(MODEL_SIZES)
