"""The model that a finished run leaves for others: that of its last step, alone, adapters merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcp_ckpt import open_checkpoint
from launch.model import GPT, MODEL_SIZES
from launch.train import main

SMALL = ("--model-size", "tiny", "--batch-size", "10", "--eval-iters", "1")


def test_a_finished_run_exports_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "model"
    flags = ["--run-dir", str(runs), "--export-final", str(out), *SMALL]
    for steps in (2, 3):  # extended: the export of before is replaced
        assert main(["--steps", str(steps), "--save-strategy", "epoch", *flags]) == 0
        assert f"exported the model of step {steps} to {out}" in capsys.readouterr().out
        exported = load_file(out / "model.safetensors")
        GPT(MODEL_SIZES["tiny"]).load_state_dict(exported)
        with open_checkpoint(f"{runs}/run-001@{steps}") as checkpoint:
            for name, tensor in exported.items():
                assert torch.equal(tensor, checkpoint.read_tensor(f"model.{name}")), name
    assert main(["--steps", "9", "--max-minutes", "0", *flags]) == 0
    assert "exported" not in capsys.readouterr().out  # it has not come to its last step
    assert main(["--steps", "1", "--lora-rank", "2", *flags]) == 0
    merged = load_file(out / "model.safetensors")
    GPT(MODEL_SIZES["tiny"]).load_state_dict(merged)
    with pytest.raises(SystemExit):
        main(["--save-strategy", "no", *flags])
    assert "--export-final" in capsys.readouterr().err
