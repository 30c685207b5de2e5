"""Names that people know from other libraries, answered with the one to use here. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dcp_ckpt.errors import ConfigError

__all__ = ["KnownByOtherNames"]


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
