"""The dtypes that the format knows: their names, item sizes and how torch.save spells them."""

from __future__ import annotations

from dataclasses import dataclass

from dcp_ckpt.errors import StateError

__all__ = ["DTYPES", "DtypeInfo", "dtype_info"]


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
