"""Values of every kind, really saved and loaded: what is accepted comes back in type, value and order."""

from __future__ import annotations

import enum
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.errors import StateError
from tests.format.exact_values import leaves, nested, same

tensors = st.builds(
    lambda dtype, shape: torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    st.lists(st.integers(0, 3), max_size=3),
)
values = nested(leaves)
with_tensors = nested(leaves | tensors)


class Holder:
    """An object whose state is what was put into it."""

    def __init__(self, content: Any = None) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return {"z": self.content, "a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert list(state) == ["z", "a"]
        self.content = state["z"]


class Keeper(nn.Module):
    """A module that keeps a value as its extra state."""

    def __init__(self, content: Any = None) -> None:
        super().__init__()
        self.content = content

    def get_extra_state(self) -> Any:
        return self.content

    def set_extra_state(self, state: Any) -> None:
        self.content = state


def state_of(plain: Any, mixed: Any) -> Any:
    """Everywhere where a user can put a value; `mixed` may hold tensors."""
    return TrainState(
        model=Keeper(mixed),
        lr_scheduler=Holder(mixed),
        extra={"list": [mixed], "object": Holder(plain)},
        per_rank={"mine": plain},
        rng=False,
    )


def contents(state: Any) -> list[Any]:
    return [
        state.model.content,
        state.lr_scheduler.content,
        *state.extra["list"],
        state.extra["object"].content,
        state.per_rank["mine"],
    ]


def test_what_is_accepted_comes_back_as_it_was():
    with (
        tempfile.TemporaryDirectory() as directory,
        Checkpointer(directory, config=CheckpointConfig(dcp_metadata="never")) as checkpointer,
    ):
        steps = iter(range(1, 10_000))
        accepted = []

        @settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(values, min_size=5), st.lists(with_tensors, min_size=5))
        def comes_back(plain: Any, mixed: Any) -> None:
            handle = checkpointer.save(state_of(plain, mixed), step=next(steps))
            try:
                info = handle.result(30)
            except StateError as error:
                # Tensors under keys that give one name, such as 1 and "1".
                if "cannot be told apart" not in error.message:
                    raise
                return
            live = state_of(None, None)
            load_checkpoint(info.path, live)
            for found, given_value in zip(contents(live), [mixed, mixed, mixed, plain, plain], strict=True):
                assert same(found, given_value)
            accepted.append(len(mixed))

        comes_back()
        assert len(accepted) > 30


class Color(enum.Enum):
    RED = 1


def test_what_is_refused_is_named_where_it_is(tmp_path: Path) -> None:
    places: dict[str, Any] = {
        r"lr_scheduler\['z'\]\[0\]": TrainState(model=nn.Linear(1, 1), lr_scheduler=Holder([Color.RED])),
        r"model\._extra_state": TrainState(model=Keeper(Color.RED)),
        r"extra\.deep\.list\[1\]\['x'\]": TrainState(
            model=nn.Linear(1, 1), extra={"deep": {"list": [0, {"x": Color.RED}]}}
        ),
        r"per_rank\.mine": TrainState(model=nn.Linear(1, 1), per_rank={"mine": Color.RED}),
        r"plain": {"plain": Color.RED},
    }
    with Checkpointer(tmp_path) as checkpointer:
        for step, (place, state) in enumerate(places.items()):
            handle = checkpointer.save(state, step=step)
            with pytest.raises(StateError, match=rf"^{place} is of type .*Color.*its name or its value"):
                handle.result(30)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        handle = checkpointer.save({"\ud800": torch.ones(1)}, step=1)
        with pytest.raises(StateError, match=r"cannot be stored: .*rename"):
            handle.result(30)


def test_a_placeholder_takes_any_nested_state(tmp_path: Path) -> None:
    """An empty dictionary takes what is stored below it; objects give their dictionaries as they were."""
    by_number = {2: "x", 1: torch.zeros(1)}
    best = {"z": torch.ones(2), "a": {"n": 1, "by_number": by_number}}
    holder = Holder(OrderedDict(z=torch.ones(2), a=numpy.float32(1)))
    with Checkpointer(tmp_path) as checkpointer:
        path = checkpointer.save({"best": best, "holder": holder}, step=1).result(30).path
    live: Any = {"best": {}, "holder": {}}
    load_checkpoint(path, live)
    in_order_of_keys = {"a": {"by_number": by_number, "n": 1}, "z": torch.ones(2)}
    assert same(live["best"], in_order_of_keys)
    assert same(live["holder"], holder.state_dict())
