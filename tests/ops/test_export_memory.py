"""Memory of an export: the largest tensor and little more, however large the checkpoint is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.exports import saved

MIB = 1 << 20
LARGEST_BYTES = 36 * MIB
NUM_LARGE = 5
BESIDE_BYTES = 40 * MIB  # another one of the largest would be more, with what is needed anyway

PROGRAM = """
import json, sys
import torch
import torch.distributed.checkpoint.state_dict_loader
import dcp_ckpt.load.fill
from dcp_ckpt import export

def now(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) << 10

torch.set_num_threads(1)
ref, out = sys.argv[1:]
peaks = {}
for name, options in json.loads(sys.stdin.read()).items():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = now("VmRSS")
    export(ref, f"{out}/{name}", **options)
    peaks[name] = now("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of five large layers, one with an adapter, and many small ones."""
    torch.manual_seed(0)
    layers = {f"layers.{number}.weight": torch.randn(3072, 3072) for number in range(NUM_LARGE)}
    assert layers["layers.0.weight"].nbytes == LARGEST_BYTES
    adapter = {
        "layers.0.lora_a": torch.randn(4, 3072),
        "layers.0.lora_b": torch.randn(3072, 4),
        "layers.0.lora_scale": torch.tensor(0.5),
    }
    small = {f"small.{number}": torch.randn(64, 64) for number in range(500)}
    return saved(tmp_path_factory.mktemp("run"), {"model": {**layers, **adapter, **small}})


def test_peak_memory_is_that_of_the_largest_tensor(ref: str, tmp_path: Path) -> None:
    three = {"include": "model.layers.[012].*"}
    ways = {
        "plain": {"max_shard_bytes": 2 * LARGEST_BYTES},
        "converted": {"dtype": "bf16", **three},
        "fused": {"fuse_lora": True, **three},
        "model.pt": {"format": "torch", **three},
        "dcp": {"format": "dcp", **three},
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ref, str(tmp_path)],
        input=json.dumps(ways), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert peaks.keys() == ways.keys()
    too_much = {name: peak / MIB for name, peak in peaks.items() if peak > LARGEST_BYTES + BESIDE_BYTES}
    assert not too_much, f"MiB at the peak: {too_much}"
