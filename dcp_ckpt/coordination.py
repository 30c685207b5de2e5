"""How ranks talk about checkpoints: a key-value store of our own, deadlines, and one verdict for all ranks.

Owns the store, which rank 0 hosts for the life of one Checkpointer, so nothing here runs a collective on the
user's process groups off the main thread and a rank that stays silent can be named. Knows nothing of storage
or state. Messages are JSON, never pickle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from dcp_ckpt import errors
from dcp_ckpt.errors import CheckpointError, ConfigError, CoordinationError
from dcp_ckpt.forks import spare_forked_children
from dcp_ckpt.hosts import LOOPBACK, host_identity, own_addresses, reachable_address
from dcp_ckpt.store_channel import MISSING, StoreChannel, store_errors

__all__ = [
    "MISSING",
    "Channel",
    "Failures",
    "SoloChannel",
    "StoreChannel",
    "agree",
    "as_checkpoint_error",
    "broadcast",
    "connect",
    "error_fields",
    "error_from_fields",
    "failures_from",
    "first_failures",
    "global_ranks",
    "rank_in",
    "reduce",
]

_Result = TypeVar("_Result")


class Channel(Protocol):
    """A shared map of keys to JSON messages. Every method may be called from any thread."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def host_ranks(self) -> tuple[int, ...]:
        """The ranks that share this host, this one among them, ascending."""
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
        """Wait for several messages at once; `MISSING` stands where nobody published one in time.

        Raises:
            CoordinationError: the store is gone.
        """
        ...

    def present(self, keys: Sequence[str]) -> list[bool]:
        """Which messages are there. Does not wait; raises as `get_many`."""
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
    host_ranks = (0,)

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

    def present(self, keys: Sequence[str]) -> list[bool]:
        return [key in self._messages for key in keys]

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._messages.pop(key, None)

    def clone(self) -> SoloChannel:
        return self

    def close(self) -> None:
        self._messages.clear()


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
    spare_forked_children()
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise ConfigError("this process is not a member of the process group that saves and loads")
    if world_size == 1:
        return SoloChannel()
    return _connect_store(process_group, rank, world_size, timeout_seconds)


def rank_in(process_group: dist.ProcessGroup | None) -> int:
    """This process's rank as `connect` will see it; -1 when it is no member. Asks nobody."""
    return dist.get_rank(process_group) if dist.is_initialized() else 0


def global_ranks(process_group: dist.ProcessGroup | None, world_size: int) -> list[int]:
    """The group's ranks as device meshes number them. Asks nobody."""
    if process_group is None or not dist.is_initialized():
        return list(range(world_size))
    return dist.get_process_group_ranks(process_group)


def _connect_store(
    process_group: dist.ProcessGroup | None, rank: int, world_size: int, timeout_seconds: float
) -> StoreChannel:
    hosts: list[Any] = [None] * world_size
    dist.all_gather_object(hosts, host_identity(), group=process_group)
    on_one_host = len(set(hosts)) == 1
    timeout = timedelta(seconds=timeout_seconds)
    store: Store | None = None
    where: list[Any] = [None, 0, None]
    if rank == 0:
        try:
            # The server listens on all interfaces, whatever it is told.
            hosted = TCPStore(LOOPBACK, 0, None, True, timeout, wait_for_workers=False)
            store, where = hosted, [[] if on_one_host else own_addresses(), hosted.port, None]
        except dist.DistError as error:
            where[2] = str(error)
    source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    dist.broadcast_object_list(where, src=source, group=process_group)
    addresses, port, problem = where
    if problem is not None:
        raise CoordinationError(f"rank 0 cannot host a store: {problem}", rank=0)
    address = LOOPBACK if on_one_host else _reached(process_group, rank, addresses, port)
    if store is None:
        with store_errors(rank):
            store = TCPStore(address, port, None, False, timeout, wait_for_workers=False)
    return StoreChannel(
        store,
        rank,
        world_size,
        host_ranks=tuple(other for other, host in enumerate(hosts) if host == hosts[rank]),
        close_seconds=min(timeout_seconds, 60.0),
    )


def _reached(process_group: dist.ProcessGroup | None, rank: int, addresses: list[str], port: int) -> str:
    """The address at which this rank reaches rank 0; raises on all ranks when one does not."""
    found = LOOPBACK if rank == 0 else reachable_address(addresses, port)
    answers: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(answers, found, group=process_group)
    cut_off = [number for number, answer in enumerate(answers) if answer is None]
    if cut_off:
        raise CoordinationError(
            f"rank(s) {', '.join(map(str, cut_off))} cannot reach rank 0 at port {port} of its addresses "
            f"({', '.join(addresses) or 'none but loopback'}); let the nodes connect on all TCP ports",
            rank=cut_off[0],
            phase="open",
        )
    return str(found)


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


def reduce(
    channel: Channel,
    tag: str,
    message: Any,
    combine: Callable[[list[Any]], _Result],
    *,
    timeout_seconds: float,
) -> _Result:
    """Let rank 0 combine one message of every rank, and tell all of them. Called on all ranks; blocks.

    Args:
        combine: called on rank 0 only, with the messages in rank order; its result must be JSON, and small,
            since every rank gets it: a list with an entry for each rank would be ranks times ranks.

    Raises:
        CheckpointError: what `combine` raised, on every rank.
        CoordinationError: names the ranks that did not answer in time; raised on every rank that did.
    """
    channel.put(f"{tag}/{channel.rank}", message)

    def collect() -> _Result:
        keys = [f"{tag}/{rank}" for rank in range(channel.world_size)]
        messages = channel.get_many(keys, timeout_seconds=timeout_seconds)
        missing = [rank for rank, found in enumerate(messages) if found is MISSING]
        if missing:
            raise CoordinationError(
                f"rank(s) {', '.join(map(str, missing))} did not answer within {timeout_seconds:.0f} s",
                phase=tag,
            )
        return combine(messages)

    return broadcast(channel, f"{tag}/all", collect, timeout_seconds=timeout_seconds + 10.0)


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What failed on how many ranks; the same on every rank. False where nothing did.

    Args:
        errors: the first of each kind, in the order of ranks.
    """

    errors: tuple[CheckpointError, ...] = ()
    num_ranks: int = 0

    def __bool__(self) -> bool:
        return self.num_ranks > 0

    def raise_first(self, *, rather: type[CheckpointError] = CheckpointError) -> None:
        """Raise the first failure, if any, saying how many ranks failed.

        What says only that another rank failed is raised where nothing says why.

        Args:
            rather: where there is one of this kind, the first of these.
        """
        if not self.errors:
            return
        causes = [error for error in self.errors if not isinstance(error, CoordinationError)] or self.errors
        error = next((error for error in causes if isinstance(error, rather)), causes[0])
        if self.num_ranks > 1:
            error.message += f" (and {self.num_ranks - 1} more ranks failed)"
        raise error


def first_failures(verdicts: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """What all ranks are told of the `error_fields` of those that failed; see `failures_from`."""
    failed = [fields for fields in verdicts if fields is not None]
    firsts: dict[str, dict[str, Any]] = {}
    for fields in failed:
        firsts.setdefault(fields["kind"], fields)
    return {"errors": list(firsts.values()), "num_ranks": len(failed)}


def failures_from(told: dict[str, Any]) -> Failures:
    """The inverse of `first_failures`, but for what it left out."""
    return Failures(errors=tuple(map(error_from_fields, told["errors"])), num_ranks=told["num_ranks"])


def agree(
    channel: Channel, tag: str, act: Callable[[], _Result], *, timeout_seconds: float
) -> tuple[_Result | None, Failures]:
    """Act on every rank, then learn whether all succeeded. Called on all ranks; blocks.

    Returns:
        This rank's result (None when it failed), and what failed on whichever ranks.
    """
    result: _Result | None = None
    own: dict[str, Any] | None = None
    try:
        result = act()
    except Exception as error:
        own = error_fields(as_checkpoint_error(error, rank=channel.rank))
    told = reduce(channel, tag, own, first_failures, timeout_seconds=timeout_seconds)
    return result, failures_from(told)


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
