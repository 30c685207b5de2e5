"""What an open checkpoint holds, as far as it can be exported.

Reads tables and values, no tensors. Called by `ops.export`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dcp_ckpt.format.fragment import TensorEntry, ValueEntry
from dcp_ckpt.format.references import referenced_names
from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.load.source import Source
from dcp_ckpt.ops.checkpoint import Checkpoint
from dcp_ckpt.ops.exporting.plan import Contents

__all__ = ["read_contents"]


def read_contents(
    checkpoint: Checkpoint, source: Source, *, with_values: bool
) -> tuple[Contents, dict[str, Any]]:
    """What all ranks had in common; of values of single ranks only the names.

    Args:
        source: the tables of `checkpoint`.
        with_values: read the values, too; without, only their names.

    Returns:
        The contents, and by name the values as Python objects.

    Raises:
        CorruptCheckpoint: tables or a value are damaged.
    """
    names = [name for name in source.names() if name not in source.tensors]
    values, left_out = _values(checkpoint, names) if with_values else ({}, {})
    contents = Contents(
        tensors=source.tensors,
        aliases={other: name for name, others in checkpoint.aliases.items() for other in others},
        values=tuple(values) if with_values else tuple(names),
        paths=_paths(checkpoint, source),
        left_out=left_out,
    )
    return contents, values


def _paths(checkpoint: Checkpoint, source: Source) -> Mapping[str, FlatPath]:
    if source.flat_paths is not None:
        return source.flat_paths
    entries: dict[str, TensorEntry | ValueEntry] = {**source.tensors, **checkpoint.values}
    return {name: tuple(entry.path) for name, entry in entries.items()}


def _values(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values, and for those that cannot stand alone the reason."""
    values: dict[str, Any] = {}
    left_out = dict(checkpoint.unreadable)
    for name in names:
        if name in left_out:
            continue
        value = checkpoint.read_value(name)
        if referenced_names(value):
            left_out[name] = "not a value that stands alone: tensors are inside of it"
        else:
            values[name] = value
    return values, left_out | dict.fromkeys(checkpoint.per_rank_names, "of single ranks")
