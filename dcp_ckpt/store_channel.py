"""One rank's connection to the store that rank 0 hosts: messages, and waits that end.

Owns the calls of the store and what becomes of their errors. Must not know what the messages say. Made by
`coordination.connect`.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import msgspec
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

from dcp_ckpt.bounded_calls import BoundedCalls
from dcp_ckpt.errors import CoordinationError

__all__ = ["MISSING", "SILENCE_SECONDS", "StoreChannel", "store_errors"]

_Result = TypeVar("_Result")

_FIRST_POLL_SECONDS = 0.0005
_POLL_SECONDS = 0.02
_POLL_SECONDS_PER_RANK = 0.0002

_KEYS_AT_ONCE = 1024
"""Messages that are asked for in one call: the store takes five times as long for 16,000 in one."""

SILENCE_SECONDS = 10.0
"""How much longer than expected rank 0's process may take to answer, before it is taken for stopped."""

MISSING = object()
"""Stands for a message that did not come in time."""


class StoreChannel:
    """The channel of a world of several ranks, over a TCPStore hosted by rank 0.

    Its client waits for an answer for as long as it takes, and while rank 0's process is stopped there is
    none: every call is made through `calls`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        host_ranks: tuple[int, ...],
        close_seconds: float,
        calls: BoundedCalls | None = None,
        is_clone: bool = False,
    ) -> None:
        self._store: Store | None = store
        self._calls = calls or BoundedCalls("dcp_ckpt-store")
        self.rank = rank
        self.world_size = world_size
        self.host_ranks = host_ranks
        self._close_seconds = close_seconds
        self._is_clone = is_clone

    def put(self, key: str, message: Any) -> None:
        data = msgspec.json.encode(message)
        self._ask(lambda store: store.set(key, data))  # type: ignore[arg-type]  # the stub leaves bytes out

    def get(self, key: str, *, timeout_seconds: float) -> Any:
        data = self._await([key], timeout_seconds)
        if data is None:
            raise TimeoutError(key)
        return msgspec.json.decode(data[0])

    def get_many(self, keys: Sequence[str], *, timeout_seconds: float) -> list[Any]:
        there = wanted = list(keys)
        data = self._await(wanted, timeout_seconds)
        if data is None:
            there = [key for key, is_there in zip(wanted, self.present(wanted), strict=True) if is_there]
            data = self._ask(lambda store: _fetched(store, there))
        found = dict(zip(there, map(msgspec.json.decode, data), strict=True))
        return [found.get(key, MISSING) for key in wanted]

    def present(self, keys: Sequence[str]) -> list[bool]:
        return self._ask(lambda store: [store.check([key]) for key in keys])

    def forget(self, keys: Sequence[str]) -> None:
        self._ask(lambda store: [store.delete_key(key) for key in keys])

    def clone(self) -> StoreChannel:
        # On the thread of the new connection: this one may be waiting.
        calls = BoundedCalls("dcp_ckpt-store")
        clone: Callable[[Store], Store] = operator.methodcaller("clone")
        try:
            store = self._ask(clone, calls=calls)
        except BaseException:
            calls.close()
            raise
        return StoreChannel(
            store,
            self.rank,
            self.world_size,
            host_ranks=self.host_ranks,
            close_seconds=self._close_seconds,
            calls=calls,
            is_clone=True,
        )

    def close(self) -> None:
        if self._store is None:
            return
        try:
            if not self._is_clone:
                self.put(f"bye/{self.rank}", None)
                deadline = time.monotonic() + self._close_seconds
                for rank in range(1, self.world_size) if self.rank == 0 else ():
                    self.get(f"bye/{rank}", timeout_seconds=deadline - time.monotonic())
        except (TimeoutError, CoordinationError):
            pass  # a peer died or is stuck; it is told by its own deadlines
        finally:
            self._store = None
            self._calls.close()

    def _ask(
        self,
        call: Callable[[Store], _Result],
        *,
        within_seconds: float = 0.0,
        calls: BoundedCalls | None = None,
    ) -> _Result:
        """Ask the store. `within_seconds` is how long it takes to answer where all is well."""
        store = self._store
        if store is None:
            raise CoordinationError("the channel is closed", rank=self.rank)
        patience = max(within_seconds, 0.0) + SILENCE_SECONDS
        with store_errors(self.rank):
            try:
                return (calls or self._calls).call(lambda: call(store), patience_seconds=patience)
            except TimeoutError as error:
                raise CoordinationError(
                    f"rank 0 has not answered rank {self.rank} for {patience:.0f} s: its process is stopped, "
                    "or its host or the network is gone",
                    rank=0,
                ) from error

    def _await(self, keys: list[str], timeout_seconds: float) -> list[bytes] | None:
        """The data of all keys, once they are there; None when they are not all there in time."""
        interrupted = threading.Event()
        # All ranks ask one store: the more they are, the less often.
        poll_seconds = max(_POLL_SECONDS, self.world_size * _POLL_SECONDS_PER_RANK)
        if threading.current_thread() is threading.main_thread():
            came = partial(_seen, keys=keys, poll_seconds=poll_seconds, interrupted=interrupted)
        else:
            came = partial(_came, keys=keys)
        try:
            return self._ask(
                lambda store: _fetched(store, keys) if came(store, seconds=timeout_seconds) else None,
                within_seconds=timeout_seconds,
            )
        finally:
            interrupted.set()


def _seen(
    store: Store, *, keys: list[str], seconds: float, poll_seconds: float, interrupted: threading.Event
) -> bool:
    """Look for keys again and again, so that whoever is interrupted need not wait for the end.

    For the main thread. A wait of the store's that ends without the keys writes a warning to stderr, too.
    """
    deadline = time.monotonic() + seconds
    delay = _FIRST_POLL_SECONDS
    while not store.check(keys):
        left = deadline - time.monotonic()
        if left <= 0 or interrupted.wait(min(delay, left)):
            return False
        delay = min(1.5 * delay, poll_seconds)
    return True


def _came(store: Store, *, keys: list[str], seconds: float) -> bool:
    """Wait for keys; for threads that nobody interrupts."""
    try:
        store.wait(keys, timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError:
        return False
    return True


def _fetched(store: Store, keys: list[str]) -> list[bytes]:
    data: list[bytes] = []
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        data += operator.methodcaller("multi_get", keys[start : start + _KEYS_AT_ONCE])(store)
    return data


@contextlib.contextmanager
def store_errors(rank: int) -> Iterator[None]:
    """Tell errors of the store as what they mean: rank 0 is gone."""
    try:
        yield
    except dist.DistError as error:
        raise CoordinationError(
            f"rank {rank} lost the connection to rank 0: its process has probably ended ({error})", rank=rank
        ) from error
