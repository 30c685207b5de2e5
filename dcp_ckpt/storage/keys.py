"""Keys and temporary names: what is allowed, what is listed.

The rules that every storage shares, so that a hostile or mistyped key fails the same way everywhere.
Pure; knows neither files nor checkpoints. Called by the storages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dcp_ckpt.errors import ConfigError

__all__ = [
    "check_key",
    "check_prefix",
    "final_name",
    "is_listed",
    "is_temporary",
    "names_below",
    "temporary_name",
]

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_LISTED_HIDDEN = ".metadata"


def check_key(key: str) -> str:
    """Return `key` if it is one.

    Raises:
        ConfigError: it is empty, absolute, holds NUL, or has an empty, `.` or `..` part.
    """
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ConfigError(
            f"{key!r} is no storage key: keys are relative, `/`-separated, without empty, `.` or `..` parts "
            "and without NUL"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty, or a key followed by `/`.

    Raises:
        ConfigError: it is neither.
    """
    if prefix and not prefix.endswith("/"):
        raise ConfigError(f"{prefix!r} is no prefix: it must be empty or end in `/`")
    if prefix:
        check_key(prefix[:-1])
    return prefix


def temporary_name(name: str, token: str) -> str:
    """The temporary name of the final name `name`; `token` is 16 lower-case hex digits, new each time."""
    return f".{name}.{token}.tmp"


def is_temporary(name: str) -> bool:
    """Whether `name` (the last part of a key) is what `temporary_name` makes."""
    return final_name(name) is not None


def final_name(name: str) -> str | None:
    """What a temporary file was to be called; None when `name` is not what `temporary_name` makes."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else None


def is_listed(name: str) -> bool:
    """Whether listings show an object or directory of this name.

    Hidden names belong to the file system or to other programs (`.nfs...`, `.snapshot`). Temporary files are
    shown, since whoever sweeps must find them.
    """
    return not name.startswith(".") or name == _LISTED_HIDDEN or is_temporary(name)


def names_below(keys: Iterable[str], prefix: str) -> list[str]:
    """The names directly below `prefix`, sorted, of all keys below it; what holds others ends in `/`."""
    parts = (key[len(prefix) :].partition("/") for key in keys)
    return sorted({name + slash for name, slash, _ in parts})
