"""Python values of stock DCP checkpoints, decoded without executing their pickles.

Plain values are read by stand-ins alone, tensors inside of values by `torch.load(weights_only=True)`; what
both refuse is unreadable. Called by `load.stock`. Imports torch only when a value needs it.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict, deque
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.restricted_pickle import ForbiddenGlobal, Sealed, StandIns, read_pickle
from dcp_ckpt.format.torch_container import ContainerWindows, read_value_pickle

__all__ = ["UnreadableValue", "decode_container"]


class UnreadableValue(Exception):
    """The value can only be restored by executing its pickle, or not at all; the message says why."""


class _Latin1(metaclass=Sealed):
    """Stands for `_codecs.encode(text, "latin1")`, by which protocol 2 pickles bytes."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]  # stands for a function
        if encoding != "latin1" or not isinstance(text, str):
            raise ValueError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")


class _Bytearray(metaclass=Sealed):
    """Stands for `bytearray(text, "latin1")`, and for nothing that would only allocate."""

    def __new__(cls, *args: object) -> bytearray:  # type: ignore[misc]  # stands for a function
        if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            return bytearray(args[0], "latin1")
        if len(args) == 1 and isinstance(args[0], bytes):
            return bytearray(args[0])
        if args:
            raise ValueError("a bytearray of something else")
        return bytearray()


class _Counter(metaclass=Sealed):
    """Stands for `Counter`, which is written in Python and could be changed."""

    def __new__(cls, counts: dict[Any, int]) -> Counter[Any]:  # type: ignore[misc]  # stands for a class
        return Counter(counts)


# Immutable built-in types: a pickle can neither change them nor make them run code.
_PLAIN: StandIns = {
    ("_codecs", "encode"): _Latin1,
    ("collections", "Counter"): _Counter,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "deque"): deque,
    **{
        (module, name): stand_in
        for module in ("builtins", "__builtin__")
        for name, stand_in in (
            ("bytearray", _Bytearray),
            ("complex", complex),
            ("frozenset", frozenset),
            ("set", set),
        )
    },
}


def decode_container(data: bytes, *, what: str) -> Any:
    """The Python value of one container.

    Args:
        data: the whole container.
        what: the value and its file, for messages.

    Returns:
        The value; tensors in it are plain tensors on the CPU.

    Raises:
        UnreadableValue: it holds more than plain values and tensors; nothing was executed.
        CorruptCheckpoint: the container is damaged.
    """
    windows = ContainerWindows(len(data), what=what)
    windows.add(0, data)
    try:
        return read_pickle(read_value_pickle(windows), _PLAIN, path=what)
    except ForbiddenGlobal as error:
        return _decode_with_torch(data, error, what)


def _decode_with_torch(data: bytes, refused: ForbiddenGlobal, what: str) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnreadableValue(f"it needs {refused.name}, which only executing its pickle gives") from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        raise CorruptCheckpoint(f"{what} cannot be decoded: {error}", phase="read") from error
