"""Pickles of others, read without executing anything: only stand-ins of our own are ever made or called.

Owns the unpickler, what a stand-in is, and that a few bytes cannot ask for much memory. Must not know what is
pickled; callers bring the table of what each global name stands for. Used for `.metadata` files and
`torch.save` containers of stock DCP checkpoints.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint, LoadError

__all__ = ["ForbiddenGlobal", "Record", "Sealed", "StandIns", "read_pickle"]

StandIns = Mapping[tuple[str, str], Any]
"""What each (module, name) of a pickle stands for: a sealed class, an immutable built-in, or plain data."""

# What damaged or hostile bytes make the unpickler raise; all of it comes from data, none from code of theirs.
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)

_PUTS = {ord(code) for code in "pqr"}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
# How many bytes follow each opcode; a negative number says how that is found out.
_ARGUMENT_BYTES = {
    ord(opcode.code): 0 if opcode.arg is None else opcode.arg.n for opcode in pickletools.opcodes
}
_NUM_LINES = {ord(code): 2 for code in "ci"}


class ForbiddenGlobal(LoadError):
    """The pickle names something that is not allowed; `name` says what. Nothing was executed."""

    name: str = ""


class Sealed(type):
    """Metaclass of stand-ins: a pickle may make instances, and cannot change the class."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"{cls.__name__} cannot be changed by a pickle")


class Record(metaclass=Sealed):
    """Stands for one object: `args` it was called with, and the `state` that was set."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.__dict__["args"] = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def field(self, name: str) -> Any:
        """One field of a state that is a dictionary; None when it is not there."""
        return self.state.get(name) if type(self.state) is dict else None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, stand_ins: StandIns, resolve_reference: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._stand_ins = stand_ins
        self._resolve_reference = resolve_reference

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return self._stand_ins[module_name, global_name]
        except KeyError:
            name = f"{module_name}.{global_name}"
            error = ForbiddenGlobal(f"the pickle names {name}, which is not allowed; nothing was executed")
            error.name = name
            raise error from None

    def persistent_load(self, pid: Any) -> Any:
        if self._resolve_reference is None:
            error = ForbiddenGlobal("the pickle refers to a tensor; nothing was executed")
            error.name = "torch.Tensor"
            raise error
        return self._resolve_reference(pid)


def read_pickle(
    data: bytes,
    stand_ins: StandIns,
    *,
    path: str,
    resolve_reference: Callable[[Any], Any] | None = None,
) -> Any:
    """Unpickle `data` with stand-ins in the place of everything that it names.

    Args:
        stand_ins: all names that are allowed.
        path: named in errors.
        resolve_reference: what a persistent id stands for; without it there may be none.

    Raises:
        ForbiddenGlobal: another name, or an unexpected persistent id.
        CorruptCheckpoint: not a valid pickle, or one that asks for more memory than it has bytes.
    """
    try:
        _refuse_claims(data)
        return _Unpickler(data, stand_ins, resolve_reference).load()
    except LoadError as error:
        error.path = path
        raise
    except (*_DAMAGE, RecursionError) as error:
        raise CorruptCheckpoint(f"not a valid pickle: {error}", phase="read", path=path) from error


def _refuse_claims(data: bytes) -> None:
    """Refuse a memo or a string that is larger than the whole pickle.

    The unpickler makes room for what it is told before it looks whether it comes: ten bytes can claim 64 GiB.
    """
    position = 0
    while position < len(data):
        code = data[position]
        kind = _ARGUMENT_BYTES.get(code)
        position += 1
        if kind is None or code == pickle.STOP[0]:
            return  # the unpickler says what it thinks of the rest
        start = position
        if kind >= 0:
            position += kind
        elif kind in _LENGTH_BYTES:
            width = _LENGTH_BYTES[kind]
            position += width + int.from_bytes(data[position : position + width], "little")
        else:
            for _ in range(_NUM_LINES.get(code, 1)):
                position = data.find(b"\n", position) + 1 or len(data)
        if position > len(data):
            raise EOFError(f"it ends inside of an argument at byte {start}")
        if code in _PUTS:
            argument = data[start:position]
            number = int(argument) if kind < 0 else int.from_bytes(argument, "little")
            if number > len(data):
                raise ValueError(f"it keeps a place for {number} objects")
