"""When the driver saves: epochs, listed steps and the last step, and how a run of epochs is extended."""

from __future__ import annotations

from pathlib import Path

from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.storage import open_storage
from launch.options import parse_options
from launch.train import when_to_save
from tests.distributed.driver import SMALL_CORPUS_BYTES, trained


def saved_steps(directory: Path) -> list[int]:
    return [entry.step for entry in read_catalogue(open_storage(directory / "runs" / "run-001")).entries]


def test_epochs_listed_steps_and_the_last_one_are_saved(tmp_path, capfd):
    """An epoch has seven steps; one with larger batches fewer, and it ends with a save all the same."""
    flags = ("--save-strategy", "epoch", "--save-every", "1", "--keep-last", "9", "--save-at", "3", "10")
    trained(str(tmp_path), SMALL_CORPUS_BYTES, *flags, "--epochs", "2")
    assert saved_steps(tmp_path) == [3, 7, 10, 14]
    assert "to extend this run: --epochs 4" in capfd.readouterr().out
    trained(str(tmp_path), SMALL_CORPUS_BYTES, *flags, "--epochs", "3", "--batch-size", "31")
    assert saved_steps(tmp_path) == [3, 7, 10, 14, 16]


def test_the_rule_is_the_sum_of_the_flags():
    rule = when_to_save(parse_options(["--save-every-minutes", "2", "--mtbf-hours", "4"]))
    assert repr(rule) == (
        "AnyOf(EverySteps(n=50), AtLastStep(), EverySeconds(seconds=120.0), "
        "Young(mtbf_seconds=14400.0, max_overhead=0.05, first_seconds=60.0))"
    )
