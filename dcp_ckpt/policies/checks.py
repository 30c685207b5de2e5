"""What the arguments of policies must be, and which metrics can be compared. Called by the policies."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from dcp_ckpt.errors import ConfigError

__all__ = ["finite", "require_count", "require_name", "require_number", "require_seconds"]


def finite(value: Any) -> float | None:
    """The value of a metric as a number that can be compared, or None."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def require_count(policy: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{policy} needs a whole number of at least 1, not {value!r}")


def require_name(policy: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{policy} needs the name of a metric, not {value!r}")


def require_number(policy: str, name: str, value: object, *, above: float) -> None:
    if type(value) not in (int, float) or not above < float(value) < math.inf:  # type: ignore[arg-type]
        raise ConfigError(f"{policy} needs a finite {name} above {above:g}, not {value!r}")


def require_seconds(policy: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ConfigError(f"{policy} needs a positive number of seconds, not {value!r}")
