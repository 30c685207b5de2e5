"""The program of one rank of a `RankPool`: imports torch once, then runs functions in fresh process groups.

Owns what happens inside of the worker process. Ends when its pool says so, and at once when the pool's own
process is gone. Knows nothing of checkpoints. Started by `dcp_ckpt.testing.ranks`.
"""

from __future__ import annotations

import faulthandler
import importlib
import operator
import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, not in its __all__

from dcp_ckpt.forks import spare_forked_children

__all__ = ["DUMP_SIGNAL", "Reply", "Request", "main", "pickled_error"]

DUMP_SIGNAL = signal.SIGUSR1
"""Makes a worker print the stacks of all its threads and end."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run on one rank.

    Args:
        function: "module:qualified.name".
        arguments: pickled; read once `module_path` is in place, since their types may be the caller's own.
        module_path: the caller's `sys.path`.
        store_port: of the TCPStore on this host where the ranks meet.
        number: of the run; keeps its keys in the store apart.
    """

    function: str
    arguments: bytes
    module_path: tuple[str, ...]
    rank: int
    world_size: int
    store_port: int
    number: int
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The outcome of one run on one rank: a pickled result, or a pickled error with its traceback as text."""

    result: bytes = b""
    error: bytes = b""
    traceback: str = ""


def main(arguments: Sequence[str]) -> int:
    """Serve the pool until it says stop.

    Args:
        arguments: the number of the inherited connection, then modules to import before the first run.
    """
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=True)
    spare_forked_children()  # each run leaves its process groups to the garbage collector
    connection: Connection[Reply, Request | None] = Connection(int(arguments[0]))
    threading.Thread(target=_end_with_pool, args=(connection.fileno(),), daemon=True).start()
    for module in arguments[1:]:
        importlib.import_module(module)
    connection.send(Reply())
    while (request := connection.recv()) is not None:
        connection.send(_answer(request))
    return 0


def _end_with_pool(descriptor: int) -> None:
    """A rank that is stuck in a collective must not outlive the process that would have killed it."""
    hung_up = select.poll()
    hung_up.register(descriptor, 0)
    hung_up.poll()
    os._exit(1)


def _answer(request: Request) -> Reply:
    try:
        sys.path[:] = request.module_path
        module, _, name = request.function.partition(":")
        function = operator.attrgetter(name)(importlib.import_module(module))
        # From the pool that started this process, over a pipe that nobody else has.
        arguments = pickle.loads(request.arguments)
        with _process_group(request):
            result = function(*arguments)
        return Reply(result=pickle.dumps(result))
    # Also SystemExit and what test frameworks raise: the rank lives on, and the pool decides.
    except BaseException as error:
        return Reply(error=pickled_error(error), traceback=traceback.format_exc())


@contextmanager
def _process_group(request: Request) -> Iterator[None]:
    """The default process group of one run, and the environment that torchrun would give."""
    timeout = timedelta(seconds=request.timeout_seconds)
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    numbers = request.rank, request.world_size
    own = {name: str(number) for group, number in zip(names, numbers, strict=True) for name in group}
    store = TCPStore("127.0.0.1", request.store_port, None, False, timeout, wait_for_workers=False)
    os.environ.update(own)
    try:
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"run-{request.number}", store),
            rank=request.rank,
            world_size=request.world_size,
            timeout=timeout,
        )
        _wait_for_all(store, request, timeout)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in own:
            os.environ.pop(name, None)


def _wait_for_all(store: TCPStore, request: Request, timeout: timedelta) -> None:
    """Who has connected may end at once, which is an error for those that are still connecting."""
    key = f"run-{request.number}/connected"
    if store.add(f"{key}/count", 1) == request.world_size:
        store.set(key, "all")
    store.wait([key], timeout)


def pickled_error(error: BaseException) -> bytes:
    """The error as bytes; one that does not survive pickling is replaced by its description."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    # Whatever an exception's own constructor or __reduce__ may raise.
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__qualname__}: {error}"))
    return data
