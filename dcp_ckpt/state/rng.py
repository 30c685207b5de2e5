"""Random number generators of this process: Python, NumPy, torch and every CUDA device.

Owns reading, setting and deriving their states. Must be installed last, since installing other
components may draw random numbers. Knows nothing of samplers, which have generators of their own.
"""

from __future__ import annotations

import hashlib
import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dcp_ckpt.format.values import encode_value
from dcp_ckpt.state.component import Captured, Path, StoredState, Targets

__all__ = ["RngComponent", "undisturbed_streams"]


class RngComponent:
    """The global generators of one rank, stored per rank.

    On a world of the same size every stream continues bit for bit. On another, no rank has a
    stream to continue: each derives its own from the checkpoint and its rank, the same at every attempt.
    A checkpoint of plain `dcp.save` holds no streams of ranks: the generators are left as they are.
    """

    def __init__(self, prefix: Path = ("rng",)) -> None:
        self._prefix = prefix

    @property
    def prefix(self) -> Path:
        return self._prefix

    def capture(self) -> Captured:
        name = ".".join(self._prefix)
        return Captured(per_rank={self._prefix: encode_value(_read_streams(), path=name)})

    def targets(self, stored: StoredState) -> Targets:
        return Targets()

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        streams = stored.per_rank.get(".".join(self._prefix))
        if streams is not None:
            return _write_streams(streams)
        if not stored.saved_world_size:
            return ["random numbers: not restored, plain dcp.save stores none; left as they are"]
        _derive_streams(stored.seed_material, stored.rank)
        if stored.saved_world_size == stored.world_size:
            return ["random numbers: the checkpoint holds no streams; derived new ones from step and rank"]
        return [
            f"random numbers: saved on {stored.saved_world_size} ranks, loaded on {stored.world_size}; "
            "derived new streams from step and rank"
        ]


@contextmanager
def undisturbed_streams() -> Iterator[None]:
    """Leave the global generators of this process as they were, whatever the body draws."""
    streams = _read_streams()
    try:
        yield
    finally:
        _write_streams(streams)


def _read_streams() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    streams: dict[str, Any] = {
        "python": (version, struct.pack(f"<{len(words)}I", *words), gauss),
        "torch": bytes(torch.get_rng_state().tolist()),
    }
    numpy = sys.modules.get("numpy")
    # A library that was not imported has drawn nothing yet, and importing it costs start-up time.
    if numpy is not None:
        streams["numpy"] = numpy.random.get_state(legacy=False)
    # Asking for a CUDA state would initialise CUDA, which a save must not do.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        streams["cuda"] = [bytes(state.tolist()) for state in torch.cuda.get_rng_state_all()]
    return streams


def _write_streams(streams: dict[str, Any]) -> list[str]:
    notes = []
    version, packed, gauss = streams["python"]
    random.setstate((version, struct.unpack(f"<{len(packed) // 4}I", packed), gauss))
    torch.set_rng_state(_byte_tensor(streams["torch"]))
    if "numpy" in streams:
        import numpy

        numpy.random.set_state(streams["numpy"])
    saved = streams.get("cuda", [])
    num_devices = torch.cuda.device_count() if saved else 0
    for device, state in enumerate(saved[:num_devices]):
        torch.cuda.set_rng_state(_byte_tensor(state), device)
    if num_devices != len(saved):
        notes.append(f"random numbers: restored {min(num_devices, len(saved))} of {len(saved)} CUDA streams")
    return notes


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _derive_streams(seed_material: str, rank: int) -> None:
    def seed(stream: str) -> bytes:
        return hashlib.sha256(f"{seed_material}/{rank}/{stream}".encode()).digest()

    random.seed(int.from_bytes(seed("python"), "little"))
    # Also seeds every CUDA device.
    torch.manual_seed(int.from_bytes(seed("torch")[:8], "little") >> 1)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(struct.unpack("<8I", seed("numpy")))
