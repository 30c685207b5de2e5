"""Containers: the bytes that make one chunk's payload a `torch.save` file of its own.

Built by hand and free of torch, so the framing is a pure function of dtype, sizes and alignment that does
not change with the installed torch (docs/format.md, section 4). What torch's reader asks of such
a file was taken from torch 2.13 (`torch/serialization.py`, `caffe2/serialize/inline_container.cc`): the
records `data.pkl`, `byteorder`, `data/0` and `version`; CRCs of payloads are not checked.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dcp_ckpt.format.archive import ArchiveWriter
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.tensor_pickle import tensor_pickle

__all__ = ["SLAB_ALIGNMENT_BYTES", "Framing", "tensor_framing", "value_container"]

SLAB_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Framing:
    """Bytes before and after a payload of `payload_bytes`."""

    prefix: bytes
    payload_bytes: int
    suffix: bytes

    @property
    def container_bytes(self) -> int:
        return len(self.prefix) + self.payload_bytes + len(self.suffix)


@lru_cache(maxsize=4096)
def tensor_framing(dtype: str, sizes: tuple[int, ...], alignment_bytes: int) -> Framing:
    """The framing of a contiguous tensor.

    Args:
        dtype: torch's name, without `torch.`.
        sizes: the chunk's sizes in elements.
        alignment_bytes: the payload starts at a multiple of this, counted from the container's start.
    """
    payload_bytes = dtype_info(dtype).item_bytes * math.prod(sizes)
    archive = ArchiveWriter()
    archive.add("data.pkl", tensor_pickle(dtype, sizes))
    archive.add("byteorder", b"little")
    archive.reserve("data/0", payload_bytes, alignment_bytes)
    prefix = archive.take()
    archive.add("version", b"3\n")
    archive.finish()
    return Framing(prefix, payload_bytes, archive.take())


def value_container(value: Any) -> bytes:
    """One Python value as a `torch.save` file, for stock readers."""
    archive = ArchiveWriter()
    archive.add("data.pkl", pickle.dumps(value, protocol=2))
    archive.add("byteorder", b"little")
    archive.add("version", b"3\n")
    archive.finish()
    return archive.take()
