"""Which stored group of hyper-parameters belongs to which group of a live optimizer. Pure.

Hyper-parameters belong to the parameters that they are for, so groups are matched by the names of their
members. Called by the optimizer component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.state.component import Problem
from dcp_ckpt.wording import shown_names

__all__ = ["GroupMatch", "are_named_groups", "kind_problems", "listed_params", "match_groups"]


@dataclass(frozen=True, kw_only=True)
class GroupMatch:
    """What belongs together.

    Args:
        partners: index of a live group -> index of the stored one. A live group that is not in it keeps its
            hyper-parameters: all its parameters are new.
        problems: "other" where groups cannot be told apart, each with the groups' name as key.
    """

    partners: Mapping[int, int]
    problems: tuple[Problem, ...]


def are_named_groups(saved: Any) -> bool:
    """Whether a stored value is a list of groups that name their parameters."""
    return isinstance(saved, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(name, str) for name in group["params"])
        for group in saved
    )


def match_groups(
    key: str, saved: Sequence[Sequence[str]], live: Sequence[Sequence[str]], restores: Callable[[str], bool]
) -> GroupMatch:
    """Match groups by the parameters they share, and groups without any by their place.

    Args:
        key: the name of the stored groups.
        saved, live: the names of each group's parameters.
        restores: whether the state of a parameter is restored. Such parameters decide; in a group without any
            of them all that are shared do.
    """
    home = {name: index for index, members in enumerate(saved) for name in members}
    partners: dict[int, int] = {}
    problems: list[Problem] = []
    for index, members in enumerate(live):
        shared = [name for name in members if name in home]
        found = sorted({home[name] for name in (list(filter(restores, shared)) or shared)})
        if len(found) > 1:
            detail = f"group {index} of the optimizer holds parameters of the checkpoint's {_groups(found)}"
            problems.append(Problem(kind="other", key=key, detail=detail))
        elif found:
            partners[index] = found[0]
    for stored in sorted(set(partners.values())):
        sharing = [index for index, partner in partners.items() if partner == stored]
        if len(sharing) > 1:
            detail = f"the optimizer's {_groups(sharing)} hold parameters of the checkpoint's group {stored}"
            problems.append(Problem(kind="other", key=key, detail=detail))
    partners, alone = _with_empty(partners, saved, live)
    if alone:
        problems.append(Problem(kind="other", key=key, detail=alone))
    return GroupMatch(partners=partners, problems=tuple(problems))


def _with_empty(
    partners: Mapping[int, int], saved: Sequence[Sequence[str]], live: Sequence[Sequence[str]]
) -> tuple[dict[int, int], str | None]:
    """Groups without parameters get the one at their place, else the next empty one; and what is left over.

    One that is empty here may hold parameters of another rank's part of the model.
    """
    found = dict(partners)
    empty = [index for index, members in enumerate(live) if not members]
    free = [index for index in range(len(saved)) if index not in found.values()]
    found.update((index, index) for index in empty if index in free)
    here = [index for index in empty if index not in found]
    there = [index for index, members in enumerate(saved) if not members and index not in found.values()]
    found.update(zip(here, there, strict=False))
    is_even = len(here) == len(there)
    return found, None if is_even else f"the checkpoint has {len(saved)} groups, the optimizer {len(live)}"


def listed_params(saved: Any) -> list[str]:
    """The names of all parameters in stored groups; none where these are not what an optimizer stores."""
    return [name for group in saved for name in group["params"]] if are_named_groups(saved) else []


def kind_problems(
    key: str,
    saved: Sequence[Mapping[str, Any]],
    live: Sequence[Mapping[str, Any]],
    partners: Mapping[int, int],
    *,
    ignored: frozenset[str],
) -> list[Problem]:
    """Where each side has settings that the other does not know, two kinds of optimizers met.

    On one side alone there may be more: schedulers leave settings in groups, and versions of torch add some.
    """
    problems = []
    for index, partner in partners.items():
        stored_only = sorted(saved[partner].keys() - live[index].keys() - ignored)
        live_only = sorted(live[index].keys() - saved[partner].keys() - ignored)
        if stored_only and live_only:
            detail = (
                f"group {index} is of another kind of optimizer: only the checkpoint has "
                f"{shown_names(stored_only)}, only this one has {shown_names(live_only)}"
            )
            problems.append(Problem(kind="other", key=key, detail=detail))
    return problems


def _groups(indices: Sequence[int]) -> str:
    return f"groups {' and '.join(map(str, indices))}"
