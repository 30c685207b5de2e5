"""Everything that does not fit between a checkpoint and a state, found before payload is read. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dcp_ckpt.state.component import Problem, StoredState
from dcp_ckpt.state.placements import local_tensor
from dcp_ckpt.state.problems import other_dtype, other_shape
from dcp_ckpt.state.tensors import memory_of

__all__ = ["Answer", "answer", "memory_problems", "of_all_ranks", "tensor_problems"]


def tensor_problems(targets: Mapping[str, torch.Tensor], stored: StoredState) -> list[Problem]:
    """Names that are not stored; shapes that differ; dtypes that differ and may not be cast."""
    problems = []
    for name, target in targets.items():
        entry = stored.tensors.get(name)
        if entry is None:
            problems.append(Problem(kind="missing", key=name, detail="not in the checkpoint"))
        elif tuple(target.shape) != entry.shape:
            problems.append(other_shape(name, entry.shape, target.shape))
        elif target.dtype != entry.dtype and not stored.casts(name):
            problems.append(other_dtype(name, entry.dtype, target.dtype))
        elif not _can_cast(entry.dtype, target.dtype):
            detail = f"{entry.dtype} cannot be cast to {target.dtype}: values would change their meaning"
            problems.append(Problem(kind="other", key=name, detail=detail))
    return problems


def memory_problems(
    targets: Iterable[Mapping[str, torch.Tensor]], aliases: Mapping[str, str]
) -> list[Problem]:
    """Different stored tensors that would be filled into one memory, so that all but one would be lost.

    Args:
        targets: by stored name, of each component.
        aliases: name -> the name under which the same tensor is stored.
    """
    owners: dict[Hashable, str] = {}
    problems = []
    for name, target in (item for tensors in targets for item in tensors.items()):
        if not local_tensor(target).numel():
            continue
        owner = owners.setdefault(memory_of(target), name)
        if aliases.get(owner, owner) != aliases.get(name, name):
            detail = f"is one memory with {owner} in this state, and another tensor in the checkpoint"
            problems.append(Problem(kind="other", key=name, detail=detail))
    return problems


def _can_cast(stored: torch.dtype, live: torch.dtype) -> bool:
    """Within floating-point and within complex types, and from integers to those that hold all of them."""
    if stored == live or (stored.is_floating_point and live.is_floating_point):
        return True
    if stored.is_complex or live.is_complex:
        return stored.is_complex and live.is_complex
    if stored.is_floating_point or live.is_floating_point or torch.bool in (stored, live):
        return False
    narrow, wide = torch.iinfo(stored), torch.iinfo(live)
    return wide.min <= narrow.min and narrow.max <= wide.max


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the problems of one rank differ from those of rank 0.

    Args:
        more: problems that rank 0 does not have.
        lacks: indices of rank 0's problems that this rank does not have.
    """

    more: tuple[Problem, ...]
    lacks: tuple[int, ...]


def answer(first: Sequence[Problem], own: Iterable[Problem]) -> Answer:
    """This rank's answer to the problems of rank 0."""
    own = dict.fromkeys(own)
    known = frozenset(first)
    return Answer(
        more=tuple(problem for problem in own if problem not in known),
        lacks=tuple(index for index, problem in enumerate(first) if problem not in own),
    )


def of_all_ranks(first: Sequence[Problem], answers: Sequence[Answer]) -> list[Problem]:
    """What does not fit all ranks together; what does not concern all of them names those it does.

    The one place that decides whose problem counts: what a rank lacks counts by itself, but an entry is
    unexpected only where every rank says so, since each may hold a part of the state.

    Args:
        answers: of all ranks, in their order.
    """
    # Most often all ranks have the same ones: who lacks one is kept, not who has it.
    lacking: dict[Problem, set[int]] = {problem: set() for problem in first}
    more: dict[Problem, list[int]] = {}
    for rank, found in enumerate(answers):
        for index in found.lacks:
            lacking[first[index]].add(rank)
        for problem in found.more:
            more.setdefault(problem, []).append(rank)
    having = {
        problem: [rank for rank in range(len(answers)) if rank not in ranks] if ranks else []
        for problem, ranks in lacking.items()
    }
    return [
        replace(problem, detail=f"{problem.detail}{_on(ranks)}") if ranks else problem
        for problem, ranks in (having | more).items()
        if not ranks or problem.kind != "unexpected"
    ]


def _on(ranks: Sequence[int]) -> str:
    first, *others = ranks
    return f" (rank {first} and {len(others)} more)" if others else f" (rank {first})"
