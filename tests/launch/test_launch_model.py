"""The driver's model: repeatable, causal, able to learn."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from launch.model import GPT, ModelConfig

CONFIG = ModelConfig(num_layers=2, width=32, num_heads=4, context=16)


def tokens(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (batch, CONFIG.context), generator=torch.Generator().manual_seed(seed))


def test_seed_decides_the_weights_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    first, same, other = (GPT(CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    GPT(CONFIG, seed=1)(tokens())
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    torch.manual_seed(0)
    assert torch.equal(first["head.weight"], GPT(CONFIG, seed=1).state_dict()["head.weight"])
    torch.set_rng_state(before)


def test_no_position_sees_what_comes_after_it():
    model = GPT(CONFIG)
    original = tokens()
    changed = original.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    torch.testing.assert_close(model(original)[:, :9], model(changed)[:, :9])
    assert not torch.allclose(model(original)[:, 9:], model(changed)[:, 9:])


def test_dropout_acts_in_training_mode_only():
    model = GPT(CONFIG, dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_it_learns_a_batch():
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = tokens()[:, :-1], tokens()[:, 1:].flatten()
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_stages_put_together_are_the_model_under_the_same_names():
    config = ModelConfig(num_layers=3, width=32, num_heads=4, context=16)
    whole, stages = GPT(config), [GPT(config) for _ in range(2)]
    for number, stage in enumerate(stages):
        stage.keep_stage(number, 2)
    assert torch.equal(stages[1](stages[0](tokens())), whole(tokens()))
    first, second = (stage.state_dict() for stage in stages)
    assert not first.keys() & second.keys()
    assert first.keys() | second.keys() == whole.state_dict().keys()
    assert {"bytes.weight", "blocks.0.mlp_in.weight"} < first.keys()
    assert {"head.weight", "blocks.2.mlp_in.weight"} < second.keys()


def test_autocast_computes_products_in_its_dtype_and_keeps_the_parameters():
    model = GPT(CONFIG, autocast=torch.bfloat16)
    assert model(tokens()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
