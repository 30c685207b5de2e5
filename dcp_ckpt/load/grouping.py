"""Many names as few lines: groups with a common beginning. Pure; for reports and messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["NameGroup", "grouped", "last_parts"]

_SHOWN_PARTS = 3


@dataclass(frozen=True, kw_only=True)
class NameGroup:
    """Some names.

    Args:
        label: the name, or what all of them begin with and `.*`: a glob that matches them.
        names: in the order given.
    """

    label: str
    names: tuple[str, ...]


def grouped(names: Iterable[str], *, most: int, depth: int) -> list[NameGroup]:
    """Group names by their first parts, by as many as give no more than `most` groups, at least by one.

    Args:
        depth: the most parts to group by.
    """
    names = list(names)
    while True:
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            groups.setdefault(tuple(name.split(".")[:depth]), []).append(name)
        if len(groups) <= most or depth == 1:
            return [NameGroup(label=_label(members), names=tuple(members)) for members in groups.values()]
        depth -= 1


def last_parts(names: Sequence[str]) -> str:
    """The last parts of the names, each once: `weight, bias, ...`."""
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(parts[:_SHOWN_PARTS]) + (", ..." if len(parts) > _SHOWN_PARTS else "")


def _label(names: Sequence[str]) -> str:
    first, *others = (name.split(".") for name in names)
    if not others:
        return names[0]
    length = min(len(first), *map(len, others))
    common = next((i for i in range(length) if any(other[i] != first[i] for other in others)), length)
    return ".".join((*first[: min(common, length - 1)], "*"))
