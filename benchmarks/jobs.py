"""Torchruns of their own that a benchmark starts, and what their ranks ask of it meanwhile.

Knows no checkpointing system. Used by the benchmarks that watch their ranks from outside: what a server or a
sampler sees belongs to a phase that only the ranks know.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

__all__ = ["Answers", "Control", "Handler", "run_job"]

Handler = Callable[..., object]

_LAUNCHER_VARIABLES = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")
"""Beginnings of the variables that torchrun sets for its ranks, which a torchrun inside must not see."""
_SHOWN_CHARACTERS = 600


def run_job(
    program: Path,
    arguments: Sequence[str],
    *,
    num_ranks: int,
    deadline_seconds: float,
    environment: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> None:
    """Run a program under a torchrun, and wait for it.

    Args:
        environment: added to the variables of this process.
        quiet: keep what it prints, and tell the end of it when it fails.

    Raises:
        RuntimeError: it failed.
        subprocess.TimeoutExpired: it took too long, and was ended.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(num_ranks), str(program.resolve()), *arguments),
    ]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_VARIABLES)}
    with subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": "1", **inherited, **(environment or {})},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=deadline_seconds)
        except BaseException:
            # torchrun ends its ranks, which have sessions of their own
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        tail = f": ...{output[-_SHOWN_CHARACTERS:]}" if quiet else ""
        raise RuntimeError(f"{program.name}: exit code {process.returncode}{tail}")


class Answers:
    """Answers to one `Control` after another, from a thread. Use it as a context manager.

    Args:
        handlers: by the name of what is asked.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._directory = tempfile.TemporaryDirectory(prefix="benchmark-")
        self.address = str(Path(self._directory.name) / "control")
        self._listener = Listener(self.address, family="AF_UNIX")
        self._thread = threading.Thread(target=self._serve, name="answers", daemon=True)
        self._thread.start()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self._directory.cleanup()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                with self._listener.accept() as connection, suppress(EOFError):
                    self._answer(connection)

    def _answer(self, connection: Connection) -> None:
        while True:
            name, arguments = connection.recv()
            try:
                connection.send((self._handlers[name](*arguments), ""))
            except Exception as error:
                connection.send((None, repr(error)))


class Control:
    """A rank's way to ask the benchmark that has started it; one at a time has it.

    Args:
        address: of `Answers`.
    """

    def __init__(self, address: str) -> None:
        self._connection = Client(address, family="AF_UNIX")

    def ask(self, name: str, *arguments: object) -> object:
        """Have the handler called. Blocks.

        Raises:
            RuntimeError: it failed.
        """
        self._connection.send((name, arguments))
        answer, problem = self._connection.recv()
        if problem:
            raise RuntimeError(f"{name}: {problem}")
        return answer

    def close(self) -> None:
        self._connection.close()
