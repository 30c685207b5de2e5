"""Where the run of a test lives, on a file system or in an object store, and how a process is held there.

On a file system it is held at a system call, in front of S3 at a request that a proxy does not pass on, or
whose answer it keeps back. The processes know nothing of it.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcp_ckpt.format.names import EPOCHS
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.killpoints import KillPoint
from dcp_ckpt.testing.proxy_faults import Arrival, Hold
from dcp_ckpt.testing.s3_operations import S3Operation
from tests.crash.starts import Start, wait_until
from tests.eventually import eventually

__all__ = ["HELD_SECONDS", "Gate", "Held", "Moment", "Place"]

HELD_SECONDS = 120.0
SAVE_SECONDS = 300.0
"""A save that is held must not fail by its own deadline meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One effect of one process on the run, and whether it is held before it or after it.

    Args:
        role: `trainer` or `writer`, of rank 0. Commands count as trainers.
        call: on a file system.
        path: a pattern as in `fnmatch`, below the run.
        request: to an object store; PUT or DELETE of `key`.
        key: as `path`, where the two differ.
    """

    role: Literal["trainer", "writer"]
    call: str
    path: str
    request: S3Operation = S3Operation.PUT
    key: str = ""
    after: bool = False


class Gate:
    """Holds the requests of one moment until it is released; the decision of a `FaultProxy`."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self.reached = threading.Event()
        self.released = threading.Event()

    def __call__(self, arrival: Arrival) -> Hold | None:
        moment = self._moment
        pattern = f"*/{moment.key or moment.path}"
        if arrival.kind != moment.request or not fnmatch.fnmatchcase(arrival.path, pattern):
            return None
        self.reached.set()
        return Hold(released=self.released, answer=moment.after)


class Held:
    """One start whose process is held at a moment, once it comes there."""

    def __init__(self, start: Start, gate: Gate | None) -> None:
        self.start = start
        self._gate = gate

    @property
    def is_held(self) -> bool:
        return bool(self.start.book.held()) if self._gate is None else self._gate.reached.is_set()

    def wait_held(self) -> None:
        wait_until(lambda: self.is_held, HELD_SECONDS, self.start)

    def release(self) -> None:
        """Let it go on. Idempotent."""
        if self._gate is not None:
            self._gate.released.set()
        self.start.book.release()


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run of one test.

    Args:
        directory: of the test, for logs and, on a file system, for the run.
        url: of the run.
        endpoint_url: of the object store; None on a file system.
    """

    directory: Path
    url: str
    endpoint_url: str | None

    @contextmanager
    def held(self, moment: Moment) -> Iterator[tuple[Sequence[KillPoint], Mapping[str, str], Gate | None]]:
        """What a process needs to be held: kill points and environment; and the gate, for a store."""
        if self.endpoint_url is None:
            point = KillPoint(
                role=moment.role,
                call=moment.call,
                path=f"{self.url}/{moment.path}",
                after=moment.after,
                action="hold",
            )
            yield [point], {}, None
            return
        gate = Gate(moment)
        with FaultProxy(self.endpoint_url, decide=gate) as proxy:
            try:
                yield [], {"AWS_ENDPOINT_URL": proxy.endpoint_url}, gate
            finally:
                gate.released.set()

    @contextmanager
    def start(self, name: str, *options: str, hold: Moment | None = None) -> Iterator[Held]:
        """One start of the small training on one rank."""
        with ExitStack() as stack:
            points, environment, gate = stack.enter_context(self.held(hold)) if hold else ((), {}, None)
            start = Start(
                self.directory,
                name,
                points=points,
                options=("--timeout", str(SAVE_SECONDS), *options),
                url=self.url,
                environment=environment,
            )
            yield Held(stack.enter_context(start), gate)

    def wait_for_leases(self) -> None:
        """Until none is held: on a store, that of a process that was killed takes its time to run out."""
        with closing(open_storage(self.url)) as storage:
            names = [name for name in storage.list_names(f"{EPOCHS}/") if name.endswith(".lease")]
            assert eventually(
                lambda: not any(storage.lease_is_held(f"{EPOCHS}/{name}") for name in names),
                timeout_seconds=HELD_SECONDS,
            )

    def unfinished_uploads(self) -> list[str]:
        """Of an object store; they are discarded by asking."""
        with closing(open_storage(self.url)) as storage:
            return storage.abort_uploads("", lambda key: True)
