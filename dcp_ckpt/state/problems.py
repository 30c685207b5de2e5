"""What does not fit, in the same words wherever it is found. Pure; used by components and `load.diff`."""

from __future__ import annotations

from collections.abc import Sequence

from dcp_ckpt.state.component import Problem

__all__ = ["missing", "other_dtype", "other_shape", "unexpected", "unfillable", "value_for_tensor"]


def missing(key: str, holder: str = "the live state") -> Problem:
    """The checkpoint lacks something that is needed here."""
    return Problem(kind="missing", key=key, detail=f"{holder} has it, the checkpoint does not")


def unexpected(key: str, holder: str) -> Problem:
    """The checkpoint holds something that nothing here has a use for."""
    return Problem(kind="unexpected", key=key, detail=f"the checkpoint has it, {holder} does not")


def unfillable(key: str, reason: str) -> Problem:
    """The live tensor cannot take what is stored."""
    return Problem(kind="other", key=key, detail=f"cannot be filled: {reason}")


def value_for_tensor(key: str) -> Problem:
    """A value stands where the live state has a tensor."""
    return Problem(kind="other", key=key, detail="is a value in the checkpoint and a tensor here")


def other_shape(key: str, stored: Sequence[int], live: Sequence[int]) -> Problem:
    """Global shapes differ."""
    return Problem(kind="shape", key=key, detail=f"checkpoint {list(stored)}, state {list(live)}")


def other_dtype(key: str, stored: object, live: object) -> Problem:
    """Dtypes differ, and nobody asked for a cast."""
    return Problem(kind="dtype", key=key, detail=f"checkpoint {stored}, state {live}")
