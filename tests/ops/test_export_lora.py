"""Fused adapters: merged weights are those of the arithmetic in memory, and the plain model acts the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_ckpt import TrainState, export
from dcp_ckpt.errors import StateMismatch
from dcp_ckpt.ops.exporting.lora import has_adapters
from tests.ops.exports import files, read_safetensors, same_bits, saved


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, under the names of the training driver."""

    lora_scale: torch.Tensor

    def __init__(self, width: int, height: int, *, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(height, width).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(height).to(dtype), requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(rank, width))
        self.lora_b = nn.Parameter(torch.randn(height, rank))
        self.register_buffer("lora_scale", torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return nn.functional.linear(x, self.weight, self.bias) + self.lora_scale * low


def network(make: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(13, 8), make(8, 20), nn.Tanh(), make(20, 13))


def adapted(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return network(lambda width, height: Adapted(width, height, rank=2, dtype=dtype))


def merged_in_memory(model: nn.Sequential) -> dict[str, torch.Tensor]:
    """The tensors of the plain model: in float32, or float64 if the weight is, rounded once."""
    merged = {name: one for name, one in model.state_dict().items() if "lora" not in name}
    for number, layer in enumerate(model):
        if isinstance(layer, Adapted):
            compute = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
            delta = layer.lora_scale.item() * (layer.lora_b.to(compute) @ layer.lora_a.to(compute))
            merged[f"{number}.weight"] = (layer.weight.to(compute) + delta).to(layer.weight.dtype)
    return {name: one.detach() for name, one in merged.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merged_weights_are_those_of_the_arithmetic_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(dtype)
    ref = saved(tmp_path / "run", TrainState(model=model))
    report = export(ref, tmp_path / "out", fuse_lora=True)
    same_bits(read_safetensors(tmp_path / "out"), merged_in_memory(model))
    assert report.num_fused == 2
    assert report.left_out["fused into their weights"] == 6


def test_the_plain_model_gives_the_same_logits(tmp_path: Path) -> None:
    model = adapted()
    ref = saved(tmp_path / "run", TrainState(model=model))
    export(ref, tmp_path / "merged.pt", format="torch", fuse_lora=True)
    plain = network(nn.Linear)
    plain.load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True))
    tokens = torch.arange(13)
    torch.testing.assert_close(plain(tokens), model(tokens))
    assert not torch.allclose(plain(tokens), network(nn.Linear)(tokens))


def test_what_is_converted_as_well_is_rounded_once(tmp_path: Path) -> None:
    model = adapted(torch.bfloat16)
    ref = saved(tmp_path / "run", TrainState(model=model))
    export(ref, tmp_path / "out", fuse_lora=True, dtype="float32")
    layer = model[1]
    assert isinstance(layer, Adapted)
    right = layer.weight.float() + layer.lora_scale.item() * (layer.lora_b @ layer.lora_a)
    assert torch.equal(read_safetensors(tmp_path / "out")["1.weight"], right.detach())


def test_a_large_weight_is_merged_some_rows_at_a_time(tmp_path: Path) -> None:
    """Several windows; how rows are grouped may change the last bit of a product."""
    torch.manual_seed(0)
    weight, down, up = torch.randn(1500, 2048), torch.randn(4, 2048), torch.randn(1500, 4)
    model = {"w.weight": weight, "w.lora_a": down, "w.lora_b": up, "w.lora_scale": torch.tensor(2.0)}
    ref = saved(tmp_path / "run", {"model": model})
    export(ref, tmp_path / "out", fuse_lora=True)
    found = read_safetensors(tmp_path / "out")["w.weight"]
    torch.testing.assert_close(found, weight + 2.0 * (up @ down), rtol=1e-6, atol=1e-6)
    rows = 512  # 4 MiB of float32
    in_groups = [weight[i : i + rows] + 2.0 * (up[i : i + rows] @ down) for i in range(0, 1500, rows)]
    assert torch.equal(found, torch.cat(in_groups))


def test_without_fusing_adapters_are_exported_as_they_are_and_that_is_said(tmp_path: Path) -> None:
    model = adapted()
    report = export(saved(tmp_path / "run", TrainState(model=model)), tmp_path / "out")
    same_bits(read_safetensors(tmp_path / "out"), dict(model.state_dict()))
    assert report.num_fused == 0
    assert "fuse_lora merges them" in report.notes[0]


def test_a_merged_state_for_stock_dcp_has_the_names_of_the_plain_model(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = adapted()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    ref = saved(tmp_path / "run", TrainState(model=model, optimizer=optimizer))
    export(ref, tmp_path / "out", format="dcp", fuse_lora=True)
    dcp_to_torch_save(tmp_path / "out", tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", weights_only=False)
    assert state.keys() == {"model"}
    same_bits(state["model"], merged_in_memory(model))


def test_an_adapter_on_one_of_several_tied_names_unties_it(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(13, 8)
            self.head = Adapted(8, 13, rank=2, dtype=torch.float32)
            self.embedding.weight = self.head.weight

    model = Net()
    ref = saved(tmp_path / "run", TrainState(model=model))
    report = export(ref, tmp_path / "model.pt", format="torch", fuse_lora=True)
    assert report.notes == (
        "model.head.weight is tied to other names, which keep the weight without its adapter: load it untied",
    )
    found = torch.load(report.path, weights_only=True)
    assert torch.equal(found["embedding.weight"], model.embedding.weight)
    delta = model.head.lora_scale.item() * (model.head.lora_b @ model.head.lora_a)
    assert torch.equal(found["head.weight"], model.embedding.weight + delta)


def peft_model() -> dict[str, torch.Tensor]:
    """What `peft` calls a model with one adapted layer, and a head that is trained whole."""
    torch.manual_seed(0)
    start = "base_model.model.layers.0.q"
    return {
        f"{start}.base_layer.weight": torch.randn(6, 4),
        f"{start}.base_layer.bias": torch.randn(6),
        f"{start}.lora_A.default.weight": torch.randn(2, 4),
        f"{start}.lora_B.default.weight": torch.randn(6, 2),
        "base_model.model.embed.weight": torch.randn(5, 4),
        "base_model.model.head.original_module.weight": torch.randn(5, 6),
        "base_model.model.head.modules_to_save.default.weight": torch.randn(5, 6),
    }


def test_names_of_peft(tmp_path: Path) -> None:
    model = peft_model()
    ref = saved(tmp_path / "run", {"model": model})
    export(ref, tmp_path / "out", fuse_lora=True, lora_alpha=5)
    q = "base_model.model.layers.0.q"
    product = model[f"{q}.lora_B.default.weight"] @ model[f"{q}.lora_A.default.weight"]
    right = {
        "layers.0.q.weight": model[f"{q}.base_layer.weight"] + 2.5 * product,
        "layers.0.q.bias": model[f"{q}.base_layer.bias"],
        "embed.weight": model["base_model.model.embed.weight"],
        "head.weight": model["base_model.model.head.modules_to_save.default.weight"],
    }
    same_bits(read_safetensors(tmp_path / "out"), right)


def test_two_tensors_with_one_name_in_the_merged_model_are_refused(tmp_path: Path) -> None:
    model = peft_model() | {"embed.weight": torch.ones(5, 4)}
    ref = saved(tmp_path / "run", {"model": model})
    with pytest.raises(StateMismatch, match=r"model.embed.weight would both be called embed.weight: exclude"):
        export(ref, tmp_path / "out", fuse_lora=True, lora_alpha=2)


def test_one_of_several_peft_adapters(tmp_path: Path) -> None:
    model = peft_model()
    q = "base_model.model.layers.0.q"
    for part in ("A", "B"):
        model[f"{q}.lora_{part}.other.weight"] = 2 * model[f"{q}.lora_{part}.default.weight"]
    ref = saved(tmp_path / "run", {"model": model})
    with pytest.raises(StateMismatch, match=r"several adapters, default, other: exclude all but one"):
        export(ref, tmp_path / "out", fuse_lora=True, lora_alpha=2)
    export(ref, tmp_path / "out", fuse_lora=True, lora_alpha=2, exclude="*.lora_?.default.*")
    product = 4 * (model[f"{q}.lora_B.default.weight"] @ model[f"{q}.lora_A.default.weight"])
    found = read_safetensors(tmp_path / "out")["layers.0.q.weight"]
    torch.testing.assert_close(found, model[f"{q}.base_layer.weight"] + product)


def parts(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """One adapted layer; None takes a tensor away."""
    whole: dict[str, torch.Tensor | None] = {
        "q.weight": torch.ones(6, 4),
        "q.lora_a": torch.ones(2, 4),
        "q.lora_b": torch.ones(6, 2),
        "q.lora_scale": torch.tensor(1.0),
    }
    whole |= {name.replace("__", "."): one for name, one in changes.items()}
    return {name: one for name, one in whole.items() if one is not None}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (parts(q__weight=None), {}, r"model.q.lora_a has no base: there is no model.q.weight"),
        (parts(), {"exclude": "model.q.weight"}, "has no base: .* among what is exported"),
        (parts(q__lora_a=None), {}, "model.q has no lora_a"),
        (parts(q__lora_scale=None), {}, r"model.q has no scale: give lora_alpha.*lora_alpha / 2"),
        (parts(q__lora_scale=torch.ones(1)), {}, r"lora_scale is float32 of shape \[1\], not a 0-dim"),
        (parts(q__lora_scale=torch.tensor(torch.inf)), {}, "model.q.lora_scale of an adapter is inf"),
        (parts(), {"lora_alpha": 4.0}, "holds the scale of model.q: leave lora_alpha out"),
        (
            parts(q__lora_b=torch.ones(5, 2)),
            {},
            r"lora_b \[5, 2\] times model.q.lora_a \[2, 4\] does not give",
        ),
        (parts(q__lora_b=torch.ones(6, 3)), {}, r"does not give the shape \[6, 4\] of model.q.weight"),
        (parts(q__weight=torch.ones(6, 4, dtype=torch.int8)), {}, "q.weight is int8 of shape.*only floating"),
        (parts(q__weight=torch.ones(6, 4, 1)), {}, "only floating matrices"),
        (parts(q__lora_magnitude_vector=torch.ones(6)), {}, "lora_magnitude_vector is of a kind"),
        ({"q.weight": torch.ones(2, 2)}, {}, "no LoRA adapters to fuse"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(
    tmp_path: Path, model: dict[str, torch.Tensor], options: dict[str, Any], message: str
) -> None:
    ref = saved(tmp_path / "run", {"model": model})
    with pytest.raises(StateMismatch, match=message):
        export(ref, tmp_path / "out", fuse_lora=True, **options)
    assert files(tmp_path / "out") == {}


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    model = parts(q__lora_a=None, p__lora_a=torch.ones(2, 4), p__lora_b=torch.ones(2, 2))
    with pytest.raises(StateMismatch, match=r"p.lora_a has no base: .*; model.q has no lora_a") as caught:
        export(saved(tmp_path / "run", {"model": model}), tmp_path / "out", fuse_lora=True)
    assert "there is no model.p.weight" in caught.value.message


def test_a_scale_from_the_command_where_none_is_stored(tmp_path: Path) -> None:
    ref = saved(tmp_path / "run", {"model": parts(q__lora_scale=None)})
    export(ref, tmp_path / "out", fuse_lora=True, lora_alpha=3)
    assert torch.equal(read_safetensors(tmp_path / "out")["q.weight"], torch.full((6, 4), 1 + 1.5 * 2))


def test_names_that_only_look_like_those_of_adapters() -> None:
    assert has_adapters(["model.q.lora_a"])
    assert has_adapters(["lora_a"])
    assert not has_adapters(["model.explora_a", "model.lora.weight"])
