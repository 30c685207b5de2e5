"""Which tensors can be stored as they are, and which can be filled in place.

Owns what is asked of a single tensor, whatever component holds it. Knows no path but for messages, and no
file. Called by the components, by staging and by `load.diff`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.state.component import Path, StoredState, StoredTensor
from dcp_ckpt.state.placements import local_tensor

__all__ = [
    "Fillable",
    "check_tensor",
    "fill_shared",
    "fits",
    "memory_of",
    "once_each",
    "same_bits",
    "shares_elements",
    "unsuitable",
    "writable_like",
]

_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)


def check_tensor(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor whose bytes are not one plain strided payload.

    A subclass that only adds methods or attributes is stored as the plain tensor that it is, too.

    Raises:
        StateError: sparse, nested, quantized, meta, uninitialised, freed or partial tensors, subclasses that
            wrap other tensors, and dtypes that the format does not know; the message names the key.
    """
    reason = unsuitable(tensor)
    if reason:
        raise StateError(f"{name} cannot be stored: {reason}")


def unsuitable(tensor: torch.Tensor) -> str | None:
    """Why a tensor can be neither stored nor filled, and what to do; None when it can."""
    if is_lazy(tensor):
        return "it is uninitialised; run one forward before saving"
    if isinstance(tensor, DTensor):
        if any(placement.is_partial() for placement in tensor.placements):
            return "it is a DTensor with a Partial placement; redistribute it to Shard or Replicate"
        tensor = local_tensor(tensor)
    # What computes its elements when asked has none in memory that could be copied.
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"it is a {type(tensor).__name__}; convert it to a plain tensor"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"it is sparse or nested ({tensor.layout}); call to_dense() or store its parts"
    if tensor.is_quantized:
        return "it is quantized; store int_repr(), scale and zero point"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no data; materialise it first (to_empty, then load)"
    if tensor.dtype not in _DTYPES:
        return f"the format has no dtype {tensor.dtype}"
    if tensor.untyped_storage().nbytes() < _end_bytes(tensor):
        return "its storage was freed or made smaller (untyped_storage().resize_()); give it its memory back"
    return None


def _end_bytes(tensor: torch.Tensor) -> int:
    """Where its last element ends, from the start of its storage."""
    if not tensor.numel():
        return 0
    start = tensor.storage_offset() * tensor.itemsize
    if tensor.is_contiguous():
        return int(start + tensor.nbytes)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start + (last + 1) * tensor.itemsize)


def fits(live: torch.Tensor, stored: StoredTensor, *, any_dtype: bool = False) -> bool:
    """Whether `live` has the stored global shape, and dtype if that counts, and memory to fill."""
    is_alike = tuple(live.shape) == stored.shape and (any_dtype or live.dtype == stored.dtype)
    return is_alike and unsuitable(live) is None


class Fillable:
    """Says what to fill with each stored tensor: the live one where it can take it, else a new one.

    Live memory is given away once: two stored tensors never go into one place, where one of them would be
    lost. What was one tensor when it was saved may fill one place, and is one tensor again where it is new.
    """

    def __init__(self, stored: StoredState) -> None:
        self._stored = stored
        self._given: dict[Hashable, str] = {}
        self._new: dict[str, torch.Tensor] = {}

    def take(self, live: torch.Tensor, name: str) -> bool:
        """Whether `live`, which has its shape and dtype, may be filled with the stored tensor `name`."""
        local = local_tensor(live)
        if shares_elements(live):
            return False
        payload = self._payload(name)
        return not local.numel() or self._given.setdefault(memory_of(live), payload) == payload

    def choose(self, live: Any, name: str) -> torch.Tensor:
        """`live`, where it is a tensor that fits, or a new one like it; else a new tensor on the CPU."""
        stored = self._stored.tensors[name]
        if isinstance(live, torch.Tensor) and fits(live, stored):
            return live if self.take(live, name) else writable_like(live)
        payload = self._payload(name)
        if payload not in self._new:
            self._new[payload] = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        return self._new[payload]

    def _payload(self, name: str) -> str:
        return self._stored.aliases.get(name, name)


def once_each(
    tensors: Mapping[Path, torch.Tensor],
) -> tuple[dict[Path, torch.Tensor], dict[Path, tuple[Path, ...]]]:
    """Every tensor under the first of its paths, in order; and the other paths of those that have several.

    Tensors are the same when they are one object, as tied weights are, or one view of the same memory.
    """
    known: dict[int, list[Path]] = {}
    first: dict[Path, torch.Tensor] = {}
    aliases: dict[Path, tuple[Path, ...]] = {}
    for path, tensor in tensors.items():
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        # All that is empty may have one address.
        alike = known.setdefault(local.data_ptr() if local.numel() else -id(tensor), [])
        owner = next((other for other in alike if _is_same(first[other], tensor)), None)
        if owner is None:
            alike.append(path)
            first[path] = tensor
        else:
            aliases[owner] = (*aliases.get(owner, ()), path)
    return first, aliases


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors at one address are alike in everything else, too."""
    return a is b or _view(a) == _view(b)


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    local = local_tensor(tensor)
    layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return layout, tensor.shape, local.dtype, local.device, local.stride(), local.is_conj(), local.is_neg()


def memory_of(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same view of the same memory, if they have elements."""
    return local_tensor(tensor).data_ptr(), _view(tensor)


def shares_elements(tensor: torch.Tensor) -> bool:
    """Whether several elements are one in memory, as by `expand()`; such a tensor cannot be filled."""
    local = local_tensor(tensor)
    return any(size > 1 and stride == 0 for size, stride in zip(local.shape, local.stride(), strict=True))


@torch.no_grad()
def writable_like(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor of the same shape, dtype, device and sharding, to be filled in the place of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)


@torch.no_grad()
def fill_shared(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write into a tensor that `shares_elements` what it can hold of `values`: the first of each."""
    written, given = local_tensor(tensor), local_tensor(values)
    for dim, (size, stride) in enumerate(zip(written.shape, written.stride(), strict=True)):
        if size > 1 and stride == 0:
            written, given = written.narrow(dim, 0, 1), given.narrow(dim, 0, 1)
    written.copy_(given)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the local parts of two tensors of equal shape and dtype hold the same bytes."""
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    local = local_tensor(tensor).resolve_conj().resolve_neg()
    return local.contiguous().reshape(-1).view(torch.uint8)
