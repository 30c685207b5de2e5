"""The dtypes that the format knows: their names, item sizes and how torch.save spells them.

And the sizes that a tensor of them can have at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.errors import StateError

__all__ = ["DTYPES", "MOST_DIMENSIONS", "DtypeInfo", "dtype_info", "dtype_name", "shape_problem"]

MOST_DIMENSIONS = 64
"""What most of torch's own operations bear."""

_MOST_BYTES = 2**63 - 1


@dataclass(frozen=True)
class DtypeInfo:
    """Bytes per element, and the legacy storage class that torch.save names, if it has one."""

    name: str
    item_bytes: int
    storage_class: str | None


DTYPES: dict[str, DtypeInfo] = {
    name: DtypeInfo(name, item_bytes, storage_class)
    for name, item_bytes, storage_class in (
        ("float64", 8, "DoubleStorage"),
        ("float32", 4, "FloatStorage"),
        ("float16", 2, "HalfStorage"),
        ("bfloat16", 2, "BFloat16Storage"),
        ("float8_e4m3fn", 1, None),
        ("float8_e5m2", 1, None),
        ("float8_e4m3fnuz", 1, None),
        ("float8_e5m2fnuz", 1, None),
        ("float8_e8m0fnu", 1, None),
        ("complex32", 4, None),
        ("complex64", 8, "ComplexFloatStorage"),
        ("complex128", 16, "ComplexDoubleStorage"),
        ("int8", 1, "CharStorage"),
        ("int16", 2, "ShortStorage"),
        ("int32", 4, "IntStorage"),
        ("int64", 8, "LongStorage"),
        ("uint8", 1, "ByteStorage"),
        ("uint16", 2, None),
        ("uint32", 4, None),
        ("uint64", 8, None),
        ("bool", 1, "BoolStorage"),
    )
}


def dtype_name(dtype: object) -> str:
    """The name by which the format knows a `torch.dtype`: torch's, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def dtype_info(name: str) -> DtypeInfo:
    """Look a dtype up by torch's name without `torch.`.

    Raises:
        StateError: the format cannot store this dtype.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise StateError(
            f"dtype {name} cannot be stored; the format knows {', '.join(sorted(DTYPES))}"
        ) from None


def shape_problem(dtype: str, shape: Sequence[int]) -> str | None:
    """Why there can be no such tensor, or None.

    Args:
        shape: no negative numbers.
    """
    if dtype not in DTYPES:
        return f"dtype {dtype!r:.80} is not one that this version knows"
    if len(shape) > MOST_DIMENSIONS:
        return f"{len(shape)} dimensions"
    # Strides are those of the tensor without its empty dimensions, and have to be numbers as well.
    if math.prod(size or 1 for size in shape) * DTYPES[dtype].item_bytes > _MOST_BYTES:
        return f"a tensor of {dtype} of shape {list(shape)} has more bytes than can be counted"
    return None
