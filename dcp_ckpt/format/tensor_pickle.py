"""The pickle streams that torch.save writes for contiguous tensors, opcode by opcode (protocol 2).

Written by hand, so they depend on nothing but dtypes, sizes and names. Where each tensor's bytes are is said
by a persistent id that names a record of the archive. Called by `format.containers` and `format.torch_file`.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterable, Sequence

from dcp_ckpt.format.dtypes import dtype_info

__all__ = ["dict_pickle", "tensor_pickle"]


def tensor_pickle(dtype: str, sizes: Sequence[int]) -> bytes:
    """One tensor, whose bytes are the record `data/0`."""
    return pickle.PROTO + b"\x02" + _tensor(dtype, sizes, "0") + pickle.STOP


def dict_pickle(tensors: Iterable[tuple[Sequence[str], str, Sequence[int]]]) -> bytes:
    """A dictionary of tensors in the given order; the bytes of number i are the record `data/<i>`.

    Args:
        tensors: names, dtype and sizes of each; under several names it is tied when it is loaded.
    """
    items = [
        _text(name) + _tensor(dtype, sizes, str(number))
        for number, (names, dtype, sizes) in enumerate(tensors)
        for name in names
    ]
    parts = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK, *items, pickle.SETITEMS, pickle.STOP]
    return b"".join(parts)


def _tensor(dtype: str, sizes: Sequence[int], record: str) -> bytes:
    info = dtype_info(dtype)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    num_elements = math.prod(sizes)
    legacy = info.storage_class is not None
    storage = f"torch\n{info.storage_class}" if legacy else "torch.storage\nUntypedStorage"
    storage_size = num_elements if legacy else num_elements * info.item_bytes
    rebuild = "_rebuild_tensor_v2" if legacy else "_rebuild_tensor_v3"
    parts = [
        pickle.GLOBAL + f"torch._utils\n{rebuild}\n".encode(),
        pickle.MARK,
        pickle.MARK + _text("storage"),
        pickle.GLOBAL + f"{storage}\n".encode(),
        _text(record) + _text("cpu") + _integer(storage_size),
        pickle.TUPLE + pickle.BINPERSID,
        _integer(0) + _integers(sizes) + _integers(strides),
        pickle.NEWFALSE,
        pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE,
        b"" if legacy else pickle.GLOBAL + f"torch\n{dtype}\n".encode(),
        pickle.TUPLE + pickle.REDUCE,
    ]
    return b"".join(parts)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _integers(values: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
