"""How ranks talk about checkpoints: a key-value store of our own, deadlines, and one verdict for all ranks.

Owns the store, which rank 0 hosts for the life of one Checkpointer, so nothing here runs a collective on the
user's process groups off the main thread and a rank that stays silent can be named. Knows nothing of storage
or state. Messages are JSON, never pickle.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from dcp_ckpt import errors
from dcp_ckpt.errors import CheckpointError, ConfigError, CoordinationError

__all__ = [
    "MISSING",
    "Channel",
    "SoloChannel",
    "StoreChannel",
    "agree",
    "as_checkpoint_error",
    "broadcast",
    "connect",
    "error_fields",
    "error_from_fields",
    "gather",
    "raise_first",
]

_Result = TypeVar("_Result")

_FIRST_POLL_SECONDS = 0.0005
_POLL_SECONDS = 0.02
_POLL_SECONDS_PER_RANK = 0.0002

MISSING = object()
"""Stands for a message that did not come in time."""


class Channel(Protocol):
    """A shared map of keys to JSON messages. Every method may be called from any thread."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def ranks_on_host(self) -> int:
        """How many ranks share this host's cores."""
        ...

    def put(self, key: str, message: Any) -> None:
        """Publish a message under a key that is used once."""
        ...

    def get(self, key: str, *, timeout_seconds: float) -> Any:
        """Wait for a message.

        Raises:
            TimeoutError: nobody published it in time.
            CoordinationError: the store is gone: rank 0's process ended.
        """
        ...

    def get_many(self, keys: Sequence[str], *, timeout_seconds: float) -> list[Any]:
        """Wait for several messages at once.

        Returns:
            The messages in order of the keys; `MISSING` where nobody published one in time.

        Raises:
            CoordinationError: the store is gone.
        """
        ...

    def forget(self, keys: Sequence[str]) -> None:
        """Free messages that nobody will ask for any more."""
        ...

    def clone(self) -> Channel:
        """The same channel over a connection of its own.

        A connection serialises its calls, so each thread has one.
        """
        ...

    def close(self) -> None:
        """Leave. Rank 0 waits for the others first, because its process hosts the store. Idempotent."""
        ...


class SoloChannel:
    """The channel of a single process without a process group."""

    rank = 0
    world_size = 1
    ranks_on_host = 1

    def __init__(self) -> None:
        self._messages: dict[str, Any] = {}

    def put(self, key: str, message: Any) -> None:
        self._messages[key] = message

    def get(self, key: str, *, timeout_seconds: float) -> Any:
        if key not in self._messages:
            raise TimeoutError(key)
        return self._messages[key]

    def get_many(self, keys: Sequence[str], *, timeout_seconds: float) -> list[Any]:
        return [self._messages.get(key, MISSING) for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._messages.pop(key, None)

    def clone(self) -> SoloChannel:
        return self

    def close(self) -> None:
        self._messages.clear()


class StoreChannel:
    """The channel of a world of several ranks, over a TCPStore hosted by rank 0."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        ranks_on_host: int,
        close_seconds: float,
        is_clone: bool = False,
    ) -> None:
        self._store: Store | None = store
        self.rank = rank
        self.world_size = world_size
        self.ranks_on_host = ranks_on_host
        self._close_seconds = close_seconds
        self._is_clone = is_clone

    def put(self, key: str, message: Any) -> None:
        with _store_errors(self.rank):
            data = msgspec.json.encode(message)
            self._alive().set(key, data)  # type: ignore[arg-type]  # the stub leaves bytes out

    def get(self, key: str, *, timeout_seconds: float) -> Any:
        store = self._alive()
        with _store_errors(self.rank):
            if not _wait(store, [key], timeout_seconds, world_size=self.world_size):
                raise TimeoutError(key)
            return msgspec.json.decode(store.get(key))

    def get_many(self, keys: Sequence[str], *, timeout_seconds: float) -> list[Any]:
        store = self._alive()
        with _store_errors(self.rank):
            if _wait(store, list(keys), timeout_seconds, world_size=self.world_size):
                return [msgspec.json.decode(data) for data in store.multi_get(list(keys))]
            return [msgspec.json.decode(store.get(key)) if store.check([key]) else MISSING for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        with _store_errors(self.rank):
            for key in keys:
                self._alive().delete_key(key)

    def clone(self) -> StoreChannel:
        with _store_errors(self.rank):
            return StoreChannel(
                self._alive().clone(),  # type: ignore[attr-defined]  # the stub leaves it out
                self.rank,
                self.world_size,
                ranks_on_host=self.ranks_on_host,
                close_seconds=self._close_seconds,
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

    def _alive(self) -> Store:
        if self._store is None:
            raise CoordinationError("the channel is closed", rank=self.rank)
        return self._store


def _wait(store: Store, keys: list[str], timeout_seconds: float, *, world_size: int) -> bool:
    """Wait for all keys; False when they are not all there in time."""
    if threading.current_thread() is not threading.main_thread():
        try:
            store.wait(keys, timedelta(seconds=max(timeout_seconds, 0.001)))
        except dist.DistStoreError:
            return False
        return True
    # The main thread asks again and again instead: while a blocking wait lasts, Python runs no signal handler
    # on it, and one that is cut in slices writes warnings to stderr at the end of each.
    deadline = time.monotonic() + timeout_seconds
    delay = _FIRST_POLL_SECONDS
    while not store.check(keys):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(delay, left))
        # All ranks ask one store: the more they are, the less often.
        delay = min(1.5 * delay, max(_POLL_SECONDS, world_size * _POLL_SECONDS_PER_RANK))
    return True


@contextlib.contextmanager
def _store_errors(rank: int) -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise CoordinationError(
            f"rank {rank} lost the connection to rank 0: its process has probably ended ({error})", rank=rank
        ) from error


def connect(process_group: dist.ProcessGroup | None, *, timeout_seconds: float) -> Channel:
    """Make the channel of this world. Called on all ranks, collectively, on the main thread; blocks.

    Args:
        process_group: the ranks that save and load together; None means the default group, or a single
            process when torch.distributed is not initialised.
        timeout_seconds: deadline of the connection and of closing.

    Raises:
        ConfigError: several processes were started but torch.distributed is not initialised.
    """
    if process_group is None and not dist.is_initialized():
        # The one read of the environment below the entry points: torchrun tells the world size nowhere else,
        # and several processes that each believe to be alone would overwrite each other's state.
        started = os.environ.get("WORLD_SIZE", "1")
        if started not in ("", "1"):
            raise ConfigError(
                f"WORLD_SIZE is {started} but torch.distributed is not initialised; call "
                "torch.distributed.init_process_group() before making a Checkpointer"
            )
        return SoloChannel()
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ConfigError("this process is not a member of the process group that saves and loads")
    if world_size == 1:
        return SoloChannel()
    return _connect_store(process_group, rank, world_size, timeout_seconds)


def _connect_store(
    process_group: dist.ProcessGroup | None, rank: int, world_size: int, timeout_seconds: float
) -> StoreChannel:
    hosts: list[str | None] = [None] * world_size
    dist.all_gather_object(hosts, _host_identity(), group=process_group)
    timeout = timedelta(seconds=timeout_seconds)
    address = "127.0.0.1" if len(set(hosts)) == 1 else _reachable_address()
    store: Store | None = None
    where: list[Any] = [address, 0, None]
    if rank == 0:
        try:
            hosted = TCPStore(address, 0, None, True, timeout, wait_for_workers=False)
            store, where[1] = hosted, hosted.port
        except dist.DistError as error:
            where[2] = str(error)
    source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    dist.broadcast_object_list(where, src=source, group=process_group)
    if where[2] is not None:
        raise CoordinationError(f"rank 0 cannot host a store at {where[0]}: {where[2]}", rank=0)
    if store is None:
        with _store_errors(rank):
            store = TCPStore(where[0], where[1], None, False, timeout, wait_for_workers=False)
    return StoreChannel(
        store,
        rank,
        world_size,
        ranks_on_host=hosts.count(hosts[rank]),
        close_seconds=min(timeout_seconds, 60.0),
    )


def _host_identity() -> str:
    """Equal for two processes exactly when they reach each other over loopback; host names are not unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/net")
    except OSError:
        return socket.gethostname()
    return f"{boot} {namespace}"


def _reachable_address() -> str:
    """The address by which other hosts reach this one: that of its default route, else its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: chooses a route, sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.getfqdn()


def broadcast(
    channel: Channel, tag: str, decide: Callable[[], _Result], *, timeout_seconds: float
) -> _Result:
    """Let rank 0 decide, and tell all ranks. Called on all ranks; blocks.

    Args:
        tag: unique in the life of the channel.
        decide: called on rank 0 only; its result must be JSON.

    Raises:
        CheckpointError: what `decide` raised, on every rank.
        CoordinationError: rank 0 did not answer in time.
    """
    if channel.rank == 0:
        try:
            result = decide()
        except Exception as error:
            channel.put(tag, {"error": error_fields(as_checkpoint_error(error, rank=0))})
            raise
        channel.put(tag, {"result": result})
        return result
    try:
        message = channel.get(tag, timeout_seconds=timeout_seconds)
    except TimeoutError as error:
        raise CoordinationError(
            f"rank 0 did not answer within {timeout_seconds:.0f} s", rank=channel.rank, phase=tag
        ) from error
    if "error" in message:
        raise error_from_fields(message["error"])
    answer: _Result = message["result"]
    return answer


def gather(channel: Channel, tag: str, message: Any, *, timeout_seconds: float) -> list[Any]:
    """Collect one message of every rank. Called on all ranks; blocks.

    Returns:
        The messages in rank order, on every rank.

    Raises:
        CoordinationError: names the ranks that did not answer in time; raised on every rank that did.
    """
    channel.put(f"{tag}/{channel.rank}", message)

    def collect() -> list[Any]:
        keys = [f"{tag}/{rank}" for rank in range(channel.world_size)]
        messages = channel.get_many(keys, timeout_seconds=timeout_seconds)
        missing = [rank for rank, found in enumerate(messages) if found is MISSING]
        if missing:
            raise CoordinationError(
                f"rank(s) {', '.join(map(str, missing))} did not answer within {timeout_seconds:.0f} s",
                phase=tag,
            )
        return messages

    return broadcast(channel, f"{tag}/all", collect, timeout_seconds=timeout_seconds + 10.0)


def agree(
    channel: Channel, tag: str, act: Callable[[], _Result], *, timeout_seconds: float
) -> tuple[_Result | None, list[CheckpointError]]:
    """Act on every rank, then learn every rank's failure. Called on all ranks; blocks.

    Returns:
        This rank's result (None when it failed) and the errors of all ranks, the same list on every rank.
    """
    result: _Result | None = None
    own: dict[str, Any] | None = None
    try:
        result = act()
    except Exception as error:
        own = error_fields(as_checkpoint_error(error, rank=channel.rank))
    verdicts = gather(channel, tag, own, timeout_seconds=timeout_seconds)
    return result, [error_from_fields(fields) for fields in verdicts if fields is not None]


def raise_first(failures: Sequence[CheckpointError]) -> None:
    """Raise the first failure, saying how many ranks failed."""
    if not failures:
        return
    if len(failures) > 1:
        failures[0].message += f" (and {len(failures) - 1} more ranks failed)"
    raise failures[0]


def as_checkpoint_error(error: BaseException, *, rank: int) -> CheckpointError:
    """The error to tell other ranks: what is not ours is wrapped, so that no failure leaves them waiting."""
    ours = error if isinstance(error, CheckpointError) else CheckpointError(f"internal error: {error!r}")
    ours.rank = rank if ours.rank is None else ours.rank
    return ours


def error_fields(error: CheckpointError) -> dict[str, Any]:
    """An error as JSON, to cross ranks."""
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "rank": error.rank,
        "step": error.step,
        "phase": error.phase,
        "path": error.path,
        "errno": error.errno,
    }


def error_from_fields(fields: dict[str, Any]) -> CheckpointError:
    """The inverse of `error_fields`."""
    rest = dict(fields)
    name = rest.pop("kind")
    kind: type[CheckpointError] = getattr(errors, name) if name in errors.__all__ else CheckpointError
    return kind(rest.pop("message"), **rest)
