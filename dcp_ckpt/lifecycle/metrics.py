"""Metrics of checkpoints: how they are stored, and those that arrive after the commit.

The mark `metrics` is described in docs/format.md, section 11.

Called by the saver for the metrics of a save, and by the checkpointer for later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.suspicion import mark_if_suspect
from dcp_ckpt.policies import SuspectPolicy
from dcp_ckpt.storage.base import Storage

__all__ = ["add_metrics", "encode_metrics", "plain_metrics"]


def encode_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as typed JSON; 0-dim tensors and numpy numbers become the Python numbers that they hold.

    Raises:
        StateError: a value that cannot be stored, by name.
    """
    plain = plain_metrics(metrics)
    return {name: encode_value(value, path=f"metrics[{name!r}]") for name, value in plain.items()}


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The same with 0-dim tensors and numpy numbers as the Python numbers that they hold."""
    return {name: _plain(value) for name, value in metrics.items()}


def add_metrics(
    storage: Storage,
    entry: CheckpointEntry,
    metrics: Mapping[str, Any],
    catalogue: Catalogue,
    suspect_when: SuspectPolicy | None,
) -> None:
    """Add metrics to a committed checkpoint, or replace those of the same name, and look what they say.

    One rank calls it; blocks on storage.

    Args:
        entry: of `catalogue`, just read.

    Raises:
        ConfigError: there are none, or a name is no string.
        StateError: a value that cannot be stored.
        StorageError: they could not be written.
    """
    if not metrics or not all(isinstance(name, str) for name in metrics):
        raise ConfigError(f"metrics must be a mapping of names to numbers, not {metrics!r}")
    manifest = entry.manifest
    mark = write_mark(
        storage,
        entry.directory,
        kind="metrics",
        epoch=manifest.epoch,
        step=manifest.step,
        attempt=manifest.attempt,
        detail=encode_metrics(metrics),
    )
    entry = replace(entry, marks=(*entry.marks, mark))
    mark_if_suspect(storage, entry, catalogue, suspect_when)


def _plain(value: Any) -> Any:
    item: Callable[[], Any] | None = getattr(value, "item", None)
    return item() if callable(item) else value
