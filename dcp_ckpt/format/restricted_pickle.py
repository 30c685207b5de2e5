"""Pickles of others, read without executing anything: only stand-ins of our own are ever made or called.

Owns the unpickler and what a stand-in is. Must not know what is pickled; callers bring the table of what each
global name stands for. Used for `.metadata` files and `torch.save` containers of stock DCP checkpoints.
"""

from __future__ import annotations

import io
import pickle
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
        CorruptCheckpoint: not a valid pickle.
    """
    try:
        return _Unpickler(data, stand_ins, resolve_reference).load()
    except LoadError as error:
        error.path = path
        raise
    except (*_DAMAGE, RecursionError) as error:
        raise CorruptCheckpoint(f"not a valid pickle: {error}", phase="read", path=path) from error
