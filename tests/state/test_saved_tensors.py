"""Tensors of every kind, really saved and loaded: bits, place and layout stay, or the save names them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint, open_checkpoint
from dcp_ckpt.errors import LoadError, StateError, StateMismatch
from dcp_ckpt.format.dtypes import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every byte pattern may come up, but for bools."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    data = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


class Marked(torch.Tensor):
    """A subclass that is a plain tensor, too."""


def in_inference_mode(*shape: int) -> torch.Tensor:
    with torch.inference_mode():
        return numbers(*shape).clone()


complex_numbers = numbers(3, 4, dtype=torch.complex64)
KINDS: dict[str, Callable[[], torch.Tensor]] = {
    **{name: partial(numbers, 5, 3, dtype=getattr(torch, name)) for name in DTYPES},
    "0-dim": lambda: numbers(dtype=torch.float64),
    "channels last": lambda: numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "conjugate": lambda: complex_numbers.clone().conj(),
    "empty": lambda: numbers(0, 3),
    "every other": lambda: numbers(9, 6)[::2, 1::3],
    "flipped": lambda: numbers(4, 4).flip(0).t(),
    "imaginary": lambda: complex_numbers.clone().conj().imag,
    "inference": lambda: in_inference_mode(5),
    "inference, transposed": lambda: in_inference_mode(4, 3).t(),
    "marked": lambda: numbers(4).as_subclass(Marked),
    "negated": lambda: torch._neg_view(numbers(4, 4)),
    "parameter": lambda: nn.Parameter(numbers(3)),
    "part of a storage": lambda: numbers(1000)[500:510],
    "requires grad": lambda: numbers(3).requires_grad_(),
    "result": lambda: numbers(3).requires_grad_() * 1,
    "transposed": lambda: numbers(4, 6).t(),
    "transposed conjugate": lambda: complex_numbers.clone().mH,
}


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.as_subclass(torch.Tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


def save(path: Path, state: Any) -> str:
    with Checkpointer(path) as checkpointer:
        return checkpointer.save(state, step=1).result(30).path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("tensors"), {kind: make() for kind, make in KINDS.items()})


def test_bits_come_back_into_the_live_tensors(saved):
    live: dict[str, Any] = {}
    for kind, make in KINDS.items():
        live[kind] = make()
        with torch.inference_mode(live[kind].is_inference()), torch.no_grad():
            live[kind].zero_()
    places = {kind: (id(t), t.data_ptr(), t.stride(), t.requires_grad, type(t)) for kind, t in live.items()}
    load_checkpoint(saved, live)
    for kind, make in KINDS.items():
        tensor = live[kind]
        assert bits(tensor) == bits(make()), kind
        assert (
            id(tensor), tensor.data_ptr(), tensor.stride(), tensor.requires_grad, type(tensor)
        ) == places[kind], kind  # fmt: skip


def test_bits_are_stored_as_those_of_a_plain_tensor(saved):
    with open_checkpoint(saved) as checkpoint:
        for kind, make in KINDS.items():
            found = checkpoint.read_tensor(kind)
            assert (found.dtype, found.shape) == (make().dtype, make().shape), kind
            assert bits(found) == bits(make()), kind
            assert found.is_contiguous()


class Wrapping(torch.Tensor):
    """Holds another tensor and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        made: Wrapping = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


def freed() -> torch.Tensor:
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short() -> torch.Tensor:
    tensor = torch.ones(6, 6)[::2, ::2]
    tensor.untyped_storage().resize_(100)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "coo": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "cut short": (cut_short, "storage was freed or made smaller"),
    "fake": (fake, "FakeTensor"),
    "four bits": (lambda: torch.empty(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
    "freed": (freed, "storage was freed or made smaller"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "NestedTensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "quantized"),
    "wrapping": (lambda: Wrapping(torch.ones(2)), "Wrapping"),
}


def test_what_has_no_plain_bytes_fails_the_save_by_name(tmp_path):
    with warnings.catch_warnings(), Checkpointer(tmp_path) as checkpointer:
        warnings.simplefilter("ignore")  # torch announces the end of some kinds
        for step, (kind, (make, reason)) in enumerate(REFUSED.items()):
            state = {"good": torch.ones(2), "bad": {"here": [make()] if step % 2 else make()}}
            handle = checkpointer.save(state, step=step)
            with pytest.raises(StateError) as caught:
                handle.result(30)
            assert "bad.here" in caught.value.message, kind
            assert reason in caught.value.message, kind
        checkpointer.save({"good": torch.ones(2)}, step=99).result(30)


def test_what_has_no_memory_is_not_filled_silently(tmp_path):
    step = save(tmp_path, TrainState(model=nn.Linear(3, 3), extra={"t": torch.ones(5)}, rng=False))
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    for tensor in (torch.ones(5, device="meta"), freed()):
        with pytest.raises(StateMismatch) as caught:
            load_checkpoint(step, TrainState(model=model, extra={"t": tensor}, rng=False))
        assert "model.weight: cannot be filled: it is on the meta device" in caught.value.message
        assert "extra.t: cannot be filled" in caught.value.message


def test_modes_of_the_caller_change_nothing(tmp_path):
    """In inference mode, and with another default device, what is made here stays writable and on the CPU."""

    def make() -> Any:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        extra: dict[str, Any] = {"list": [], "none": None}
        return TrainState(model=model, optimizer=optimizer, extra=extra)

    def train(state: Any) -> torch.Tensor:
        state.model(torch.ones(1, 3)).sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        return state.model.weight.detach().clone()  # type: ignore[no-any-return]

    source, target = make(), make()
    source.extra.update(list=[torch.arange(3)], none=torch.arange(2))
    train(source)
    with Checkpointer(tmp_path) as checkpointer:
        with torch.inference_mode(), torch.device("meta"):
            checkpointer.save(source, step=1).result(30)
        path = checkpointer.save(source, step=2).result(30).path
    with torch.inference_mode(), torch.device("meta"):
        load_checkpoint(path, target)
    assert torch.equal(target.extra["list"][0].add_(1), torch.arange(1, 4))
    assert torch.equal(target.extra["none"], torch.arange(2))
    assert torch.equal(train(target), train(source))


class Masked(nn.Module):
    """With a buffer that many modules would expand to save memory."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)


def test_an_expanded_buffer_stays_expanded(tmp_path):
    row = torch.arange(4.0)
    step = save(tmp_path, TrainState(model=Masked(row.expand(1000, 4)), rng=False))
    live = Masked(torch.zeros(4).expand(1000, 4))
    mask = live.mask
    load_checkpoint(step, TrainState(model=live, rng=False))
    assert live.mask is mask
    assert mask.stride() == (0, 1)
    assert torch.equal(mask, row.expand(1000, 4))
    whole = Masked(torch.zeros(1000, 4))
    load_checkpoint(step, TrainState(model=whole, rng=False))
    assert torch.equal(whole.mask, mask)


def test_different_elements_never_go_into_one(tmp_path):
    step = save(tmp_path, TrainState(model=Masked(torch.arange(8.0).reshape(2, 4)), rng=False))
    with pytest.raises(LoadError, match=r"model\.mask shares its memory with .* itself \(expand\)"):
        load_checkpoint(step, TrainState(model=Masked(torch.zeros(4).expand(2, 4)), rng=False))


def two_over_one_memory() -> Any:
    """As code does that ties weights by their data."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight.data = model["a"].weight.data
    return model


def test_memory_that_two_parameters_share_takes_equal_contents_only(tmp_path):
    source, live = two_over_one_memory(), two_over_one_memory()
    with torch.no_grad():
        source["a"].weight.fill_(2.0)
    load_checkpoint(
        save(tmp_path / "one", TrainState(model=source, rng=False)), TrainState(model=live, rng=False)
    )
    assert live["b"].weight.tolist() == [[2.0] * 3] * 3
    apart = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    step = save(tmp_path / "two", TrainState(model=apart, rng=False))
    with pytest.raises(LoadError, match=r"model\.b\.weight shares its memory with other tensors"):
        load_checkpoint(step, TrainState(model=live, rng=False))


def test_views_of_the_same_memory_are_stored_once(tmp_path):
    def make(value: float) -> dict[str, Any]:
        model = nn.Linear(100, 100, bias=False)
        with torch.no_grad():
            model.weight.fill_(value)
        weight = model.weight.detach()
        return {
            "model": model, "again": dict(model.state_dict()), "rows": weight[:50], "turned": weight.t(),
            "number": weight[0, 0], "bits": weight.view(torch.int32), "ends": [weight[100:], weight[:0]],
        }  # fmt: skip

    source, live = make(3.0), make(0.0)
    with torch.no_grad():
        source["model"].weight[2, 5] = 7.0
    step = save(tmp_path, source)
    with open_checkpoint(step) as checkpoint:
        assert checkpoint.aliases == {"model.weight": ("again.weight",)}
    load_checkpoint(step, live)
    assert torch.equal(live["model"].weight, source["model"].weight)
    with torch.no_grad():
        live["model"].weight.zero_()
    for name in ("rows", "turned", "number", "bits"):
        assert not live[name].any(), f"{name} is a view still"


def test_one_placeholder_under_several_keys_becomes_several_tensors(tmp_path):
    step = save(tmp_path, {"a": torch.ones(2), "b": torch.zeros(2), "list": [torch.ones(3), torch.zeros(3)]})
    placeholder, entry = torch.full((2,), 5.0), torch.full((3,), 5.0)
    live: Any = {"a": placeholder, "b": placeholder, "list": [entry, entry]}
    load_checkpoint(step, live)
    assert live["a"] is placeholder
    assert (live["a"].tolist(), live["b"].tolist()) == ([1.0, 1.0], [0.0, 0.0])
    assert [tensor.tolist() for tensor in live["list"]] == [[1.0] * 3, [0.0] * 3]


def test_overlapping_views_come_back_overlapping(tmp_path):
    def make(base: torch.Tensor) -> dict[str, Any]:
        return {"base": base, "head": base[:6], "tail": base[4:]}

    live = make(torch.zeros(10))
    load_checkpoint(save(tmp_path, make(torch.arange(10.0))), live)
    assert live["base"].tolist() == list(range(10))
    live["base"].add_(1)
    assert live["head"].tolist() == list(range(1, 7))
    assert live["tail"].tolist() == list(range(5, 11))
