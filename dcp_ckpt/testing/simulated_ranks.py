"""Ranks of a world that is not there, in one process: what a rank and rank 0 do to save, and a rank to load.

For measuring how planning and metadata grow with the ranks. All of it is the production code, over an object
storage in memory and a real store; only the process group sends nothing, and what other ranks report is made
from the report of one that is simulated. Every rank holds one row of each tensor, sharded on dimension 0.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.fragment import Fragment, encode_fragment, layout_digest
from dcp_ckpt.format.manifest import FragmentSummary, decode_manifest, summarize
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, fragment_name
from dcp_ckpt.load.fill import fill
from dcp_ckpt.load.read_plan import Target
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.own_fragment import own_fragment
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, to_message
from dcp_ckpt.save.staging import Stager, capture
from dcp_ckpt.state.placements import local_tensor, placements_of
from dcp_ckpt.state.train_state import components_to_save
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.storage.metered import MeteredStorage
from dcp_ckpt.store_channel import StoreChannel
from dcp_ckpt.writer.engine import write_attempt
from dcp_ckpt.writer.messages import WriteJob

__all__ = ["Resumed", "SimulatedCoordinator", "SimulatedRank", "SimulatedWorld"]

_COLUMNS = 64
_CREATED_AT = "2026-01-01T00:00:00.000000Z"
_WAIT_SECONDS = 120.0
_EMPTY_LAYOUT = layout_digest([], [], [])


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a rank reads before its tensors, and whether these are right then.

    Args:
        manifest_bytes, fragment_bytes: of what says where the tensors are.
        seconds: of reading them from memory, decoding and checking them, and finding the chunks.
        is_equal: whether all that was loaded is what was saved.
    """

    manifest_bytes: int
    fragment_bytes: int
    seconds: float
    is_equal: bool


@dataclass(frozen=True, kw_only=True)
class SimulatedWorld:
    """A world, and what its ranks have saved.

    Args:
        world_size: its ranks, and the rows of each tensor.
        num_tensors: float32, of 64 columns.
    """

    world_size: int
    num_tensors: int
    storage: MemoryStorage = field(default_factory=MemoryStorage)

    def rank(self, rank: int) -> SimulatedRank:
        """One rank that saves. There is one at a time: it is in the default process group."""
        return SimulatedRank(self, rank)

    def coordinator(self) -> SimulatedCoordinator:
        """Rank 0's part of the saves."""
        return SimulatedCoordinator(self)

    def resume(
        self, call: int, expected: Sequence[Mapping[str, torch.Tensor]], *, rank: int, world_size: int
    ) -> Resumed:
        """A load of save number `call` by one rank of another world, or of this one.

        Args:
            expected: the local tensors that make up this rank's, part by part; the ranks that hold them must
                have saved.
        """
        local_rows = sum(len(next(iter(part.values()))) for part in expected)
        with _fake_state(rank, world_size, self.world_size, local_rows, self.num_tensors) as state:
            targets = {
                name: Target(local=local_tensor(tensor), box=placements_of(tensor, name)[1])
                for name, tensor in state.items()
            }
            metered = MeteredStorage(self.storage)
            start = time.perf_counter()
            key = f"{StepDir(call)}/{MANIFEST}"
            source = StoredCheckpoint(metered, StepDir(call), decode_manifest(metered.read(key), path=key))
            source.chunks({name: target.box for name, target in targets.items()})
            seconds = time.perf_counter() - start
            fragment_bytes = metered.count("read_ranges").num_bytes
            fill(source, targets, verify=True, concurrency=1)
            return Resumed(
                manifest_bytes=metered.count("read").num_bytes,
                fragment_bytes=fragment_bytes,
                seconds=seconds,
                is_equal=all(
                    torch.equal(target.local, torch.cat([part[name] for part in expected]))
                    for name, target in targets.items()
                ),
            )


class SimulatedRank(Closing):
    """One rank that saves; `tensors` are its parts of the state."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self._world = world
        self._rank = rank
        self._resources = ExitStack()
        size = world.world_size
        self._state = self._resources.enter_context(_fake_state(rank, size, size, 1, world.num_tensors))
        self.tensors = {name: local_tensor(tensor) for name, tensor in self._state.items()}
        for number, tensor in enumerate(self.tensors.values()):
            tensor.normal_(generator=torch.Generator().manual_seed(number * size + rank))
        self._stager = Stager(rank=rank, world_size=size, global_ranks=range(size))
        self._resources.callback(self._stager.close)

    def close(self) -> None:
        self._resources.close()

    def save(self, call: int) -> Report:
        """All that this rank and its writer do for save number `call`, up to the report.

        The bytes of the state are among it; they are few.
        """
        captured = capture(components_to_save({**self._state, "epoch": call}))
        staged = self._stager.stage(captured, overlap=False)
        fragment = own_fragment(
            staged,
            staged.replicas({}),
            _claim(self._world.world_size),
            _attempt(call),
            rank=self._rank,
            world_size=self._world.world_size,
            step=call,
            created_at=_CREATED_AT,
            metrics={"loss": 1.0},
            tags=(),
        )
        job = WriteJob(
            storage_url=self._world.storage.url,
            directory=str(StepDir(call)),
            fragment=fragment,
            sources=[source for _, source in staged.files],
            payloads=staged.payloads,
            direct_io=True,
        )
        received = msgspec.json.decode(msgspec.json.encode(job), type=WriteJob)
        with (
            mmap.mmap(staged.arena.descriptor, 0, access=mmap.ACCESS_READ) as arena,
            memoryview(arena) as view,
        ):
            ref = write_attempt(self._world.storage, received, view, _tell_nobody)
        return Report(summary=FragmentSummary.of(fragment, ref))


class SimulatedCoordinator(Closing):
    """Rank 0's part of the saves of a world.

    The first save is special: rank 0 reads all fragments then. Here they are empty, since what it does later
    does not depend on what is in them.
    """

    def __init__(self, world: SimulatedWorld) -> None:
        self._storage = world.storage
        self._world_size = world.world_size
        timeout = timedelta(seconds=_WAIT_SECONDS)
        hosted = TCPStore("127.0.0.1", 0, None, True, timeout, wait_for_workers=False)
        # A clone waits for nobody when it is closed.
        self._channel = StoreChannel(
            hosted, 0, world.world_size, host_ranks=(0,), close_seconds=1.0, is_clone=True
        )
        self._coordinator = Coordinator(world.storage, self._channel, epoch=1)

    def close(self) -> None:
        self._coordinator.close()
        self._channel.close()

    def first_save(self, like: Report) -> None:
        """Save number 1, of nothing, by all ranks; `like` is the report of any rank."""
        assert like.summary is not None, "it saved"
        empty = Fragment(
            run_id=like.summary.run_id,
            epoch=like.summary.epoch,
            epoch_id=like.summary.epoch_id,
            attempt=str(_attempt(1)),
            step=1,
            rank=0,
            world_size=self._world_size,
            files=[],
            meshes=[],
            tensors=[],
            chunks=[],
            layout=_EMPTY_LAYOUT,
            values={},
            per_rank={},
            replicated=like.summary.replicated,
        )
        reports = {}
        for rank in range(self._world_size):
            fragment = replace(empty, rank=rank, created_at=_CREATED_AT if rank == 0 else None)
            data = encode_fragment(fragment)
            self._storage.create_exclusive(f"{StepDir(1)}/{fragment_name(rank, _attempt(1))}", data)
            reports[rank] = Report(summary=summarize(fragment, data))
        self.report(1, reports)
        self.conclude(1)

    def report(self, call: int, reports: Mapping[int, Report]) -> None:
        """Publish what all ranks report of a save. In a training they do so side by side.

        Args:
            reports: of some ranks; the others say nearly what the last of these says.
        """
        like = reports[max(reports)].summary
        assert like is not None, "it saved"
        for rank in range(self._world_size):
            summary = reports[rank].summary if rank in reports else None
            if summary is None:
                ref = replace(like.ref, digest=digest(f"{call}/{rank}".encode()))
                summary = replace(like, rank=rank, ref=ref, created_at=None, metrics={}, indexes=False)
            # As at the first save: the tables are not new, so they are not read again.
            summary = replace(summary, layout=_EMPTY_LAYOUT)
            self._channel.put(SaveKeys(call).report(rank), to_message(Report(summary=summary)))

    def conclude(self, call: int) -> float:
        """What rank 0 does with the reports, on a thread of its own as in a training.

        Returns:
            Seconds.

        Raises:
            SaveFailed: the save was not committed.
        """
        found: list[tuple[float, Verdict]] = []

        def run() -> None:
            start = time.perf_counter()
            verdict = self._coordinator.conclude(
                SaveKeys(call),
                step=call,
                directory=StepDir(call),
                attempt=_attempt(call),
                deadline=time.monotonic() + _WAIT_SECONDS,
            )
            self._channel.put(SaveKeys(call).verdict, to_message(verdict))
            found.append((time.perf_counter() - start, verdict))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if not found or found[0][1].outcome != "committed":
            raise SaveFailed(f"a save of {self._world_size} simulated ranks was not committed: {found}")
        for rank in range(self._world_size):
            self._channel.forget(SaveKeys(call).told_by(rank))
        return found[0][0]


@contextmanager
def _fake_state(
    rank: int, world_size: int, num_rows: int, local_rows: int, num_tensors: int
) -> Iterator[dict[str, DTensor]]:
    """The tensors of one rank, on a process group in which nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = DeviceMesh("cpu", torch.arange(world_size))
        yield {
            f"layers.{number // 10}.weight_{number:03}": DTensor.from_local(
                torch.zeros(local_rows, _COLUMNS),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size((num_rows, _COLUMNS)),
                stride=(_COLUMNS, 1),
            )
            for number in range(num_tensors)
        }
    finally:
        dist.destroy_process_group()


def _attempt(call: int) -> AttemptId:
    return AttemptId(1, call)


def _claim(world_size: int) -> EpochClaim:
    return EpochClaim(
        run_id="0" * 32, epoch=1, epoch_id="1" * 32, world_size=world_size, host="", pid=0,
        created_at=_CREATED_AT, purpose="train",
    )  # fmt: skip


def _tell_nobody(key: str, *, bytes_done: int, bytes_total: int) -> None:
    """Nobody watches the writer here."""
