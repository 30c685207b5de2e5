"""Names in messages: the first few of many, and those that people know from elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from dcp_ckpt.errors import ConfigError

__all__ = ["KnownByOtherNames", "shown_names"]


def shown_names(names: Iterable[object], *, most: int = 5) -> str:
    """The first `most` names, and the number of the others; empty without names."""
    listed = list(map(str, names))
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


class KnownByOtherNames:
    """Answers keyword arguments that other libraries use with the name that they have here.

    Args:
        other_names: set by subclasses: name elsewhere -> what to write here.
    """

    other_names: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *_: Any, **arguments: Any) -> Any:
        for name in arguments:
            if name in cls.other_names:
                raise ConfigError(f"{cls.__name__} has no {name}; here it is {cls.other_names[name]}")
        return super().__new__(cls)
