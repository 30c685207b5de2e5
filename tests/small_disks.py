"""A small disk of its own for a test, and filling it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["fill", "mounted_disk"]


@contextmanager
def mounted_disk(target: Path, *, size_bytes: int) -> Iterator[Path]:
    """Mount a small file system; skips the test where that is not allowed."""
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "dcp_ckpt-test", str(target)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if result.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {result.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True, timeout=20)


def fill(disk: Path, *, room_bytes: int) -> Path:
    """Take all space but `room_bytes`; the file to delete to give it back."""
    filler = disk / "filler"
    statistics = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(statistics.f_bavail * statistics.f_frsize - room_bytes))
    return filler
