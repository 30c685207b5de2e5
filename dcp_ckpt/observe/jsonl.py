"""Events as JSON lines in a file: appended, never rewritten, one write a line.

A line that a crash cut off costs that line alone: the next one begins on a line of its own, and readers
leave out what is no JSON. Not fsynced: what counts is in the checkpoints.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.observe.events import Event, Scalars

__all__ = ["JsonLinesSink", "read_events"]


class JsonLinesSink:
    """Appends one JSON object a line: `{"event": "save durable", "time": ..., "step": ..., ...}`.

    `Scalars` are left out: a line for each step is a log of the training, not of its checkpoints. Values are
    typed as in docs/format.md, section 7. Several processes may append to one file.

    Args:
        path: of the file; made, with its directory, when the first event comes. In a run directory any name
            that is none of the run's is left alone, such as `events.jsonl`.

    Raises:
        ConfigError: it is a URL: object stores cannot append.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._file: int | None = None
        if "://" in self._path:
            raise ConfigError(
                f"events are appended to a file, and {self._path} is on a store; name a local path"
            )

    def handle(self, event: Event) -> None:
        if isinstance(event, Scalars):
            return
        fields = asdict(event) | {"event": event.kind, "time": event.time.isoformat()}
        line = encode_json({name: _encoded(value, name) for name, value in fields.items()}) + b"\n"
        if self._file is None:
            self._file, is_torn = _open(self._path)
            line = b"\n" + line if is_torn else line
        os.write(self._file, line)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in a file of JSON lines, oldest first; lines that a crash cut off are left out.

    Args:
        path: what a `JsonLinesSink` was given.

    Returns:
        For each a dictionary with `event`, `time`, `step` and what else belongs to it; metrics stay encoded.
    """
    found = []
    with open(path, "rb") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                found.append(event)
    return found


def _encoded(value: Any, path: str) -> Any:
    """Typed JSON; a mapping of names stays an object, in whatever order."""
    if isinstance(value, dict):
        return {name: encode_value(inner, path=f"{path}[{name!r}]") for name, inner in value.items()}
    return encode_value(value, path=path)


def _open(path: str) -> tuple[int, bool]:
    """The file to append to, and whether its last line was cut off."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    size = os.fstat(file).st_size
    return file, size > 0 and os.pread(file, 1, size - 1) != b"\n"
