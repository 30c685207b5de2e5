"""What a run of all benchmarks found, as one document, and how it stands to what is needed. Pure.

Used by `suite`, which makes the document, by `check` and by `readme`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.ratios import ALL_TARGETS, Target, passes

__all__ = [
    "QUICK_TOLERANCE",
    "TOLERATED",
    "Verdict",
    "failed_scripts",
    "medians_of",
    "shown_value",
    "verdicts",
]

QUICK_TOLERANCE = 1.5
"""A quick run is small and has few rounds: fixed costs weigh more, and medians scatter."""

TOLERATED = {
    "load_after_save": (6.0, "direct writes leave the page cache cold: the disk bounds it (decision 0011)"),
    "load_same": (0.80, "80 ms do not depend on the size, the rest is the memory's bandwidth"),
    "load_8_4": (0.70, "as load_same"),
    "load_8_6": (0.85, "as load_same"),
    "load_4_8": (0.80, "as load_same"),
}
"""Ratios that are not where they should be, and what bounds them: until then they must not get worse."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One ratio of one script.

    Args:
        is_met: whether what is needed is reached; None where it was not measured.
        holds: whether it is no worse than what is tolerated.
        limit: what it is held to.
        reason: what bounds it, where more is tolerated than needed.
    """

    script: str
    target: Target
    ratio: float | None
    is_met: bool | None
    holds: bool
    limit: float
    reason: str = ""


def medians_of(result: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """The medians of one script, by metric and system."""
    return {
        (row["metric"], row["system"]): row["median"] for row in result["rows"] if row["median"] is not None
    }


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    """A verdict on every ratio that some script gives, in the order of the scripts."""
    tolerance = QUICK_TOLERANCE if document["quick"] else 1.0
    found = []
    for script, result in document["scripts"].items():
        medians = medians_of(result) if "rows" in result else {}
        for name, ratio in result.get("ratios", {}).items():
            found.append(_verdict(script, ALL_TARGETS[name], ratio, medians, tolerance))
    return found


def _verdict(
    script: str,
    target: Target,
    ratio: float | None,
    medians: Mapping[tuple[str, str], float],
    tolerance: float,
) -> Verdict:
    tolerated, reason = TOLERATED.get(target.name, (target.needed, ""))
    if target.higher_is_better:
        limit = tolerated / tolerance
        holds = ratio is not None and ratio >= limit
    else:
        limit = tolerated * tolerance
        holds = ratio is not None and ratio <= limit
    return Verdict(
        script=script,
        target=target,
        ratio=ratio,
        is_met=passes(target, medians),
        holds=holds,
        limit=limit,
        reason=reason,
    )


def shown_value(value: float | None) -> str:
    """A ratio with three significant digits."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def failed_scripts(document: Mapping[str, Any]) -> Sequence[str]:
    """Scripts that ended with an error, with its end."""
    return [
        f"{name}: {result['failed']}" for name, result in document["scripts"].items() if "failed" in result
    ]
