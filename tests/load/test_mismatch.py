"""The message about what does not fit: short whatever the state, and its advice does what it says."""

from __future__ import annotations

import ast
import random
import re

import pytest

from dcp_ckpt.load.mismatch import mismatch_message
from dcp_ckpt.load.selection import Selection
from dcp_ckpt.state import Problem

PARTS = ("attn.weight", "attn.bias", "mlp.weight", "mlp.bias", "norm.scale")


def missing(*names: str) -> list[Problem]:
    return [Problem(kind="missing", key=name, detail="the model has it") for name in names]


def unexpected(*names: str) -> list[Problem]:
    return [Problem(kind="unexpected", key=name, detail="the checkpoint has it") for name in names]


def branch(root: str, count: int) -> list[str]:
    return [f"{root}.{block}.{part}" for block in range(count) for part in PARTS]


def advised(message: str, keyword: str) -> tuple[str, ...]:
    """The globs that the message gives for a keyword."""
    found = re.search(rf"{keyword}=(\(.*?\)) ", message)
    return () if found is None else ast.literal_eval(found[1])


def test_a_whole_model_under_another_name_takes_a_few_lines() -> None:
    old, new = branch("model.blocks", 24), branch("model.layers", 24)
    message = mismatch_message([*missing(*new), *unexpected(*old)], old, old)
    assert (
        message
        == """\
the checkpoint does not fit this state (240 problems); nothing was changed
  missing (120):
    model.layers.*: 120 missing (weight, bias, scale), such as model.layers.0.attn.weight: the model has it; \
did you mean model.blocks.0.attn.weight?
  unexpected (120):
    model.blocks.*: 120 unexpected (weight, bias, scale), such as model.blocks.0.attn.weight: \
the checkpoint has it
  rename={"model.blocks": "model.layers"} if these only have another name in the checkpoint
  exclude=("model.layers.*", "model.blocks.*") leaves these as they are in the state"""
    )


def test_a_renaming_is_advised_only_where_it_explains_whole_branches() -> None:
    old, new = branch("model.blocks", 3), branch("model.layers", 2)
    assert "rename" not in mismatch_message([*missing(*new), *unexpected(*old)], old, old)
    moments = [
        f"optimizer.state.{name.removeprefix('model.')}" for name in (*old, *branch("model.layers", 3))
    ]
    problems = [*missing(*branch("model.layers", 3), *moments[15:]), *unexpected(*old, *moments[:15])]
    message = mismatch_message(problems, [*old, *moments[:15]], old)
    assert 'rename={"model.blocks": "model.layers"} if' in message, "moments follow by themselves"


def test_a_name_that_is_in_use_is_not_what_was_meant() -> None:
    stored = branch("model.blocks", 2)
    assert "did you mean" not in mismatch_message(missing("model.blocks.2.attn.weight"), stored, [])


@pytest.mark.parametrize("seed", range(50))
def test_advice_covers_every_problem_and_nothing_that_fits(seed: int) -> None:
    rng = random.Random(seed)
    names = sorted({".".join(rng.choices("ab*[c]", k=rng.randint(1, 4))) for _ in range(30)})
    names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    wrong = rng.sample(names, rng.randint(1, min(8, len(names))))
    kinds = ("missing", "unexpected", "shape", "other", "dtype")
    problems = [Problem(kind=rng.choice(kinds), key=name, detail="") for name in wrong]
    stored = [name for name in names if name not in wrong]
    message = mismatch_message(problems, stored, stored)
    globs = (*advised(message, "exclude"), *advised(message, "cast"))
    accepting = Selection(exclude=globs)
    assert [name for name in wrong if accepting.selects(name)] == []
    assert [name for name in stored if not accepting.selects(name)] == []


def test_many_problems_are_cut_short() -> None:
    names = [f"part{i}.x" for i in range(100)]
    message = mismatch_message(missing(*names), [], [])
    assert len(message.splitlines()) < 12
    assert "... and 94 more" in message
    assert ", ...) leaves these" in message
