"""What the tests of the commands share: running one in this process, and a run to run it on."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from dcp_ckpt.cli.main import cli
from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint


def invoke(*arguments: str | Path) -> Result:
    """Run `dcp-ckpt` with these arguments."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def as_json(*arguments: str | Path, code: int = 0) -> Any:
    """The one object that a command prints with `--json`."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def on_terminal(*arguments: str | Path) -> tuple[str, str]:
    """Run `dcp-ckpt` with stderr on a terminal: what it prints on stdout, and what the terminal shows."""
    reader, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "dcp_ckpt", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "COLUMNS": "200", "TERM": "xterm"},
        )
        os.close(terminal)
        shown = b""
        # A terminal that nobody reads holds up whoever writes to it.
        with suppress(OSError):  # EIO: its last writer is gone
            while data := os.read(reader, 1 << 16):
                shown += data
        stdout, _ = process.communicate(timeout=60)
    finally:
        os.close(reader)
    assert process.returncode == 0
    return stdout.decode(), shown.decode()


def small_run(base: Path) -> Path:
    """A run of steps 10 to 50, whose loss is least at 20."""
    run = open_run(base)
    storage = open_storage(run.path)
    for step in (10, 20, 30, 40, 50):
        metrics = {"loss": abs(step - 20.0)}
        write_tiny_checkpoint(storage, step=step, run_id=run.run_id, metrics=metrics)
    return Path(run.path)
