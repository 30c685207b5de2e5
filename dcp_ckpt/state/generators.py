"""The global random number generators of this process: Python, NumPy, torch and every accelerator.

Owns reading, setting and seeding them. An accelerator that the process has not begun to use is left so. Knows
nothing of ranks and checkpoints; called by the component of random streams, by what must not disturb them,
and by data-loading processes.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "HOST_KINDS",
    "live_kinds",
    "read_stream",
    "seed_host_streams",
    "seed_stream",
    "stream_identity",
    "undisturbed_streams",
    "write_stream",
]

HOST_KINDS = ("python", "numpy", "torch")
"""Kinds of streams that every process may have; the others are named by the accelerator: "cuda", "xpu"."""

_DEVICE_FUNCTIONS = ("is_initialized", "current_device", "device_count", "get_rng_state", "set_rng_state")
_LAZY = frozenset({"cuda", "xpu"})
"""Accelerators that keep a state or a seed for when they are first used."""


def live_kinds() -> tuple[str, ...]:
    """The kinds of generators that this process may have drawn from."""
    kinds = ["python", "torch"]
    # A library that was not imported has drawn nothing yet, and importing it costs start-up time.
    if "numpy" in sys.modules:
        kinds.insert(1, "numpy")
    accelerator = torch.accelerator.current_accelerator()
    module = None if accelerator is None else _device_module(accelerator.type)
    # Asking for a state would initialise it.
    if accelerator is not None and module is not None and module.is_initialized():
        kinds.append(accelerator.type)
    return tuple(kinds)


def read_stream(kind: str) -> Any:
    """Where a generator stands, as a typed value; for one of `live_kinds`.

    Of an accelerator: the device that this process uses, and all others that it sees, by index.
    """
    if kind == "python":
        version, words, gauss = random.getstate()
        return version, struct.pack(f"<{len(words)}I", *words), gauss
    if kind == "numpy":
        return sys.modules["numpy"].random.get_state(legacy=False)
    if kind == "torch":
        return _bytes_of(torch.get_rng_state())
    module = _device_module(kind)
    assert module is not None, "it is one of live_kinds"
    states = {index: _bytes_of(module.get_rng_state(index)) for index in range(module.device_count())}
    return {"current": states.pop(module.current_device()), "others": states}


def stream_identity(kind: str, state: Any) -> Any:
    """What is equal for two processes exactly if they draw the same numbers."""
    return state if kind in HOST_KINDS else state["current"]


def write_stream(kind: str, state: Any) -> str | None:
    """Set a generator to where one stood.

    Returns:
        Why it was not, or not in full; None when all is set.
    """
    if kind == "python":
        version, packed, gauss = state
        random.setstate((version, struct.unpack(f"<{len(packed) // 4}I", packed), gauss))
        return None
    if kind == "numpy":
        import numpy

        numpy.random.set_state(state)
        return None
    if kind == "torch":
        torch.set_rng_state(_byte_tensor(state))
        return None
    return _write_device(kind, state)


def _write_device(kind: str, state: Any) -> str | None:
    module = _device_module(kind)
    num_devices = 0 if module is None else module.device_count()
    if module is None or not num_devices:
        return f"there is no {kind} device here"
    if not module.is_initialized() and kind not in _LAZY:
        return f"{kind} is not in use here yet"
    for index, other in state["others"].items():
        if index < num_devices:
            module.set_rng_state(_byte_tensor(other), index)
    # Last, since it may have another index here.
    module.set_rng_state(_byte_tensor(state["current"]), kind)
    return None


def seed_stream(kind: str, seed: bytes) -> None:
    """Begin a new stream; of an accelerator: one on all its devices.

    Args:
        seed: 32 bytes.
    """
    if kind == "python":
        random.seed(int.from_bytes(seed, "little"))
    elif kind == "numpy":
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(struct.unpack("<8I", seed))
    elif kind == "torch":
        torch.default_generator.manual_seed(_torch_seed(seed))
    elif (module := _device_module(kind)) is not None and (module.is_initialized() or kind in _LAZY):
        module.manual_seed_all(_torch_seed(seed))


def seed_host_streams(seed: int) -> None:
    """Begin new streams of `HOST_KINDS`, in 7 us; `torch.initial_seed()` is the seed then.

    Args:
        seed: below 2**63.
    """
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def undisturbed_streams(kinds: Sequence[str] | None = None) -> Iterator[None]:
    """Leave the global generators of this process as they were, whatever the body draws.

    Args:
        kinds: only these, of `live_kinds`; None means all of them.
    """
    states = {kind: read_stream(kind) for kind in kinds or live_kinds()}
    try:
        yield
    finally:
        for kind, state in states.items():
            write_stream(kind, state)


def _device_module(kind: str) -> Any:
    """torch's module for an accelerator, or None where it has no generators that can be read and set."""
    module = getattr(torch, kind, None)
    return module if all(hasattr(module, name) for name in _DEVICE_FUNCTIONS) else None


def _torch_seed(seed: bytes) -> int:
    return int.from_bytes(seed[:8], "little") >> 1


def _bytes_of(state: torch.Tensor) -> bytes:
    # Not by way of numpy, which is not required, nor of a list, which takes 70 us for torch's own generator.
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
