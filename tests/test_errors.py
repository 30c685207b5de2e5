"""Errors cross process borders and are read by people: nothing of them may get lost on the way."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

from dcp_ckpt import errors
from dcp_ckpt.errors import CheckpointError

CLASSES = tuple(getattr(errors, name) for name in errors.__all__)
FIELDS: dict[str, Any] = {
    "rank": 3,
    "step": 1000,
    "phase": "write",
    "path": "run-001/step-00001000",
    "errno": 28,
}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_whole(kind: type[CheckpointError]) -> None:
    error = kind("disk full: free some space", **FIELDS)
    error.add_note("seen while writing")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert {name: getattr(copy, name) for name in FIELDS} == FIELDS
    assert copy.__notes__ == ["seen while writing"]
    assert (str(copy), copy.args) == (str(error), error.args)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_message_shows_every_field(kind: type[CheckpointError]) -> None:
    shown = str(kind("disk full", **FIELDS))
    assert shown == "disk full [rank 3, step 1000, phase write, path run-001/step-00001000, errno 28]"


def test_the_message_shows_only_what_is_known() -> None:
    assert str(CheckpointError("disk full")) == "disk full"
    assert str(CheckpointError("disk full", rank=0, step=0)) == "disk full [rank 0, step 0]"


def test_the_drawn_tree_is_the_tree_of_classes() -> None:
    drawn: dict[str, str | None] = {}
    ancestors: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ((?:\|   |    )*)(\|-- )?([A-Z]\w+)  +\S.*", line)
        if match:
            depth = len(match[1]) // 4 + bool(match[2])
            del ancestors[depth:]
            drawn[match[3]] = ancestors[-1] if ancestors else None
            ancestors.append(match[3])
    defined = {kind.__name__: kind.__bases__[0].__name__ for kind in CLASSES if kind is not CheckpointError}
    assert drawn == {"CheckpointError": None} | defined


def test_errors_that_mean_a_builtin_one_are_caught_as_it() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)
