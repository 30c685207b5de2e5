"""Ranks for tests: a pool of processes that import torch once and then run many small worlds.

Starting a world with torchrun costs seconds, most of them for imports; a run on a warm pool costs what the
function under test costs. Owns the processes and how a run ends: results, the first error, or the stacks of
ranks that are stuck. Knows nothing of checkpoints. Not for tests that kill ranks or leave something behind.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its __all__

from dcp_ckpt.closing import Closing
from dcp_ckpt.testing.rank_worker import DUMP_SIGNAL, Reply, Request, pickled_error

__all__ = ["RankDied", "RankPool", "RankTimeout"]

Result = TypeVar("Result")

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_AFTER_FAILURE_SECONDS = 3.0
"""How long the other ranks may take once one has failed: most are waiting for it and never come back."""
_SHOWN_CHARACTERS = 20_000
_PRELOAD = ("torch.distributed.tensor", "torch.distributed.fsdp")

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from dcp_ckpt.testing.rank_worker import main; sys.exit(main(sys.argv[1:]))"
)


class RankTimeout(TimeoutError):
    """Ranks did not finish in time; the message names them and holds the stacks of all their threads."""


class RankDied(RuntimeError):
    """The process of a rank ended in the middle of a run."""


class RankPool(Closing):
    """A fixed number of worker processes, each of which can be one rank. Use it as a context manager.

    A worker keeps what a function leaves behind in its process: modules, environment, random numbers. Seed
    what must repeat. Not thread-safe: one run at a time.

    Args:
        num_ranks: the largest world; the processes start at once and import in the background.
        timeout_seconds: of a run, unless it names its own.
        preload: modules that every worker imports before its first run.
        environment: variables of the workers on top of this process's own. OMP_NUM_THREADS is 1 unless given,
            so that results repeat and ranks do not fight for cores.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        timeout_seconds: float = 60.0,
        preload: Sequence[str] = _PRELOAD,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._num_ranks = num_ranks
        self._timeout_seconds = timeout_seconds
        self._preload = tuple(preload)
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        # In this process, so that its port is bound before anybody hears of it.
        self._store = TCPStore(
            "127.0.0.1", 0, None, True, timedelta(seconds=timeout_seconds), wait_for_workers=False
        )
        self._num_runs = 0
        self._closed = False
        self._workers: list[_Worker] = []
        self._start()

    def run(
        self,
        function: Callable[..., Result] | str,
        world_size: int,
        *args: Any,
        timeout_seconds: float | None = None,
    ) -> list[Result]:
        """Call a function on ranks 0 to `world_size` - 1, in a new default process group (gloo). Blocks.

        Args:
            function: of a module, as itself or as "module:name"; the workers import it, so it is not nested.
            args: the same for all ranks, pickled; so are the results.

        Returns:
            The results in rank order.

        Raises:
            BaseException: what the first failing rank raised, with its rank and traceback as a note.
            RankTimeout: some ranks did not finish in time; the next run starts on new processes.
            RankDied: the process of a rank ended.
        """
        if not 1 <= world_size <= self._num_ranks or self._closed:
            raise ValueError(f"a pool of {0 if self._closed else self._num_ranks} ranks has no {world_size}")
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        arguments = pickle.dumps(args)
        self._start()
        self._num_runs += 1
        requests = [
            Request(
                function=name,
                arguments=arguments,
                module_path=tuple(sys.path),
                rank=rank,
                world_size=world_size,
                store_port=self._store.port,
                number=self._num_runs,
                timeout_seconds=limit,
            )
            for rank in range(world_size)
        ]
        workers = self._workers[:world_size]
        self._submit(workers, requests)
        return self._collect(workers, name, limit)

    def close(self) -> None:
        """Join all workers. Idempotent."""
        self._closed = True
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
            worker.forget()

    def _start(self) -> None:
        if not self._workers:
            self._workers = [_Worker(self._preload, self._environment) for _ in range(self._num_ranks)]

    def _submit(self, workers: Sequence[_Worker], requests: Sequence[Request]) -> None:
        try:
            for worker in workers:
                worker.wait_ready()
            for worker, request in zip(workers, requests, strict=True):
                worker.submit(request)
        except (RankDied, OSError) as error:
            self._discard(())
            raise RankDied(f"a rank ended before the run began: {error}") from error

    def _collect(self, workers: Sequence[_Worker], name: str, limit: float) -> list[Any]:
        """The results, or the error of a run whose ranks have all been given their part."""
        replies: dict[int, Reply] = {}
        try:
            self._wait(workers, replies, limit)
        except BaseException:
            # Interrupted, by the user or by a test's own deadline: late replies must not meet the next run.
            self._discard([rank for rank in range(len(workers)) if rank not in replies])
            raise
        stuck = [rank for rank in range(len(workers)) if rank not in replies]
        report = self._discard(stuck) if stuck or any(worker.is_dead for worker in workers) else ""
        failed = [rank for rank, reply in replies.items() if reply.error]
        if failed:
            raise _first_error(failed, replies, report)
        if stuck:
            raise RankTimeout(f"rank(s) {_listed(stuck)} did not end {name} within {limit:g} s\n{report}")
        return [pickle.loads(replies[rank].result) for rank in range(len(workers))]

    def _wait(self, workers: Sequence[_Worker], replies: dict[int, Reply], limit: float) -> None:
        """Collect replies in the order in which they come; once one is a failure, for a short while only."""
        waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0.0))
            if not ready:
                return
            for connection in [key for key in waiting if key in ready]:
                rank = waiting.pop(connection)
                replies[rank] = workers[rank].receive()
                if replies[rank].error:
                    deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_SECONDS)

    def _discard(self, stuck: Sequence[int]) -> str:
        """End all workers, so that the next run gets new ones.

        Returns:
            What the stuck ranks were doing.
        """
        workers, self._workers = self._workers, []
        for rank in stuck:
            workers[rank].dump()
        reports = []
        for rank, worker in enumerate(workers):
            if rank not in stuck:
                worker.stop()
            worker.join()
            if rank in stuck:
                reports.append(f"--- rank {rank} was stuck; it printed:\n{worker.printed}")
            worker.forget()
        return "\n".join(reports)


class _Worker:
    """One process, the connection to it, and what it prints."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]) -> None:
        self.connection: Connection[Any, Any]
        self.connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by forget()
        self._output_start = 0
        self._is_ready = False
        root = str(Path(__file__).resolve().parents[2])
        descriptor = theirs.fileno()
        command = [sys.executable, "-c", _BOOT, json.dumps([root, *sys.path]), str(descriptor), *preload]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[descriptor],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_dead(self) -> bool:
        return self._process.poll() is not None

    @property
    def printed(self) -> str:
        """What it printed since the last run began, or the end of that."""
        self._output.seek(self._output_start)
        return self._output.read().decode(errors="replace")[-_SHOWN_CHARACTERS:]

    def wait_ready(self) -> None:
        """Wait until it has imported everything; does nothing later.

        Raises:
            RankDied: it ended, or did not start in time.
        """
        if not self._is_ready:
            if not self.connection.poll(_START_SECONDS) or self.receive().error:
                raise RankDied(f"it did not start; it printed:\n{self.printed}")
            self._is_ready = True

    def submit(self, request: Request) -> None:
        """Give it one run. Does not block."""
        self._output_start = os.fstat(self._output.fileno()).st_size
        self.connection.send(request)

    def receive(self) -> Reply:
        """The reply that is there; the end of the process counts as one."""
        try:
            reply: Reply = self.connection.recv()
        except (EOFError, ConnectionError):
            self.join()
            message = f"the process ended with code {self._process.returncode}; it printed:\n{self.printed}"
            return Reply(error=pickled_error(RankDied(message)))
        return reply

    def dump(self) -> None:
        """Ask it to print its stacks and to end. Does not block."""
        self._process.send_signal(DUMP_SIGNAL)

    def stop(self) -> None:
        """Ask it to end once it has nothing to do. Does not block."""
        try:
            self.connection.send(None)
        except OSError:
            return  # it ended already

    def join(self) -> None:
        """Wait for its end, and kill it when that takes too long. Idempotent."""
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()

    def forget(self) -> None:
        self._output.close()


def _first_error(failed: Sequence[int], replies: Mapping[int, Reply], report: str) -> BaseException:
    """The error that came first, with everything that is known as notes."""
    rank = failed[0]
    error: BaseException = pickle.loads(replies[rank].error)
    error.add_note(f"on rank {rank}:\n{replies[rank].traceback}")
    others: dict[str, list[int]] = {}
    for other in failed[1:]:
        others.setdefault(repr(pickle.loads(replies[other].error)), []).append(other)
    for shown, ranks in others.items():
        what = "the same" if shown == repr(error) else shown
        error.add_note(f"after it, on rank(s) {_listed(ranks)}: {what}")
    if report:
        error.add_note(report)
    return error


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
