"""Names in messages: the first few of many. Pure."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["shown_names"]


def shown_names(names: Iterable[object], *, most: int = 5) -> str:
    """The first `most` names, and the number of the others; empty without names."""
    listed = list(map(str, names))
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
