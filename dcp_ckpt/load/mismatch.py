"""The message about everything that does not fit, and what would make it fit. Pure."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from dcp_ckpt.format.dotted import cuts, is_below, roots
from dcp_ckpt.load.grouping import NameGroup, grouped, last_parts
from dcp_ckpt.load.nearest import nearest
from dcp_ckpt.state.component import Problem

__all__ = ["mismatch_message"]

_MOST_GROUPS = 6
_MOST_GLOBS = 8
_MOST_RULES = 3
_DEPTH = 2
_SIMILAR = 0.8

_KINDS = {
    "missing": "missing",
    "unexpected": "unexpected",
    "shape": "of another shape",
    "dtype": "of another dtype",
    "other": "of another form",
}


def mismatch_message(problems: Sequence[Problem], stored: Iterable[str], unused: Iterable[str]) -> str:
    """One message for all problems: by kind, in groups of names, with what would accept them.

    Args:
        stored: all stored names.
        unused: those of them that this state does not ask for.
    """
    unused = list(unused)
    count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    lines = [f"the checkpoint does not fit this state ({count}); nothing was changed"]
    groups_by_kind: dict[str, list[NameGroup]] = {}
    for kind in _KINDS:
        found: dict[str, list[Problem]] = {}
        for problem in problems:
            if problem.kind == kind:
                found.setdefault(problem.key, []).append(problem)
        groups_by_kind[kind] = groups = grouped(found, most=_MOST_GROUPS, depth=_DEPTH)
        if groups:
            lines.append(f"  {kind} ({sum(map(len, found.values()))}):")
        for group in groups[:_MOST_GROUPS]:
            near = nearest(group.names[0], unused, cutoff=_SIMILAR) if kind == "missing" else []
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"    {_line(group, found[group.names[0]])}{hint}")
        if more := sum(len(group.names) for group in groups[_MOST_GROUPS:]):
            lines.append(f"    ... and {more} more")
    keys = {problem.key for problem in problems}
    fitting = {root for name in stored if keys.isdisjoint(roots(name)) for root in roots(name)}
    return "\n".join([*lines, *_advice(groups_by_kind, fitting)])


def _line(group: NameGroup, first: Sequence[Problem]) -> str:
    """One group, by its first name."""
    example = f"{first[0].key}: {'; '.join(problem.detail for problem in first)}"
    if len(group.names) == 1:
        return example
    count = f"{len(group.names)} {_KINDS[first[0].kind]}"
    return f"{group.label}: {count} ({last_parts(group.names)}), such as {example}"


def _advice(groups_by_kind: Mapping[str, Sequence[NameGroup]], fitting: Container[str]) -> Iterator[str]:
    """Which arguments of the load would accept this."""
    missing, unexpected = (
        [name for group in groups_by_kind[kind] for name in group.names] for kind in ("missing", "unexpected")
    )
    if rules := _rules(missing, unexpected):
        shown = ", ".join(f'"{old}": "{new}"' for old, new in rules)
        yield f"  rename={{{shown}}} if these only have another name in the checkpoint"
    if cast := _globs(groups_by_kind["dtype"], fitting):
        yield f"  cast={cast} converts these while they are read"
    others = [group for kind, groups in groups_by_kind.items() if kind != "dtype" for group in groups]
    if exclude := _globs(others, fitting):
        yield f"  exclude={exclude} leaves these as they are in the state"


def _globs(groups: Iterable[NameGroup], fitting: Container[str]) -> str:
    """Globs that match all names and nothing that fits, as an argument; empty without names."""
    globs: dict[str, None] = {}
    for group in groups:
        least = len(group.label.removesuffix(".*"))
        for name in group.names:
            root = next((one for one in roots(name) if len(one) >= least and one not in fitting), name)
            globs[glob.escape(root) + (".*" if root != name else "")] = None
    shown = [f'"{one}"' for one in globs]
    if len(shown) > _MOST_GLOBS:
        shown[_MOST_GLOBS:] = ["..."]
    return f"({', '.join(shown)}{',' if len(shown) == 1 else ''})" if shown else ""


def _rules(missing: Sequence[str], unexpected: Sequence[str]) -> list[tuple[str, str]]:
    """Renamings after which whole branches that are unexpected would be what is missing."""
    heads: dict[str, list[str]] = {}
    for name in unexpected:
        for head, rest in cuts(name):
            heads.setdefault(rest, []).append(head)
    votes: Counter[tuple[str, str]] = Counter()
    for name in missing:
        for head, rest in cuts(name):
            if head and rest in heads:
                same_part = [old for old in heads[rest] if old.partition(".")[0] == head.partition(".")[0]]
                votes.update((old, head) for old in same_part or heads[rest] if old)
                break
    whole = [
        (old, new)
        for (old, new), count in votes.most_common()
        if count == _num_below(missing, new) == _num_below(unexpected, old)
    ]
    # What optimizers keep follows its parameter by itself.
    return [rule for rule in whole if not any(_follows(rule, other) for other in whole)][:_MOST_RULES]


def _num_below(names: Iterable[str], root: str) -> int:
    return sum(is_below(name, root) for name in names)


def _follows(rule: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether both names of a rule end in those of the other, without the first part."""
    return rule != other and all(
        a.endswith("." + b.partition(".")[2]) and len(a) > len(b)
        for a, b in zip(rule, other, strict=True)
        if b.partition(".")[2]
    )
