"""Running a program of this repository as its user would, within a time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run_program"]


def run_program(command: Sequence[str], *, directory: Path, timeout_seconds: float) -> str:
    """Run it in `directory` with one thread a process, and give what it printed; it must exit with 0."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        out, _ = process.communicate(timeout=timeout_seconds)
    except BaseException:
        process.terminate()  # torchrun ends its workers
        process.communicate()
        raise
    assert process.returncode == 0, out
    return out
