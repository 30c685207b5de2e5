"""Typed JSON: Python state that round-trips exactly, without pickle (docs/format.md, section 7)."""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint, StateError
from dcp_ckpt.format.documents import encode_json

__all__ = ["MAX_DEPTH", "TensorRef", "decode_value", "encode_value"]

MAX_DEPTH = 200
_SAFE_INT = 1 << 53


class TensorRef:
    """Stands for a tensor inside of a value; the tensor is stored under `name`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorRef) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def encode_value(value: Any, *, path: str) -> Any:
    """Turn a Python value into plain JSON types.

    Args:
        value: the value; tensors in it must have been replaced by `TensorRef`.
        path: named in the error.

    Raises:
        StateError: a type that cannot be stored exactly, with its path inside of the value.
    """
    return _encode(value, path, 0)


def _encode(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise StateError(f"{path} is nested deeper than {MAX_DEPTH} levels, or contains itself")
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value, path, depth + 1)
    if type(value).__module__ == "numpy":
        return _encode_numpy(value, path)
    raise StateError(
        f"{path} is of type {type(value).__module__}.{type(value).__qualname__}, which cannot be "
        "stored exactly; save plain Python values, numpy arrays or tensors, or give the object "
        "state_dict() and load_state_dict()"
    )


def _encode_int(value: int, path: str, depth: int) -> Any:
    return value if -_SAFE_INT <= value <= _SAFE_INT else {"$int": str(value)}


def _encode_float(value: float, path: str, depth: int) -> Any:
    if math.isfinite(value):
        return value
    return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}


def _items(values: Any, path: str, depth: int) -> list[Any]:
    return [_encode(item, f"{path}[{index}]", depth) for index, item in enumerate(values)]


def _pairs(value: Any, path: str, depth: int) -> list[Any]:
    return [
        [_encode(key, f"{path} key {key!r}", depth), _encode(item, f"{path}[{key!r}]", depth)]
        for key, item in value.items()
    ]


def _encode_dict(value: dict[Any, Any], path: str, depth: int) -> Any:
    keys = list(value)
    plain = all(type(key) is str and not key.startswith("$") for key in keys)
    if plain and keys == sorted(keys):
        return {key: _encode(item, f"{path}[{key!r}]", depth) for key, item in value.items()}
    return {"$dict": _pairs(value, path, depth)}


def _encode_set(value: Any, path: str, depth: int) -> list[Any]:
    return sorted(_items(value, path, depth), key=encode_json)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode_numpy(value: Any, path: str) -> Any:
    import numpy

    if isinstance(value, numpy.ndarray) and not value.dtype.hasobject and not value.dtype.names:
        little = numpy.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"))
        return {"$ndarray": [little.dtype.str, list(value.shape), _base64(little.tobytes())]}
    if isinstance(value, numpy.generic) and not value.dtype.hasobject and not value.dtype.names:
        scalar = numpy.asarray(value).astype(value.dtype.newbyteorder("<"))
        return {"$npscalar": [scalar.dtype.str, _base64(scalar.tobytes())]}
    raise StateError(f"{path} is a numpy {type(value).__name__} that cannot be stored exactly")


_ENCODERS: dict[type, Callable[[Any, str, int], Any]] = {
    type(None): lambda value, path, depth: None,
    bool: lambda value, path, depth: value,
    str: lambda value, path, depth: value,
    int: _encode_int,
    float: _encode_float,
    list: _items,
    dict: _encode_dict,
    complex: lambda value, path, depth: {
        "$complex": [_encode_float(value.real, path, depth), _encode_float(value.imag, path, depth)]
    },
    bytes: lambda value, path, depth: {"$bytes": _base64(value)},
    bytearray: lambda value, path, depth: {"$bytearray": _base64(value)},
    tuple: lambda value, path, depth: {"$tuple": _items(value, path, depth)},
    set: lambda value, path, depth: {"$set": _encode_set(value, path, depth)},
    frozenset: lambda value, path, depth: {"$frozenset": _encode_set(value, path, depth)},
    OrderedDict: lambda value, path, depth: {"$ordered": _pairs(value, path, depth)},
    Counter: lambda value, path, depth: {"$counter": _pairs(value, path, depth)},
    deque: lambda value, path, depth: {"$deque": [_items(value, path, depth), value.maxlen]},
    TensorRef: lambda value, path, depth: {"$tensor": value.name},
}


def decode_value(encoded: Any, *, path: str) -> Any:
    """The inverse of `encode_value`; tensors come back as `TensorRef`.

    Raises:
        CorruptCheckpoint: the JSON is not a typed value.
    """
    try:
        return _decode(encoded)
    except CorruptCheckpoint:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError) as error:
        raise CorruptCheckpoint(f"value {path} is not valid typed JSON: {error}", phase="read") from error


def _decode(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return [_decode(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    tag = next(iter(encoded), "")
    if not tag.startswith("$"):
        return {key: _decode(item) for key, item in encoded.items()}
    if len(encoded) != 1 or tag not in _DECODERS:
        raise ValueError(f"unknown type tag {tag!r}; written by a newer version?")
    return _DECODERS[tag](encoded[tag])


def _decode_pairs(pairs: list[Any]) -> list[tuple[Any, Any]]:
    return [(_decode(key), _decode(item)) for key, item in pairs]


def _decode_float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"unknown float {text!r}")
    return float(text)


def _decode_ndarray(fields: list[Any]) -> Any:
    import numpy

    dtype, shape, data = fields
    return _native(numpy.frombuffer(base64.b64decode(data), numpy.dtype(dtype)).reshape(shape))


def _decode_npscalar(fields: list[Any]) -> Any:
    import numpy

    dtype, data = fields
    return _native(numpy.frombuffer(base64.b64decode(data), numpy.dtype(dtype)))[0]


def _native(array: Any) -> Any:
    """A writable copy in this machine's byte order."""
    order = "=" if array.dtype.byteorder in "<>" and sys.byteorder == "little" else None
    return array.astype(array.dtype.newbyteorder(order)) if order else array.copy()


def _decode_number(encoded: Any) -> float:
    return float(_decode(encoded))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$int": int,
    "$float": _decode_float,
    "$complex": lambda parts: complex(_decode_number(parts[0]), _decode_number(parts[1])),
    "$bytes": base64.b64decode,
    "$bytearray": lambda data: bytearray(base64.b64decode(data)),
    "$tuple": lambda items: tuple(map(_decode, items)),
    "$set": lambda items: set(map(_decode, items)),
    "$frozenset": lambda items: frozenset(map(_decode, items)),
    "$dict": lambda pairs: dict(_decode_pairs(pairs)),
    "$ordered": lambda pairs: OrderedDict(_decode_pairs(pairs)),
    "$counter": lambda pairs: Counter(dict(_decode_pairs(pairs))),
    "$deque": lambda fields: deque(map(_decode, fields[0]), fields[1]),
    "$ndarray": _decode_ndarray,
    "$npscalar": _decode_npscalar,
    "$tensor": TensorRef,
}
