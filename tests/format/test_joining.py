"""Values of which ranks store parts: the whole, and what makes parts contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.fragment import ValueEntry
from dcp_ckpt.format.joining import EQUAL, common_digest, join_values
from dcp_ckpt.format.values import decode_value, encode_value


def entry(value: Any, join: str | None = "params") -> ValueEntry:
    return ValueEntry(path=["optimizer", "groups"], value=encode_value(value, path="test"), join=join)


def joined(*parts: ValueEntry) -> Any:
    """The whole of parts that ranks 0, 2, 4, ... store."""
    found = join_values((2 * index, {"groups": part}) for index, part in enumerate(parts))
    return decode_value(found["groups"].value, path="test")


def groups(*members: list[str], **settings: Any) -> list[dict[str, Any]]:
    # In no sorted order, as optimizers keep it: the encoding has another spelling for that.
    return [{"params": names, "lr": 0.1, **settings} for names in members]


def test_lists_are_put_together_group_by_group_each_name_once():
    found = joined(
        entry(groups(["a", "tied"], [])), entry(groups(["b"], ["c"])), entry(groups(["tied"], ["d"]))
    )
    assert found == groups(["a", "tied", "b"], ["c", "d"])
    assert list(found[0]) == ["params", "lr"], "in the order in which they were"


def test_sorted_keys_are_joined_as_well():
    assert joined(entry([{"lr": 1, "params": ["a"]}]), entry([{"lr": 1, "params": ["b"]}])) == [
        {"lr": 1, "params": ["a", "b"]}
    ]


def test_a_part_alone_is_the_whole_and_equal_parts_are_one():
    assert joined(entry({"step": 3}, None)) == {"step": 3}
    assert joined(entry(groups(["a"]))) == groups(["a"])
    assert joined(entry({"step": 3}, EQUAL), entry({"step": 3}, EQUAL)) == {"step": 3}


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (
            entry(groups(["a"])),
            entry(groups(["b"], eps=1)),
            "groups[0].eps differs between rank 0 and rank 2",
        ),
        (entry(groups(["a"], lr=0.1)), entry(groups(["b"], lr=0.2)), "groups[0].lr differs between rank 0"),
        (entry(groups(["a"])), entry(groups(["b"], [])), "1 groups on rank 0 and 2 on rank 2"),
        (entry({"step": 3}, EQUAL), entry({"step": 4}, EQUAL), "groups differs between rank 0 and rank 2"),
        (entry({"step": 3}, None), entry({"step": 3}, None), "groups is stored by rank 0 and by rank 2"),
        (entry(groups(["a"])), entry(groups(["a"]), EQUAL), "groups is stored by rank 0 and by rank 2"),
        (entry(5), entry(6), "groups differs"),
        (entry([{"lr": 1}]), entry([{"lr": 1}]), "without a list of names in 'params'"),
        (entry([{"params": [1]}]), entry([{"params": [2]}]), "without a list of names in 'params'"),
        (entry([{1: 2}]), entry([{1: 2}]), "without a list of names"),
        (entry("text"), entry("text"), "without a list of names"),
    ],
)
def test_parts_that_contradict_each_other_are_named(first, second, problem):
    with pytest.raises(CorruptCheckpoint) as caught:
        joined(first, second)
    assert problem in str(caught.value)


def test_what_parts_have_in_common_does_not_depend_on_their_lists():
    assert common_digest(entry(groups(["a"]))) == common_digest(entry(groups(["b"])))
    assert common_digest(entry(groups(["a"], lr=1))) != common_digest(entry(groups(["a"], lr=2)))
    assert common_digest(entry(3, EQUAL)) != common_digest(entry(4, EQUAL))


@pytest.mark.parametrize("damaged", [{"$dict": 5}, {"$dict": None}, {"$dict": ["ab"]}, {"$dict": [[1, 2]]}])
def test_groups_that_are_no_typed_value_are_refused_like_other_damage(damaged):
    part = ValueEntry(path=["groups"], value=[damaged], join="params")
    assert len(common_digest(part)) == 32
    with pytest.raises(CorruptCheckpoint, match="without a list of names"):
        join_values((rank, {"groups": part}) for rank in range(2))
