"""What an export holds: decided from tables alone, with a reason for everything that is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.ops.exporting.plan import Contents, ExportPlan, plan_export
from dcp_ckpt.ops.exporting.request import ExportRequest


def contents(
    *paths: tuple[str | int, ...],
    values: tuple[str, ...] = (),
    dtype: str = "float32",
    aliases: Mapping[str, str] | None = None,
) -> Contents:
    entries = {
        ".".join(map(str, path)): TensorEntry(
            path=list(map(str, path)), dtype=dtype, shape=[2], mesh=None, placements=[], owners=[[0, 1]]
        )
        for path in paths
    }
    return Contents(
        tensors=entries,
        aliases=aliases or {},
        values=values,
        paths={".".join(map(str, path)): path for path in paths} | {name: (name,) for name in values},
        left_out={},
    )


def plan(what: Contents, format: Any = "safetensors", **options: Any) -> ExportPlan:
    return plan_export(what, ExportRequest(format=format, **options))


def names(found: ExportPlan) -> list[str]:
    return [tensor.name for tensor in found.tensors]


def test_everything_is_exported_or_has_a_reason() -> None:
    what = contents(("model", "a.w"), ("model", "b.w"), ("optimizer", "state", "a.w"), values=("lr",))
    found = plan(what, exclude=("*.b.*",))
    assert names(found) == ["a.w"]
    assert found.left_out == {
        "model.b.w": "excluded",
        "optimizer.state.a.w": "not of a model",
        "lr": "not of a model",
    }
    found = plan(what, include=("*",), format="torch")
    assert names(found) == ["model.a.w", "model.b.w", "optimizer.state.a.w"]
    assert found.left_out == {"lr": "not a tensor, and torch files hold tensors only"}
    found = plan(what, include=("lr", "*.a.w"), format="dcp")
    assert (names(found), [value.name for value in found.values]) == (
        ["model.a.w", "optimizer.state.a.w"],
        ["lr"],
    )
    assert found.left_out == {"model.b.w": "not included"}


def test_a_dcp_directory_is_the_whole_state_unless_the_model_is_changed() -> None:
    what = contents(("model", "w"), ("optimizer", "w"), values=("lr",))
    whole = plan(what, format="dcp")
    assert (names(whole), len(whole.values)) == (["model.w", "optimizer.w"], 1)
    assert [tensor.path for tensor in whole.tensors] == [("model", "w"), ("optimizer", "w")]
    assert names(plan(what, format="dcp", dtype="bfloat16")) == ["model.w"]


def test_layers_follow_each_other_as_numbers() -> None:
    what = contents(*(("model", f"layers.{number}.w") for number in (10, 2, 1)), ("model", "head"))
    assert names(plan(what)) == ["head", "layers.1.w", "layers.2.w", "layers.10.w"]


@pytest.mark.parametrize(
    ("paths", "options", "prefix"),
    [
        ([("model", "w")], {}, "model."),
        ([("model", "gen", "w"), ("model", "dis", "w")], {}, "model."),
        ([("model", "gen", "w"), ("model", "dis", "w")], {"include": ("model.gen.*",)}, "model.gen."),
        ([("model", 0, "w"), ("model", 1, "w")], {"exclude": ("model.1.*",)}, "model.0."),
        # One key alone may as well be a part of the one model's names.
        ([("model", "encoder", "w")], {}, "model."),
        # Extra state has a longer path than the parameters of the same model.
        ([("model", "w"), ("model", "x._extra_state", "a")], {"include": ("*.a",)}, "model."),
        ([("model", "w"), ("ema", "w")], {"include": ("*",)}, ""),
        ([("net", "w")], {"include": ("*",)}, ""),
        # A flat state: the names of its keys are its own.
        ([("model.layers.w",)], {"include": ("*",)}, ""),
        ([("ema", "w")], {"include": ("*",), "strip_prefix": "ema"}, "ema."),
        ([("model", "w")], {"strip_prefix": ""}, ""),
        ([("model", "w")], {"format": "dcp"}, ""),
    ],
    ids=str,
)
def test_what_names_lose(paths: list[tuple[str | int, ...]], options: dict[str, Any], prefix: str) -> None:
    assert plan(contents(*paths), **options).prefix == prefix


def test_a_tied_tensor_is_one_with_the_names_that_were_chosen() -> None:
    paths = [("model", "a.head"), ("model", "b.embedding")]
    what = contents(*paths, aliases={"model.a.head": "model.b.embedding"})
    for format in ("safetensors", "torch", "dcp"):
        prefix = "model." if format == "dcp" else ""
        (tensor,) = plan(what, format=format).tensors
        assert tensor.names == (f"{prefix}b.embedding", f"{prefix}a.head")
        (tensor,) = plan(what, format=format, exclude=("*.embedding",)).tensors
        assert tensor.names == (f"{prefix}a.head",)


def test_floating_dtypes_are_converted_and_no_others() -> None:
    for dtype, converted in (
        ("float32", "bfloat16"),
        ("float8_e4m3fn", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("int64", "int64"),
        ("bool", "bool"),
        ("complex64", "complex64"),
    ):
        (tensor,) = plan(contents(("model", "w"), dtype=dtype), dtype="bfloat16").tensors
        assert tensor.dtype == converted
        assert tensor.stored_dtype == dtype
