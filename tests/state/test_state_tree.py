from __future__ import annotations

import collections
from collections import OrderedDict
from typing import Any

import pytest
import torch

from dcp_ckpt.errors import CorruptCheckpoint, StateError
from dcp_ckpt.state.collector import StateCollector
from dcp_ckpt.state.component import Path, StoredState, StoredTensor, Targets
from dcp_ckpt.state.rebuild import attach_tensors, rebuild
from dcp_ckpt.state.stateful import StatefulComponent
from tests.format.exact_values import same
from tests.state import in_memory


class Box:
    """An object whose state is whatever was put into it."""

    def __init__(self, content: Any = None) -> None:
        self.content = content

    def state_dict(self) -> Any:
        return self.content

    def load_state_dict(self, state: Any) -> None:
        self.content = state


def collect(state: Any, prefix: Path = ("s",)) -> StateCollector:
    collector = StateCollector()
    collector.add_tree(prefix, state)
    return collector


def round_trip(state: Any) -> Any:
    box = Box()
    saved = in_memory.save([StatefulComponent(("s",), Box(state))])
    in_memory.load(saved, [StatefulComponent(("s",), box)])
    return box.content


def test_each_leaf_of_string_keyed_dictionaries_is_a_key():
    captured = collect({"a": {"b": 1, "t": torch.ones(2)}, "ints": {1: 2}}).captured()
    assert set(captured.values) == {("s", "a", "b"), ("s", "ints")}
    assert set(captured.tensors) == {("s", "a", "t")}
    assert captured.stock == {("s", "a", "b"): 1, ("s", "ints"): {1: 2}}


def test_tensors_in_containers_are_stored_as_tensors():
    state: dict[str, Any] = {
        "list": [torch.ones(2), 3],
        "deep": {0: (torch.zeros(1), {"x": [torch.ones(())]})},
    }
    captured = collect(state).captured()
    assert {".".join(path) for path in captured.tensors} == {"s.list.0", "s.deep.0.0", "s.deep.0.1.x.0"}
    assert captured.tensors["s", "list", "0"] is state["list"][0]
    assert captured.stock == {}  # a TensorRef means nothing to stock readers


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"empty": {}, "a": {"empty": {}}},
        {"t": torch.arange(3), "empty": {}, "n": None},
        {"z": {"y": torch.ones(1), "x": {"w": [torch.ones(1)], "empty": {}}}, "a": OrderedDict(b=1, a=2)},
        OrderedDict(z=torch.ones(1), a=OrderedDict(y=torch.zeros(1), b={"c": 1})),
        {"list": [1, (2, {3: "x"})], "x": -0.0, "big": 1 << 80, "b": b"\x00"},
        {"milestones": collections.Counter({3: 1, 9: 2}), "d": collections.deque([1, 2], maxlen=4)},
        {"t": torch.ones(2), "d": collections.deque([torch.ones(1)], maxlen=4)},
        OrderedDict(b=1, a=2),
    ],
    ids=[
        "empty", "empty-inside", "tensor", "unsorted", "ordered-tensors", "values", "collections", "deque",
        "ordered",
    ],
)  # fmt: skip
def test_round_trip_is_exact(state):
    assert same(round_trip(state), state)


def test_an_object_without_tensors_is_one_value():
    captured = StatefulComponent(("s",), Box({"a": {"b": 1}})).capture()
    assert set(captured.values) == {("s",)}


def test_colliding_names_are_refused_with_both_paths():
    with pytest.raises(StateError) as caught:
        collect({"a.b": 1, "a": {"b": 2}})
    assert "['s']['a.b']" in str(caught.value)
    assert "['s']['a']['b']" in str(caught.value)


def test_a_tensor_in_a_list_collides_with_a_key_of_that_name():
    with pytest.raises(StateError, match=r"s\.a\.0"):
        collect({"a": [torch.ones(1)], "a.0": torch.ones(1)})


def test_keys_that_differ_in_type_only_are_refused():
    with pytest.raises(StateError, match=r"s\.d\.0"):
        collect({"d": {0: torch.ones(1), "0": torch.ones(1)}})


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.empty(2, device="meta"), "meta"),
        (lambda: torch.nn.LazyLinear(2).weight, "uninitialised"),
    ],
    ids=["sparse", "meta", "lazy"],
)
def test_tensors_without_a_plain_payload_are_refused_by_name(tensor, reason):
    with pytest.raises(StateError, match=rf"s\.bad.*{reason}"):
        collect({"bad": tensor()})


def test_values_that_cannot_be_stored_are_refused_by_name():
    with pytest.raises(StateError, match=r"s\.bad"):
        collect({"bad": [object()]})
    with pytest.raises(StateError, match=r"s\.bad is a set"):
        collect({"bad": {torch.ones(1)}})


@pytest.mark.parametrize("kind", [dict, list])
def test_state_that_contains_itself_is_refused(kind):
    state: Any = {"a": {}} if kind is dict else {"a": []}
    if kind is dict:
        state["a"]["again"] = state
    else:
        state["a"].append(state["a"])
    with pytest.raises(StateError, match="contains itself"):
        collect(state)


def test_captured_values_do_not_change_with_the_live_object():
    live: dict[str, Any] = {"history": [1.0, [2.0]], "buffer": bytearray(b"ab")}
    captured = collect(live).captured()
    live["history"][1].append(3.0)
    live["buffer"][0] = 0
    assert captured.values["s", "history"] == [1.0, [2.0]]
    assert captured.stock == {("s", "history"): [1.0, [2.0]], ("s", "buffer"): bytearray(b"ab")}


def test_a_loaded_value_is_a_copy_of_the_stored_one():
    stored = {"a": [1]}
    attach_tensors(stored, {})["a"].append(2)
    assert stored == {"a": [1]}


def test_a_value_that_refers_to_a_missing_tensor_is_corrupt():
    saved = in_memory.save([StatefulComponent(("s",), Box({"l": [torch.ones(1)]}))])
    del saved.payloads["s.l.0"]
    with pytest.raises(CorruptCheckpoint, match=r"s\.l\.0"):
        in_memory.load(saved, [StatefulComponent(("s",), Box())])


@pytest.mark.parametrize("name", ["s", "absent"], ids=["itself", "nothing"])
def test_an_outline_that_refers_to_no_leaf_is_corrupt(name):
    saved = in_memory.save([StatefulComponent(("s",), Box({"b": 1, "a": torch.ones(1)}))])
    assert b'{"$value":"s.b"}' in saved.values["s"]
    saved.values["s"] = saved.values["s"].replace(b'"s.b"', f'"{name}"'.encode())
    with pytest.raises(CorruptCheckpoint, match="refers to"):
        in_memory.load(saved, [StatefulComponent(("s",), Box())])


def test_paths_that_contradict_each_other_are_corrupt():
    names = {"a": ("a",), "a.b": ("a", "b")}
    stored = StoredState(
        tensors={n: StoredTensor(path=p, dtype=torch.float32, shape=()) for n, p in names.items()},
        values={}, value_paths={}, per_rank_of=lambda rank: {}, step=0, saved_world_size=1, rank=0,
        world_size=1, seed_material="",
    )  # fmt: skip
    with pytest.raises(CorruptCheckpoint, match=r"a\.b"):
        rebuild(stored, Targets(tensors={n: torch.ones(()) for n in names}), names, depth=0)
