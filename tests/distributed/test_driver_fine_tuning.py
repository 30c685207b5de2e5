"""Runs that begin from others, on several ranks: fine-tuning, which leaves its base unchanged, and forks."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from dcp_ckpt import export, list_runs, open_checkpoint, open_run
from dcp_ckpt.errors import StateMismatch
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.distributed.driver import SMALL_CORPUS_BYTES, chosen, events, steps, trained

pytestmark = pytest.mark.distributed


def weights(ref: str) -> dict[str, torch.Tensor]:
    """The tensors of the model in a checkpoint."""
    with open_checkpoint(ref) as checkpoint:
        return {key: checkpoint.read_tensor(key) for key in checkpoint.tensors if key.startswith("model.")}


def optimized(ref: str) -> set[str]:
    """The parameters that the optimizer in a checkpoint knows."""
    with open_checkpoint(ref) as checkpoint:
        (group,) = checkpoint.read_value("optimizer.param_groups")
    return set(group["params"])


def test_a_run_is_fine_tuned_in_a_run_of_its_own(pool, tmp_path):
    base, tuned = (str(tmp_path / "runs" / name) for name in ("run-001", "run-002"))

    def start(world_size: int, *flags: str) -> None:
        pool.run(trained, world_size, str(tmp_path), SMALL_CORPUS_BYTES, "--save-every", "2", *flags)

    start(4, "--steps", "3", "--parallel", "fsdp+tp")
    lora = ("--lora-rank", "2", "--parallel", "hsdp", "--dropout", "0.1")
    start(2, *lora, "--steps", "2", "--name", "tuned")
    start(2, *lora, "--steps", "5")

    runs = list_runs(tmp_path / "runs")
    assert [run.name for run in runs] == [None, "tuned"]
    parent = runs[1].document.parent
    assert parent is not None
    assert (parent.run, parent.run_id, parent.step) == ("run-001", runs[0].run_id, 3)
    assert [event["step"] for event in events(tmp_path, "resume")] == [2]
    assert [step for step, *_ in steps(tmp_path)] == [1, 2, 3, 1, 2, 3, 4, 5]

    before, after = weights(f"{base}@latest"), weights(f"{tuned}@latest")
    adapters = after.keys() - before.keys()
    assert len(adapters) == 2 * 4 * 3
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(after[key].any() for key in adapters), "adapters were trained"
    trainable = {key.removeprefix("model.") for key in adapters if not key.endswith("lora_scale")}
    assert optimized(f"{tuned}@latest") == trainable

    with open_checkpoint(f"{tuned}@latest") as checkpoint:
        base_bytes = sum(tensor.nbytes for tensor in before.values())
        assert checkpoint.manifest.shared_bytes >= base_bytes, "the base was written once"
    export(f"{tuned}@latest", tmp_path / "merged.pt", format="torch", fuse_lora=True)
    merged = torch.load(tmp_path / "merged.pt")
    assert {f"model.{name}" for name in merged} == before.keys()
    for name in ("blocks.0.attention.qkv", "blocks.1.mlp_out"):
        scale, b, a = (after[f"model.{name}.lora_{part}"] for part in ("scale", "b", "a"))
        torch.testing.assert_close(merged[f"{name}.weight"], before[f"model.{name}.weight"] + scale * b @ a)

    with pytest.raises(StateMismatch, match="lora_rank 2 -> 4"):
        start(2, "--lora-rank", "4")
    with pytest.raises(StateMismatch, match="lora_rank 2 -> none"):
        start(2)
    start(2, "--lora-rank", "4", "--run-number", "1", "--steps", "1")
    assert [run.document.config["lora_rank"] for run in list_runs(tmp_path / "runs")] == [None, 2, 4]


def test_a_fine_tuning_that_died_before_its_first_save_begins_from_its_base_again(pool, tmp_path):
    for flags in (("--steps", "2"), ("--lora-rank", "2", "--steps", "3", "--save-strategy", "no")):
        pool.run(trained, 2, str(tmp_path), SMALL_CORPUS_BYTES, *flags)
    pool.run(trained, 2, str(tmp_path), SMALL_CORPUS_BYTES, "--lora-rank", "2", "--steps", "3")
    assert len(list_runs(tmp_path / "runs")) == 2
    first, again = steps(tmp_path)[2:5], steps(tmp_path)[5:]
    assert first == again
    base, tuned = (weights(str(tmp_path / f"runs/run-00{number}@latest")) for number in (1, 2))
    assert all(torch.equal(tuned[key], base[key]) for key in base)


def test_an_answer_and_a_fork_choose_one_run_on_all_ranks(pool, tmp_path):
    run = open_run(tmp_path / "runs")
    with closing(open_storage(run.path)) as storage:
        for save, step in ((1, 2), (2, 4)):
            write_tiny_checkpoint(storage, step=step, save=save, run_id=run.run_id)

    def choice(num_ranks, answer, *flags):
        (one,) = set(pool.run(chosen, num_ranks, str(tmp_path), answer, *flags))
        return one

    first = ("--run-number", "1", "--resume")
    assert choice(2, "y\n", *first, "ask") == (1, False, None)
    assert choice(4, "yes\n", *first, "ask") == (1, False, None)
    assert choice(2, "\n", *first, "ask") == (2, True, None)
    assert choice(4, None, *first, "ask") == (3, True, None)
    assert choice(2, None, "--resume", f"{run.path}@4") == (1, False, None)
    assert choice(4, None, "--resume", f"{run.path}@2") == (4, True, 2)
