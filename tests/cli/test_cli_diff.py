"""`dcp-ckpt diff`: what it prints, its options, its exit codes."""

from __future__ import annotations

import pytest
import torch

from tests.cli.commands import as_json, invoke, on_terminal
from tests.ops.exports import saved


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    base = tmp_path_factory.mktemp("runs")
    a = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.zeros(2), "old": torch.ones(1), "lr": 0.5}
    b = {"weight": torch.tensor([[3.0, 4.5]]), "bias": torch.zeros(2).half(), "lr": 0.25}
    return saved(base / "a", a, step=1), saved(base / "b", b, step=2)


def test_it_says_what_differs(refs: tuple[str, str]) -> None:
    result = invoke("diff", *refs)
    assert result.exit_code == 0, result.output
    a, b = (ref.partition("@")[0] for ref in refs)
    assert result.stdout.splitlines() == [
        f"A  {a}/step-00000001: step 1",
        f"B  {b}/step-00000002: step 2",
        "only in A: old",
        "",
        "tensor  dtype               shape  max change  mean change  relative  differ  NaN  inf",
        "bias    float32 -> float16  2      0           0                      0 of 2  0    0",
        "weight  float32             1x2    0.5         0.25         0.1       1 of 2  0    0",
        "",
        "value  A    B",
        "lr     0.5  0.25",
        "",
        "equal: 0 tensors and 0 values; different: 2 tensors and 1 value; only in one: 1",
    ]
    same = invoke("diff", refs[0], refs[0])
    assert same.stdout.splitlines()[2:] == [
        "equal: 3 tensors (3 by their digests) and 1 value; different: 0 tensors and 0 values; only in one: 0"
    ]


def test_json(refs: tuple[str, str]) -> None:
    document = as_json("diff", *refs, "--key", "[wl]*")
    assert document["equal"] is False
    assert document["only_in_a"] == document["only_in_b"] == []
    assert document["values"] == [{"name": "lr", "a": 0.5, "b": 0.25}]
    (weight,) = document["tensors"]
    assert weight["numbers"]["max_abs"] == 0.5
    assert as_json("diff", refs[0], refs[0])["equal"] is True


def test_exit_codes(refs: tuple[str, str]) -> None:
    assert invoke("diff", refs[0], f"{refs[0].partition('@')[0]}@7").exit_code == 3
    assert invoke("diff", *refs, "--key", "nothing").exit_code == 5
    assert invoke("diff", refs[0]).exit_code == 2


def test_the_real_command_on_a_terminal(refs: tuple[str, str]) -> None:
    stdout, _ = on_terminal("diff", *refs, "--json")
    assert stdout.startswith('{"a":')
