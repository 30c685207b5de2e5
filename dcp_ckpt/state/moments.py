"""Whether the state that a load gives a parameter of an optimizer would be whole. Pure.

A moment that is missing is never taken for zero: an optimizer that has some of a parameter's state fills in
nothing, and goes wrong at the next step or silently. Called by the optimizer component.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Lack", "ParameterState", "lacking"]


@dataclass(frozen=True, kw_only=True)
class ParameterState:
    """The keys of one parameter's state (`step`, `exp_avg`, ...), by what becomes of them.

    Args:
        restored: the checkpoint has them, and they are selected.
        left_out: the checkpoint has them, and they are not selected.
        live: the optimizer has them now.
        kept: those of `live` that are not selected, so they stay.
    """

    restored: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    live: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Lack:
    """A key that a parameter would lack; `is_asked` when it is the selection that leaves it out."""

    parameter: str
    key: str
    why: str
    is_asked: bool = False


def lacking(group: Mapping[str, ParameterState]) -> list[Lack]:
    """What parameters of one group would lack.

    A parameter of which nothing is restored and nothing kept lacks nothing: it starts anew.
    """
    found: list[Lack] = []
    for name, state in group.items():
        if state.restored:
            why = "it is left out, and the optimizer has none to keep"
            found += [Lack(name, key, why, is_asked=True) for key in sorted(state.left_out - state.kept)]
        elif state.kept and state.kept != state.live:
            why = "the checkpoint has none; leave all state of this parameter out, or nothing of it"
            found += [Lack(name, key, why) for key in sorted(state.live - state.kept)]
    keys = {
        name: state.restored | state.kept | state.left_out for name, state in group.items() if state.restored
    }
    why = "other parameters of its group have it in the checkpoint"
    return found + [Lack(name, key, why) for name, missing in _partial_keys(keys).items() for key in missing]


def _partial_keys(keys: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    """What parameters lack, by name: those whose keys are a part only of another parameter's keys.

    Optimizers that give parameters of one group different keys (Adafactor) do not nest them.
    """
    kinds = set(keys.values())
    missing = {kind: max((k for k in kinds if kind < k), key=len, default=kind) - kind for kind in kinds}
    return {name: sorted(missing[kind]) for name, kind in keys.items() if missing[kind]}
