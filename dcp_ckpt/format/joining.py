"""Values of which several ranks store a part: what the parts have in common, and the whole.

A pipelined model's optimizer has its settings on every stage and other parameters on each (docs/format.md,
section 5). Pure, on encoded values. Called by whoever commits, which refuses parts that contradict each
other, and by whoever reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import ValueEntry

__all__ = ["EQUAL", "common_digest", "join_values"]

EQUAL = "equal"
"""The way to join parts that are all the same; any other is the key whose lists are put together."""

_Group = dict[str, Any]


def common_digest(entry: ValueEntry) -> str:
    """Equal for all parts of one value that can be joined."""
    if entry.join in (None, EQUAL):
        return digest(encode_json(entry.value))
    groups = _groups(entry)
    return digest(encode_json([_without(group, entry.join) for group in groups] if groups else entry.value))


def join_values(parts: Iterable[tuple[int, Mapping[str, ValueEntry]]]) -> dict[str, ValueEntry]:
    """The values of a checkpoint by name.

    Args:
        parts: each rank that stores values, in order, and what it stores.

    Raises:
        CorruptCheckpoint: the parts of a value contradict each other; the message names value, ranks and, in
            lists of groups, the setting.
    """
    found: dict[str, list[tuple[int, ValueEntry]]] = {}
    for rank, values in parts:
        for name, entry in values.items():
            found.setdefault(name, []).append((rank, entry))
    return {name: _joined(name, entries) for name, entries in found.items()}


def _joined(name: str, parts: Sequence[tuple[int, ValueEntry]]) -> ValueEntry:
    (first_rank, first), *others = parts
    for rank, entry in others:
        if first.join is None or entry.join != first.join or entry.path != first.path:
            raise _contradiction(f"{name} is stored by rank {first_rank} and by rank {rank}")
        if common_digest(entry) != common_digest(first):
            raise _contradiction(_difference(name, first_rank, first, rank, entry))
    if not others or first.join in (None, EQUAL):
        return first
    return replace(first, value=_put_together(name, first.join, [entry.value for _, entry in parts]))


def _put_together(name: str, key: str, parts: Sequence[Any]) -> list[Any]:
    """Lists of groups that differ in one key only: what they list there, each name once, in this order."""
    columns = zip(*parts, strict=True) if all(isinstance(part, list) for part in parts) else [parts]
    whole = []
    for column in columns:
        listed = [(_items(group) or {}).get(key) for group in column]
        if not all(isinstance(names, list) and all(type(one) is str for one in names) for names in listed):
            raise _contradiction(f"{name} has a group without a list of names in {key!r}")
        members = dict.fromkeys(chain.from_iterable(names for names in listed if names))
        whole.append(_with(column[0], key, [*members]))
    return whole


def _difference(name: str, rank: int, entry: ValueEntry, other_rank: int, other: ValueEntry) -> str:
    """Where two parts differ, for a message."""
    ranks = f"rank {rank} and rank {other_rank}"
    groups, other_groups = _groups(entry), _groups(other)
    if entry.join == EQUAL or not groups or not other_groups:
        return f"{name} differs between {ranks}"
    if len(groups) != len(other_groups):
        return f"{name} has {len(groups)} groups on rank {rank} and {len(other_groups)} on rank {other_rank}"
    pairs = enumerate(zip(groups, other_groups, strict=True))
    keys = [
        f"{name}[{index}].{key}"
        for index, (one, two) in pairs
        for key in sorted({*one, *two} - {str(entry.join)})
        if one.get(key, ...) != two.get(key, ...)
    ]
    return f"{', '.join(keys[:5]) or name} differs between {ranks}"


def _contradiction(problem: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{problem}, and it must be the same on all ranks that have it", phase="read")


def _groups(entry: ValueEntry) -> list[_Group] | None:
    """The dictionaries of a list, by key; None when the value is no such list."""
    if not isinstance(entry.value, list):
        return None
    groups = [_items(group) for group in entry.value]
    return None if None in groups else groups  # type: ignore[return-value]  # what None in groups excludes


def _items(encoded: Any) -> _Group | None:
    """A dictionary with string keys, in whichever of its two spellings (docs/format.md, section 7)."""
    if not isinstance(encoded, dict):
        return None
    pairs = encoded.get("$dict") if len(encoded) == 1 else None
    if not isinstance(pairs, list):
        return None if any(key.startswith("$") for key in encoded) else encoded
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        return None
    return dict(pairs)


def _without(group: _Group, key: str | None) -> _Group:
    return {name: value for name, value in group.items() if name != key}


def _with(encoded: Any, key: str, value: Any) -> Any:
    """An encoded dictionary with another value, spelt as before."""
    pairs = encoded.get("$dict")
    if pairs is None:
        return {**encoded, key: value}
    return {"$dict": [[name, value if name == key else old] for name, old in pairs]}
