"""What fits is decided by all ranks together: one message on all of them, or a load on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint
from tests.distributed import worlds

pytestmark = pytest.mark.distributed


class Layers(nn.Module):
    def __init__(self, **layers: tuple[tuple[int, ...], torch.dtype]) -> None:
        super().__init__()
        for name, (shape, dtype) in layers.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=False))


PLAIN = ((2, 2), torch.float32)


def save(path: str) -> None:
    model = Layers(same=PLAIN, taller=PLAIN, wider=PLAIN, old_scale=PLAIN, old_shift=PLAIN)
    state = TrainState(model=model, extra={"a": torch.arange(3), "b": 5})
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state, step=1).result(30)
        checkpointer.save(worlds.known_state(blank=False), step=2).result(30)


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    pool.run(save, 2, str(path))
    return path


GOLDEN = """\
the checkpoint does not fit this state (7 problems); nothing was changed
  missing (3):
    model.new_scale: the model has it, the checkpoint does not; did you mean model.old_scale?
    model.gain: the model has it, the checkpoint does not
    extra.c: the live state has it, the checkpoint does not
  unexpected (2):
    model.old_scale: the checkpoint has it, the model does not
    model.old_shift: the checkpoint has it, the model does not
  shape (1):
    model.taller: checkpoint [2, 2], state [3, 2]
  dtype (1):
    model.wider: checkpoint torch.float32, state torch.float64
  cast=("model.wider",) converts these while they are read
  exclude=("model.new_scale", "model.gain", "extra.c", "model.old_scale", "model.old_shift", "model.taller") \
leaves these as they are in the state"""


def refused(directory: str) -> tuple[str, str, bool]:
    model = Layers(
        same=PLAIN,
        taller=((3, 2), torch.float32),
        wider=((2, 2), torch.float64),
        new_scale=PLAIN,
        gain=PLAIN,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    extra: dict[str, Any] = {"a": torch.zeros(3, dtype=torch.int64), "b": 0, "c": 1}
    rng = torch.get_rng_state()
    state = TrainState(model=model, extra=extra)
    kind, message = worlds.outcome(lambda: load_checkpoint(directory, state, config=worlds.config()))
    untouched = not any(parameter.any() for parameter in model.parameters()) and extra["b"] == 0
    return kind, message, untouched and not extra["a"].any() and torch.equal(rng, torch.get_rng_state())


def test_all_that_does_not_fit_is_in_one_message_on_all_ranks(pool, saved):
    directory = saved / "step-00000001"
    results = pool.run(refused, 3, str(directory))
    assert results == [("StateMismatch", f"{GOLDEN} [step 1, phase diff, path {directory}]", True)] * 3


def part_of_rank(directory: str, exclude: tuple[str, ...]) -> tuple[tuple[str, str], dict[str, Any]]:
    """Each rank holds a part of the state, like stages of a pipeline; rank 2 wants what is not stored."""
    rank = dist.get_rank()
    parts: list[dict[str, Any]] = [{"a": torch.zeros(3, dtype=torch.int64)}, {"b": 0}, {"b": 0, "d": 0}]
    extra = parts[rank]
    model = (
        Layers(same=PLAIN) if rank else Layers(taller=PLAIN, wider=PLAIN, old_scale=PLAIN, old_shift=PLAIN)
    )
    state = TrainState(model=model, extra=extra)
    config = worlds.config()
    return worlds.outcome(lambda: load_checkpoint(directory, state, exclude=exclude, config=config)), extra


def test_what_some_rank_has_a_use_for_is_not_unexpected(pool, saved):
    directory = str(saved / "step-00000001")
    loaded = pool.run(part_of_rank, 2, directory, ())
    assert [result for result, _ in loaded] == [("ok", "")] * 2
    assert torch.equal(loaded[0][1]["a"], torch.arange(3))
    assert loaded[1][1]["b"] == 5

    results = pool.run(part_of_rank, 3, directory, ())
    (kind, message), *others = (result for result, _ in results)
    assert kind == "StateMismatch"
    assert "1 problem)" in message
    assert "extra.d: the live state has it, the checkpoint does not (rank 2)" in message
    assert "unexpected" not in message
    assert others == [(kind, message)] * 2


def test_a_glob_that_matches_on_one_rank_only_is_no_mistake(pool, saved):
    directory = str(saved / "step-00000001")
    results = pool.run(part_of_rank, 3, directory, ("extra.d",))
    assert [result for result, _ in results] == [("ok", "")] * 3
    assert results[2][1] == {"b": 5, "d": 0}
    results = pool.run(part_of_rank, 3, directory, ("extra.d", "extra.e"))
    (kind, message), *others = (result for result, _ in results)
    assert kind == "ConfigError"
    assert message.startswith("exclude: 'extra.e' matches nothing in the state or the checkpoint")
    assert others == [(kind, message)] * 2


CAST = {"rows.large": torch.float32, "columns.large": torch.bfloat16, "strided.rows": torch.float64}


def load_some(directory: str) -> list[str]:
    """Everything under another name; some in another precision, some not at all. What is wrong."""
    right = {f"known.{name}": tensor for name, tensor in worlds.known_state(blank=False).items()}
    live = {f"known.{name}": tensor for name, tensor in worlds.known_state(blank=True).items()}
    for name, dtype in CAST.items():
        for state in (right, live):
            state[f"known.{name}"] = state[f"known.{name}"].to(dtype)
    skipped = [name for name in live if name.startswith("known.hybrid.") or name.endswith(".flags")]
    right |= {name: live[name].clone() for name in skipped}
    report = load_checkpoint(
        directory,
        {"known": {name.removeprefix("known."): tensor for name, tensor in live.items()}},
        rename={"": "known"},
        exclude=("known.hybrid.*", "*.flags"),
        cast=tuple(f"known.{name}" for name in CAST),
        config=worlds.config(),
    )
    wrong = [name for name in live if not worlds.same_bits(live[name], right[name])]
    assert sorted(item.name for item in report.cast) == sorted(f"known.{name}" for name in CAST)
    assert sorted(report.skipped) == sorted(skipped)
    return wrong


@pytest.mark.parametrize("world", [1, 3, 4])
def test_shards_of_every_layout_are_renamed_cast_and_left_out(pool, saved, world):
    assert pool.run(load_some, world, str(saved / "step-00000002")) == [[]] * world
