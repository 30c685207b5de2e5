"""Arithmetic on names whose parts are joined with dots. Pure."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["cuts", "is_below", "joined", "roots", "tail"]


def is_below(name: str, root: str) -> bool:
    """Whether a name is the root itself or lies below it; everything lies below the empty root."""
    return not root or name == root or name.startswith(root + ".")


def tail(name: str, root: str) -> str:
    """What follows the root in a name below it; empty for the root itself."""
    return name[len(root) :].removeprefix(".") if root else name


def joined(*names: str) -> str:
    """The names joined with dots, empty ones left out."""
    return ".".join(filter(None, names))


def cuts(name: str) -> Iterator[tuple[str, str]]:
    """Every root above a name, the empty one first, with what follows it."""
    yield "", name
    for index, character in enumerate(name):
        if character == ".":
            yield name[:index], name[index + 1 :]


def roots(name: str) -> list[str]:
    """The name, and everything above it but the empty root, from the top."""
    return [*(root for root, _ in cuts(name) if root), name]
