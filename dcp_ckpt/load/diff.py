"""Everything that does not fit between a checkpoint and a state, found before payload is read. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from dcp_ckpt.errors import StateMismatch
from dcp_ckpt.state.component import Problem, StoredTensor
from dcp_ckpt.state.placements import local_tensor
from dcp_ckpt.state.tensors import memory_of

__all__ = ["memory_problems", "mismatch_error", "tensor_problems"]

_SHOWN = 6


def tensor_problems(targets: Mapping[str, torch.Tensor], stored: Mapping[str, StoredTensor]) -> list[Problem]:
    """Shapes and dtypes that differ; names that are not stored."""
    problems = []
    for name, target in targets.items():
        entry = stored.get(name)
        if entry is None:
            problems.append(Problem(kind="missing", key=name, detail="not in the checkpoint"))
        elif tuple(target.shape) != entry.shape:
            detail = f"checkpoint {list(entry.shape)}, state {list(target.shape)}"
            problems.append(Problem(kind="shape", key=name, detail=detail))
        elif target.dtype != entry.dtype:
            problems.append(
                Problem(kind="dtype", key=name, detail=f"checkpoint {entry.dtype}, state {target.dtype}")
            )
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


def mismatch_error(
    problems: Sequence[Problem], stored_names: Iterable[str], *, step: int, path: str
) -> StateMismatch:
    """One error for all problems, grouped by kind, with counts, examples and nearest names."""
    names = list(stored_names)
    lines = [f"the checkpoint does not fit this state ({len(problems)} problem(s)); nothing was changed"]
    for kind in ("missing", "unexpected", "shape", "dtype", "other"):
        members = [problem for problem in problems if problem.kind == kind]
        if not members:
            continue
        lines.append(f"  {kind} ({len(members)}):")
        for problem in members[:_SHOWN]:
            near = difflib.get_close_matches(problem.key, names, n=1, cutoff=0.8) if kind == "missing" else []
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"    {problem.key}: {problem.detail}{hint}")
        if len(members) > _SHOWN:
            lines.append(f"    ... and {len(members) - _SHOWN} more")
    return StateMismatch("\n".join(lines), step=step, phase="diff", path=path)
