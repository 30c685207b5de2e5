"""What the ranks of the pool do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcp_ckpt import CheckpointConfig, Checkpointer, load_checkpoint
from tests.layouts.models import Layout
from tests.layouts.training import blank, differing, trained

__all__ = ["CONFIG", "STEP", "load_all", "save_all"]

CONFIG = CheckpointConfig(keep=None, timeout_seconds=40.0)
STEP = "step-00000001"


def save_all(base: str, layouts: Sequence[str], recipe: str = "adamw") -> None:
    """Save the model in every layout of this world, each as a run of its own."""
    for name in layouts:
        with Checkpointer(Path(base, name), config=CONFIG) as checkpointer:
            checkpointer.save(trained(Layout(name), recipe), step=1).result(40)


def load_all(
    base: str, pairs: Sequence[tuple[str, str]], recipe: str = "adamw"
) -> dict[tuple[str, str], list[str]]:
    """Load pairs of layouts (saved in, loaded into), and say what is not right on this rank."""
    right: dict[str, tuple[Layout, Any]] = {}
    found = {}
    for number, (saved, loaded) in enumerate(pairs):
        if loaded not in right:
            layout = Layout(loaded)
            right[loaded] = layout, trained(layout, recipe)
        layout, expected = right[loaded]
        state = blank(layout, recipe, stepped=number % 2 == 0)
        report = load_checkpoint(Path(base, saved, STEP), state, config=CONFIG)
        found[saved, loaded] = differing(state, expected) + list(report.skipped)
    return found
