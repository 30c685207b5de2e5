"""Typed JSON: Python state that round-trips exactly, without pickle (docs/format.md, section 7)."""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from dcp_ckpt.errors import CorruptCheckpoint, StateError
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.dtypes import DTYPES, shape_problem

__all__ = ["MAX_DEPTH", "InlineTensor", "TensorRef", "ValueRef", "decode_value", "encode_value"]

MAX_DEPTH = 200
_SAFE_INT = 1 << 53
_NOT_PORTABLE = "gG"
"""numpy.longdouble and its complex: other numbers on other machines, and bytes between that mean nothing."""

_Kind = TypeVar("_Kind")


class _Ref:
    """Stands for something that is stored under a name of its own."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class TensorRef(_Ref):
    """Stands for a tensor inside of a value; the tensor is stored under `name`."""


class ValueRef(_Ref):
    """Stands for a value in the outline of a dictionary; the value is stored under `name`."""


@dataclass(frozen=True)
class InlineTensor:
    """A small tensor as a part of the value itself.

    Args:
        dtype: torch's name for it, without `torch.`.
        shape: its sizes.
        data: the elements, row-major and little-endian, without gaps.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_value(value: Any, *, path: str) -> Any:
    """Turn a Python value into plain JSON types.

    Args:
        value: the value; tensors in it must have been replaced by `TensorRef` or `InlineTensor`.
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
        f"stored exactly; {_advice(value)}"
    )


def _advice(value: Any) -> str:
    """What to save instead of a value that would not come back as it is."""
    if isinstance(value, Enum):
        return "save its name or its value, and look the member up again"
    if hasattr(value, "state_dict"):
        return (
            "give it a key of its own in a dictionary: objects inside of lists and values are not looked into"
        )
    if hasattr(value, "__dataclass_fields__"):
        return "save dataclasses.asdict() of it, or give it state_dict() and load_state_dict()"
    for plain in (bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset):
        if isinstance(value, plain):
            return f"save {plain.__name__}(...) of it, since a subclass may hold more"
    return (
        "save plain Python values, numpy arrays or tensors, or give the object state_dict() and "
        "load_state_dict()"
    )


def _encode_str(value: str, path: str, depth: int) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise StateError(f"{path} is text that UTF-8 cannot hold: {error}; save its bytes") from error
    return value


def _encode_int(value: int, path: str, depth: int) -> Any:
    if -_SAFE_INT <= value <= _SAFE_INT:
        return value
    try:
        return {"$int": str(value)}
    except ValueError as error:
        # Python refuses to write, and to read, numbers of more than some thousand digits.
        raise StateError(f"{path} cannot be stored: {error}") from error


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
        return {
            _encode_str(key, f"{path} key {key!r}", depth): _encode(item, f"{path}[{key!r}]", depth)
            for key, item in value.items()
        }
    return {"$dict": _pairs(value, path, depth)}


def _encode_set(value: Any, path: str, depth: int) -> list[Any]:
    return sorted(_items(value, path, depth), key=encode_json)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode_numpy(value: Any, path: str) -> Any:
    import numpy

    is_array = type(value) is numpy.ndarray
    if not is_array and not isinstance(value, numpy.generic):
        raise StateError(
            f"{path} is a numpy.{type(value).__name__}, which cannot be stored exactly; save numpy.array() "
            "of it, or what it was made from"
        )
    array = numpy.asarray(value)
    kind = array.dtype
    if kind.hasobject or kind.names or kind.char in _NOT_PORTABLE or not kind.itemsize:
        raise StateError(
            f"{path} is a numpy {'array' if is_array else 'scalar'} of dtype {kind}, which cannot be stored "
            "exactly; save lists, one array for each field, or numbers of 64 bits"
        )
    data = _base64(array.tobytes())
    return {"$ndarray": [kind.str, list(array.shape), data]} if is_array else {"$npscalar": [kind.str, data]}


_ENCODERS: dict[type, Callable[[Any, str, int], Any]] = {
    type(None): lambda value, path, depth: None,
    bool: lambda value, path, depth: value,
    str: _encode_str,
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
    InlineTensor: lambda value, path, depth: {
        "$inline": [value.dtype, list(value.shape), _base64(value.data)]
    },
    TensorRef: lambda value, path, depth: {"$tensor": _encode_str(value.name, path, depth)},
    ValueRef: lambda value, path, depth: {"$value": _encode_str(value.name, path, depth)},
}


def decode_value(encoded: Any, *, path: str) -> Any:
    """The inverse of `encode_value`; tensors come back as `TensorRef` or `InlineTensor`.

    Raises:
        CorruptCheckpoint: the JSON is not a typed value.
    """
    try:
        return _decode(encoded)
    except (
        ValueError, TypeError, LookupError, RecursionError, ArithmeticError, MemoryError,
        SyntaxError,  # of numpy, which takes a dtype for a piece of Python
    ) as error:  # fmt: skip
        raise CorruptCheckpoint(f"value {path} is not valid typed JSON: {error}", phase="read") from error


def _decode(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return [_decode(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    tag = next((key for key in encoded if key.startswith("$")), None)
    if tag is None:
        return {key: _decode(item) for key, item in encoded.items()}
    if len(encoded) != 1 or tag not in _DECODERS:
        raise ValueError(f"unknown type tag {tag!r:.80}; written by a newer version?")
    return _DECODERS[tag](encoded[tag])


def _is(kind: type[_Kind], encoded: Any) -> _Kind:
    """What is of exactly this JSON type; many constructors would take something else as well."""
    if type(encoded) is not kind:
        raise TypeError(f"{type(encoded).__name__} in the place of {kind.__name__}")
    return encoded


def _fields(encoded: Any, count: int) -> list[Any]:
    if len(_is(list, encoded)) != count:
        raise ValueError(f"{len(encoded)} fields in the place of {count}")
    return list(encoded)


def _decode_list(encoded: Any) -> list[Any]:
    return [_decode(item) for item in _is(list, encoded)]


def _decode_set(encoded: Any) -> set[Any]:
    items = _decode_list(encoded)
    found = set(items)
    if len(found) != len(items):
        raise ValueError("an element is there twice")
    return found


def _decode_dict(encoded: Any) -> dict[Any, Any]:
    pairs = [_fields(pair, 2) for pair in _is(list, encoded)]
    found = {_decode(key): _decode(item) for key, item in pairs}
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _decode_int(encoded: Any) -> int:
    number = int(_is(str, encoded))
    if str(number) != encoded:
        raise ValueError(f"unknown integer {encoded!r:.80}")
    return number


def _decode_float(encoded: Any) -> float:
    if encoded not in ("nan", "inf", "-inf"):
        raise ValueError(f"unknown float {encoded!r:.80}")
    return float(encoded)


def _decode_complex(encoded: Any) -> complex:
    real, imag = map(_decode, _fields(encoded, 2))
    return complex(_is(float, real), _is(float, imag))


def _decode_deque(encoded: Any) -> deque[Any]:
    items, maxlen = _fields(encoded, 2)
    found = deque(_decode_list(items), None if maxlen is None else _is(int, maxlen))
    if len(found) != len(items):
        raise ValueError(f"{len(items)} elements where there is room for {maxlen}")
    return found


def _decode_bytes(encoded: Any) -> bytes:
    return base64.b64decode(_is(str, encoded), validate=True)


def _decode_array(dtype: Any, data: Any) -> Any:
    """The elements, writable."""
    import numpy

    kind = numpy.dtype(_is(str, dtype))
    if kind.str != dtype or kind.hasobject or kind.char in _NOT_PORTABLE:
        raise ValueError(f"unknown dtype {dtype!r:.80}")
    return numpy.frombuffer(_decode_bytes(data), kind).copy()


def _decode_ndarray(encoded: Any) -> Any:
    dtype, shape, data = _fields(encoded, 3)
    return _decode_array(dtype, data).reshape(_decode_shape(shape))


def _decode_shape(encoded: Any) -> list[int]:
    sizes = [_is(int, size) for size in _is(list, encoded)]
    if min(sizes, default=0) < 0:
        raise ValueError(f"unknown shape {sizes}")
    return sizes


def _decode_inline(encoded: Any) -> InlineTensor:
    dtype, shape, text = _fields(encoded, 3)
    sizes, data = _decode_shape(shape), _decode_bytes(text)
    if problem := shape_problem(_is(str, dtype), sizes):
        raise ValueError(problem)
    if len(data) != math.prod(sizes) * DTYPES[dtype].item_bytes:
        raise ValueError(f"{len(data)} bytes in the place of a tensor of {dtype} of shape {sizes}")
    return InlineTensor(dtype, tuple(sizes), data)


def _decode_npscalar(encoded: Any) -> Any:
    dtype, data = _fields(encoded, 2)
    (scalar,) = _decode_array(dtype, data)
    return scalar


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$int": _decode_int,
    "$float": _decode_float,
    "$complex": _decode_complex,
    "$bytes": _decode_bytes,
    "$bytearray": lambda data: bytearray(_decode_bytes(data)),
    "$tuple": lambda items: tuple(_decode_list(items)),
    "$set": _decode_set,
    "$frozenset": lambda items: frozenset(_decode_set(items)),
    "$dict": _decode_dict,
    "$ordered": lambda pairs: OrderedDict(_decode_dict(pairs)),
    "$counter": lambda pairs: Counter(_decode_dict(pairs)),
    "$deque": _decode_deque,
    "$ndarray": _decode_ndarray,
    "$npscalar": _decode_npscalar,
    "$inline": _decode_inline,
    "$tensor": lambda name: TensorRef(_is(str, name)),
    "$value": lambda name: ValueRef(_is(str, name)),
}
