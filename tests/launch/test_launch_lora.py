"""Adapters: the model without them is untouched, and they have the names that others fuse them by."""

from __future__ import annotations

import torch

from launch.lora import ADAPTERS, LoraLinear, add_adapters
from launch.model import GPT, ModelConfig

CONFIG = ModelConfig(num_layers=2, width=32, num_heads=4, context=16)
TOKENS = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))


def adapted(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    add_adapters(model, model.blocks, rank=4, seed=seed)
    return model


def test_names_are_those_of_the_base_and_the_adapters_beside_them():
    base, model = GPT(CONFIG).state_dict(), adapted().state_dict()
    added = model.keys() - base.keys()
    assert base.keys() < model.keys()
    linears = [
        f"blocks.{block}.{name}"
        for block in (0, 1)
        for name in ("attention.qkv", "attention.out", "mlp_in", "mlp_out")
    ]
    assert added == {f"{linear}.lora_{part}" for linear in linears for part in ("a", "b", "scale")}
    assert model["blocks.0.mlp_in.lora_a"].shape == (4, 32)
    assert model["blocks.0.mlp_in.lora_b"].shape == (128, 4)
    assert model["blocks.0.mlp_in.lora_scale"].shape == ()
    assert ADAPTERS == "*.lora_*"


def test_an_adapter_corrects_nothing_at_first_and_then_by_its_product():
    base, model = GPT(CONFIG), adapted()
    assert torch.equal(model(TOKENS), base(TOKENS))
    layer = model.blocks["0"].mlp_in
    assert isinstance(layer, LoraLinear)
    torch.nn.init.normal_(layer.lora_b)
    fused = torch.nn.Linear(32, 128)
    fused.weight.data = layer.weight + layer.lora_scale * layer.lora_b @ layer.lora_a
    fused.bias = layer.bias
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x), fused(x))


def test_only_adapters_are_trained_and_all_of_them():
    model = adapted()
    model(TOKENS).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None) == (".lora_" in name), name


def test_the_seed_decides_the_adapters():
    first, same, other = (adapted(seed).state_dict()["blocks.1.mlp_out.lora_a"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
