"""Memory of diff, import and average: some windows, however large a tensor or the checkpoint is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from tests.ops.exports import saved

MIB = 1 << 20
LARGEST_BYTES = 96 * MIB
BESIDE_BYTES = 90 * MIB  # less than the tensor: windows, what they are converted to, buffers

PROGRAM = """
import json, sys
import torch
import torch.distributed.checkpoint.state_dict_loader
import dcp_ckpt.load.fill, dcp_ckpt.save.data_stream, dcp_ckpt.save.dcp_metadata
from dcp_ckpt import average, diff, import_checkpoint

def now(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) << 10

torch.set_num_threads(1)
base = sys.argv[1]
a, b = f"{base}/a@10", f"{base}/b@10"
ways = {
    "diff": lambda: diff(a, b),
    "average": lambda: average([a, b], f"{base}/mean", step=1),
    "dcp": lambda: import_checkpoint(f"{base}/stock", f"{base}/imported", step=1),
    "safetensors": lambda: import_checkpoint(f"{base}/x.safetensors", f"{base}/imported", step=2),
}
peaks = {}
for name, way in ways.items():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = now("VmRSS")
    way()
    peaks[name] = now("VmHWM") - before
print(json.dumps(peaks))
"""


def test_peak_memory_is_that_of_some_windows(tmp_path: Path) -> None:
    state = {"large": torch.ones(4096, 6144)}
    assert state["large"].nbytes == LARGEST_BYTES
    saved(tmp_path / "a", state)
    stock_save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    save_file(state, tmp_path / "x.safetensors")
    state["large"] += 1
    saved(tmp_path / "b", state)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert set(peaks) == {"diff", "average", "dcp", "safetensors"}
    too_much = {name: peak / MIB for name, peak in peaks.items() if peak > BESIDE_BYTES}
    assert not too_much, f"MiB at the peak: {too_much}"
