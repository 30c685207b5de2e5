"""Several models and several optimizers in one state, also where parts of a model lack some of them."""

from __future__ import annotations

import pytest

from dcp_ckpt import open_checkpoint
from tests.layouts.models import Layout
from tests.layouts.programs import STEP, load_all, save_all

pytestmark = pytest.mark.distributed

PAIRS = [
    ("fsdp4", "pp4"),
    ("pp4", "fsdp4"),
    ("pp4", "alone"),
    ("pp4", "pp2.fsdp2"),
    ("alone", "pp2.fsdp2"),
    ("fsdp4", "ddp3"),
]


@pytest.mark.parametrize("recipe", ["muon", "backward", "gan"])
def test_every_optimizer_comes_back_on_another_layout(pool, tmp_path, recipe):
    for layout in sorted({saved for saved, _ in PAIRS}):
        pool.run(save_all, Layout(layout).world_size, str(tmp_path), [layout], recipe)
    for loaded in sorted({loaded for _, loaded in PAIRS}):
        pairs = [pair for pair in PAIRS if pair[1] == loaded]
        for found in pool.run(load_all, Layout(loaded).world_size, str(tmp_path), pairs, recipe):
            assert {pair: names for pair, names in found.items() if names} == {}
    checkpoints = [open_checkpoint(tmp_path / layout / STEP) for layout in ("fsdp4", "pp4")]
    names = [{*checkpoint.keys()} for checkpoint in checkpoints]
    assert names[0] == names[1] - {"mesh_roles"}
    for checkpoint in checkpoints:
        checkpoint.close()
