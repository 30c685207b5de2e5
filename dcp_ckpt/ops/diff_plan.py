"""What a diff has to compare: a pure function of the tables of two checkpoints.

Pairs tensors by name, a tied one once for all of its names. Reads nothing. Called by `ops.diff`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dcp_ckpt.errors import StateMismatch
from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.ops.diff_proofs import Proofs, are_equal
from dcp_ckpt.wording import shown_names

__all__ = ["DiffPlan", "DiffTables", "TensorPair", "plan_diff"]


@dataclass(frozen=True, kw_only=True)
class DiffTables:
    """What a diff needs to know of one checkpoint.

    Args:
        tensors: tied ones under each of their names.
        aliases: a further name of a tied tensor -> the one that it is stored under.
        values: encoded, by name.
        unreadable: the names of values that cannot be read, or not without tensors.
        proofs: by the name that a tensor is stored under; empty where there are no digests.
    """

    tensors: Mapping[str, TensorEntry]
    aliases: Mapping[str, str]
    values: Mapping[str, Any]
    unreadable: Collection[str]
    proofs: Mapping[str, Proofs]

    @property
    def names(self) -> tuple[str, ...]:
        """Of everything that it holds."""
        return (*self.tensors, *self.values, *self.unreadable)


@dataclass(frozen=True, kw_only=True)
class TensorPair:
    """One tensor of both checkpoints: the name, and the one it is stored under in each."""

    name: str
    stored_a: str
    stored_b: str
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True, kw_only=True)
class DiffPlan:
    """Everything that is said without reading tensors, and what has to be read for the rest.

    Args:
        only_in_a, only_in_b: names of tensors and values.
        reshaped: tensors of different shapes, which cannot be compared.
        compared: to be read.
        proven: equal by their digests.
        values: the names of those that differ.
        num_equal_values: how many do not.
        unreadable: names of values that could not be compared.
    """

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    reshaped: tuple[TensorPair, ...]
    compared: tuple[TensorPair, ...]
    proven: tuple[TensorPair, ...]
    values: tuple[str, ...]
    num_equal_values: int
    unreadable: tuple[str, ...]


def plan_diff(a: DiffTables, b: DiffTables, key: str = "*") -> DiffPlan:
    """Decide what is compared. Pure.

    Args:
        key: a glob of whole names.

    Raises:
        StateMismatch: it matches nothing in either.
    """
    names_a, names_b = _matching(a.names, key), _matching(b.names, key)
    if not names_a and not names_b and key != "*":
        held = sorted({*a.names, *b.names})
        raise StateMismatch(f"key {key!r} matches nothing; the checkpoints hold {shown_names(held)}")
    common = sorted(names_a & names_b)
    # What is a tensor in one and a value in the other is two things.
    tensors = [name for name in common if name in a.tensors and name in b.tensors]
    values = [name for name in common if name in a.values and name in b.values]
    unreadable = [name for name in common if name in a.unreadable or name in b.unreadable]
    both = {*tensors, *values, *unreadable}
    reshaped: list[TensorPair] = []
    compared: list[TensorPair] = []
    proven: list[TensorPair] = []
    for pair in _pairs(a, b, tensors):
        if pair.a.shape != pair.b.shape:
            reshaped.append(pair)
        else:
            (proven if _is_proven(pair, a, b) else compared).append(pair)
    differing = [name for name in values if a.values[name] != b.values[name]]
    return DiffPlan(
        only_in_a=tuple(sorted(names_a - both)),
        only_in_b=tuple(sorted(names_b - both)),
        reshaped=tuple(reshaped),
        compared=tuple(compared),
        proven=tuple(proven),
        values=tuple(differing),
        num_equal_values=len(values) - len(differing),
        unreadable=tuple(unreadable),
    )


def _matching(names: Iterable[str], key: str) -> set[str]:
    return {name for name in names if fnmatchcase(name, key)}


def _pairs(a: DiffTables, b: DiffTables, names: Sequence[str]) -> list[TensorPair]:
    found: dict[tuple[str, str], TensorPair] = {}
    for name in names:
        stored_a, stored_b = a.aliases.get(name, name), b.aliases.get(name, name)
        pair = TensorPair(
            name=name, stored_a=stored_a, stored_b=stored_b, a=a.tensors[name], b=b.tensors[name]
        )
        found.setdefault((stored_a, stored_b), pair)
    return list(found.values())


def _is_proven(pair: TensorPair, a: DiffTables, b: DiffTables) -> bool:
    if pair.a.dtype != pair.b.dtype:
        return False
    return are_equal(a.proofs.get(pair.stored_a, {}), b.proofs.get(pair.stored_b, {}))
