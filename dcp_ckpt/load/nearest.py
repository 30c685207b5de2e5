"""What somebody may have meant by a name that is not there. Pure; for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]

_MOST = 3


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Those of `names`, and of what they lie below, that look most like `name`; few or none."""
    depth = name.count(".") + 1
    nodes = {".".join(other.split(".")[:length]) for other in names for length in (depth, depth + 1)}
    return difflib.get_close_matches(name, nodes, n=_MOST, cutoff=cutoff)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about `name`."""
    near = nearest(name, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""
