"""What may be changed when a run goes on: every setting has a verdict, with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt.errors import StateMismatch
from launch.options import Options, parse_options
from launch.settings import RULES, changed_settings, require_allowed, tags_of

OF_ONE_START = {
    "run_dir",
    "name",
    "run_number",
    "list_runs",
    "resume",
    "log_json",
    "tensorboard",
    "export_final",
}

CHANGES: list[tuple[str, list[str], list[str], str]] = [
    ("steps", [], ["--steps", "400"], "safe"),
    ("parallel", ["--parallel", "ddp"], ["--parallel", "pp"], "safe"),
    ("grad_accum", [], ["--grad-accum", "4"], "safe"),
    ("workers", [], ["--workers", "2"], "safe"),
    ("compile", [], ["--compile"], "safe"),
    ("save_every", [], ["--save-every", "7"], "safe"),
    ("overlap", [], ["--overlap", "off"], "safe"),
    ("batch_size", [], ["--batch-size", "60"], "with care"),
    ("lr", [], ["--lr", "0.01"], "with care"),
    ("lr_steps", [], ["--lr-steps", "10"], "with care"),
    ("dropout", [], ["--dropout", "0.1"], "with care"),
    ("amp", [], ["--amp"], "with care"),
    ("amp", ["--amp", "fp16"], ["--amp", "bf16"], "with care"),
    ("amp", ["--amp", "bf16"], ["--amp", "fp16"], "refused"),
    ("model_size", [], ["--model-size", "tiny"], "refused"),
    ("seed", [], ["--seed", "1"], "refused"),
    ("lora_rank", [], ["--lora-rank", "4"], "refused"),
    ("lora_rank", ["--lora-rank", "4"], [], "refused"),
    ("lora_rank", ["--lora-rank", "4"], ["--lora-rank", "8"], "refused"),
]


def settings(arguments: list[str]) -> dict[str, Any]:
    return parse_options(arguments).as_json() | {"dataset": "digest"}


def test_every_setting_has_a_rule_or_belongs_to_one_start():
    recorded = {field.name for field in dataclasses.fields(Options)} | {"dataset"}
    ruled = {rule.partition("=")[0] for rule in RULES}
    assert ruled | OF_ONE_START == recorded
    assert not ruled & OF_ONE_START


@pytest.mark.parametrize(("name", "saved", "now", "verdict"), CHANGES)
def test_verdicts(name, saved, now, verdict):
    (change,) = changed_settings(settings(saved), settings(now))
    assert (change.name, change.verdict) == (name, verdict)
    assert (change.saved, change.now) == (settings(saved)[name], settings(now)[name])
    assert change.reason
    if verdict == "refused":
        with pytest.raises(StateMismatch, match=name):
            require_allowed([change], "runs/run-001")
    else:
        require_allowed([change], "runs/run-001")


def test_other_data_is_refused():
    with pytest.raises(StateMismatch, match="dataset digest -> other"):
        require_allowed(changed_settings(settings([]), settings([]) | {"dataset": "other"}), "runs/run-001")


def test_all_refusals_are_named_at_once_and_say_where():
    changes = changed_settings(
        settings([]), settings(["--seed", "3", "--model-size", "tiny", "--steps", "9"])
    )
    with pytest.raises(StateMismatch) as refused:
        require_allowed(changes, "runs/run-001")
    assert "seed 0 -> 3" in str(refused.value)
    assert "model_size small -> tiny" in str(refused.value)
    assert "steps" not in str(refused.value)
    assert "runs/run-001" in str(refused.value)


def test_equal_settings_and_those_of_one_start_are_no_change():
    assert changed_settings(settings([]), settings([])) == []
    now = settings(["--run-dir", "elsewhere", "--name", "x", "--resume", "must", "--log-json", "log"])
    assert changed_settings(settings([]), now) == []


def test_what_an_older_version_did_not_record_is_left_out():
    old = {name: value for name, value in settings([]).items() if name != "lora_rank"}
    assert changed_settings(old, settings(["--lora-rank", "4"])) == []


def test_checkpoints_are_tagged_with_what_changed_the_training():
    changes = changed_settings(settings([]), settings(["--lr", "0.01", "--amp", "--steps", "9"]))
    assert tags_of(changes) == ("lr=0.01", "amp=bf16")


def test_the_documented_table_is_that_of_the_rules():
    page = Path(__file__).resolve().parents[2] / "docs" / "driver.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    documented = [row for row in rows if row.count("|") == 4 and "--" not in row.split("|")[1]]
    assert documented == [f"| `{name}` | {verdict} | {reason} |" for name, (verdict, reason) in RULES.items()]
