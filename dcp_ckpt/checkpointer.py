"""The facade: `Checkpointer`, the one stateful object of this package, and `load_checkpoint` for reading.

Owns the life of an epoch on one rank: the channel to the other ranks, the claim, the saver, the janitor.
Knows the order in which things happen; how each is done is below.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from types import TracebackType
from typing import Any

import msgspec
import torch.distributed as dist

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, agree, broadcast, connect, raise_first
from dcp_ckpt.errors import CheckpointError, CheckpointNotFound, ConfigError
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.names import EPOCHS, StepDir, lease_name
from dcp_ckpt.lifecycle.catalogue import CheckpointEntry, read_catalogue, step_directories
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.load.choose import Which, choose
from dcp_ckpt.load.loader import Loader
from dcp_ckpt.load.report import LoadReport
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.dcp_metadata import AUTO_MAX_CHUNKS, derive_metadata
from dcp_ckpt.save.handle import CheckpointInfo, SaveHandle
from dcp_ckpt.save.pilot import Flight, Pilot
from dcp_ckpt.save.saver import Saver, StepPolicy
from dcp_ckpt.save.staging import Stager
from dcp_ckpt.save.writer_link import WriterLink
from dcp_ckpt.state.component import Component
from dcp_ckpt.state.train_state import TrainState, components_of
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage

__all__ = ["Checkpointer", "load_checkpoint"]

log = logging.getLogger(__name__)

State = TrainState | dict[str, Any]


class Checkpointer:
    """Saves and loads the training state of one run. One per process; all ranks make it together.

    Making it starts this rank's writer process. The first `load` or `save` claims the run's next epoch:
    from then on an older training process of the same run cannot commit or delete any more.

    Args:
        path: the run's directory or URL; made if missing.
        config: equal on all ranks.
        process_group: the ranks that save and load together; None means all.

    Raises:
        ConfigError: WORLD_SIZE is above 1 but torch.distributed is not initialised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: CheckpointConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._url = os.fspath(path)
        self._config = config or CheckpointConfig()
        self._resources = ExitStack()
        self._storage = open_storage(path)
        self._resources.callback(self._storage.close)
        self._channel = connect(process_group, timeout_seconds=self._config.timeout_seconds)
        self._resources.callback(self._channel.close)
        self._global_ranks = _global_ranks(process_group, self._channel.world_size)
        self._link = WriterLink(rank=self._channel.rank)
        self._resources.callback(self._link.close, timeout_seconds=self._config.timeout_seconds)
        self._saver: Saver | None = None
        self._claim: EpochClaim | None = None
        self._janitor: Janitor | None = None
        self._steps: StepPolicy | None = None
        self._loads = 0
        self._questions = 0
        self._last_save_time = time.monotonic()
        self._closed = False

    def save(
        self,
        state: State,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
    ) -> SaveHandle:
        """Save the state as it is now. Called on all ranks, at an optimizer-step boundary.

        Returns as soon as this rank's bytes are copied and in its writer's hands; from then on the save
        survives the death of this process. It blocks for that copy, and for the bytes of the save before to
        be durable (`when_busy`).

        Args:
            state: a TrainState, or a nested dict of tensors, DTensors, Statefuls and values.
            step: the number of finished training steps; greater than that of every save before.
            metrics: numbers to find the best checkpoint by; rank 0's count.
            tags: free words kept with the checkpoint; rank 0's count.

        Returns:
            The handle; a failure of any rank shows in every rank's handle.

        Raises:
            StepAlreadySaved: the step is not after the last one.
            SaveFailed: an earlier save failed and `on_failure` is "raise".
            CoordinationError: rank 0 did not call `save` in time.
        """
        self._require_open()
        if type(step) is not int or step < 0:
            raise ConfigError(f"step must be a whole number of at least 0, not {step!r}")
        saver = self._started()
        handle = saver.save(components_of(state), step=step, metrics=metrics or {}, tags=tags)
        self._last_save_time = time.monotonic()
        return handle

    def load(self, state: State, which: Which = "latest") -> LoadReport | None:
        """Restore the state in place. Called on all ranks; blocks.

        Args:
            state: as for `save`; filled in place, values are put back through their objects.
            which: "latest", "best", a step, or the path of a checkpoint directory. Only "latest" falls back
                to an older checkpoint when one is damaged; the damaged one is marked and kept.

        Returns:
            What was done; None when nothing was ever committed in this run and `which` is "latest".

        Raises:
            CheckpointNotFound: there is no such checkpoint.
            StateMismatch: it does not fit the state; nothing was changed.
            CorruptCheckpoint: it is damaged, or all of them are.
        """
        self._require_open()
        self._started()
        components = components_of(state)
        self._loads += 1
        tag = f"load/{self._loads}"
        if isinstance(which, os.PathLike) or (isinstance(which, str) and which not in ("latest", "best")):
            return _load_path(which, components, self._channel, self._config, tag=tag)
        report = Loader(self._storage, self._url, self._channel, self._config, tag=tag).load(
            components, which
        )
        if report is not None and self._channel.rank == 0:
            self._resumed_from(report)
        return report

    def should_save(self, step: int) -> bool:
        """Whether `config.save_when` asks for a save after this step.

        Called on all ranks; the answer is the same on all of them.

        Raises:
            ConfigError: there is no `save_when`.
        """
        policy = self._config.save_when
        if policy is None:
            raise ConfigError("should_save needs CheckpointConfig(save_when=...), such as EverySteps(100)")
        # Only a rule that looks at the clock can differ between ranks, and only when the clock decides.
        always = policy.is_due(step=step, seconds_since_save=0.0)
        if always or not policy.is_due(step=step, seconds_since_save=math.inf):
            return always
        self._questions += 1
        if self._channel.rank == 0:
            # Long answered: no rank is a hundred steps behind another.
            self._channel.forget([f"due/{self._questions - 100}"])
        elapsed = time.monotonic() - self._last_save_time
        return broadcast(
            self._channel,
            f"due/{self._questions}",
            lambda: policy.is_due(step=step, seconds_since_save=elapsed),
            timeout_seconds=self._config.timeout_seconds,
        )

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the newest save has its outcome; failures stay in its handle.

        Raises:
            TimeoutError: it is still under way after `timeout` seconds.
        """
        if self._saver is not None:
            self._saver.wait(timeout)

    def checkpoints(self) -> list[CheckpointInfo]:
        """All committed checkpoints, oldest first. Local to the rank; reads the run."""
        return [self._info(entry) for entry in read_catalogue(self._storage).entries]

    def latest(self) -> CheckpointInfo | None:
        """The newest committed checkpoint that is not known to be damaged. Local to the rank."""
        entry = read_catalogue(self._storage).latest
        return None if entry is None else self._info(entry)

    def best(self) -> CheckpointInfo | None:
        """The best committed checkpoint by the BestN of `config.keep`; None when none has the metric.

        Local to the rank.
        """
        try:
            found = choose(read_catalogue(self._storage), "best", keep=self._config.keep, url=self._url)
        except CheckpointNotFound:
            return None
        return self._info(found.entries[0])

    def close(self) -> None:
        """Finish all saves, end the writer and leave. Called on all ranks; blocks. Idempotent.

        Raises:
            CheckpointError: the newest save failed and nobody was told.
        """
        if self._closed:
            return
        self._closed = True
        last = None
        try:
            if self._saver is not None:
                self._saver.close()
                last = self._saver.last
            if self._janitor is not None:
                self._janitor.close()
        finally:
            self._resources.close()
        if last is not None and last.error is not None and not last.failure_seen:
            last.mark_failure_seen()
            raise last.error

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as failure:
            # The error that ended the training is the one to show.
            log.error("while closing after %r: %s", error, failure)

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this Checkpointer is closed")

    def _started(self) -> Saver:
        """Claim the epoch on the first call; collective then."""
        if self._saver is None:
            self._claim = self._start()
            self._saver = self._make_saver(self._claim)
        return self._saver

    def _start(self) -> EpochClaim:
        def claim() -> dict[str, Any]:
            self._claim = claim_epoch(
                self._storage,
                run_id=ensure_run(self._storage).run_id,
                world_size=self._channel.world_size,
                purpose="train",
                hold=lambda key: self._link.hold_lease(self._url, key),
                wait_seconds=self._config.recover_wait_seconds,
            )
            _, report = recover_older_epochs(
                self._storage, epoch=self._claim.epoch, on_commit=self._derive_metadata
            )
            for directory in report.committed:
                log.warning("committed %s, which the start before had finished writing", directory)
            return asdict(self._claim)

        timeout = self._config.recover_wait_seconds + self._config.timeout_seconds
        fields = broadcast(self._channel, "start", claim, timeout_seconds=timeout)
        claimed = msgspec.convert(fields, type=EpochClaim)

        def join() -> None:
            if self._channel.rank != 0:
                self._link.hold_lease(self._url, f"{EPOCHS}/{lease_name(claimed.epoch)}")

        _, failures = agree(self._channel, "start/join", join, timeout_seconds=self._config.timeout_seconds)
        raise_first(failures)
        return claimed

    def _make_saver(self, claim: EpochClaim) -> Saver:
        rank, world_size = self._channel.rank, self._channel.world_size
        coordinator = None
        if rank == 0:
            taken = frozenset(step_directories(self._storage))
            self._steps = StepPolicy(epoch=claim.epoch, floor=-1, taken=taken)
            self._janitor = Janitor(
                self._storage,
                epoch=claim.epoch,
                keep=self._config.keep,
                grace_seconds=self._config.grace_seconds,
            )
        channel = self._channel.clone()
        if rank == 0:
            coordinator = Coordinator(self._storage, channel, epoch=claim.epoch)
        pilot = Pilot(
            channel,
            self._link,
            coordinator,
            self._after_commit,
            timeout_seconds=self._config.timeout_seconds,
        )
        return Saver(
            url=self._url,
            config=self._config,
            channel=self._channel,
            claim=claim,
            steps=self._steps,
            stager=Stager(rank=rank, world_size=world_size, global_ranks=self._global_ranks),
            link=self._link,
            pilot=pilot,
        )

    def _after_commit(self, flight: Flight) -> None:
        """On rank 0's background thread, after the verdict is out. What fails here fails no save."""
        assert self._steps is not None
        assert self._janitor is not None
        self._steps.floor = max(self._steps.floor, flight.step)
        try:
            self._derive_metadata(self._storage, flight.directory)
        except CheckpointError as error:
            log.warning("no .metadata for stock DCP readers in %s: %s", flight.directory, error)
        self._janitor.tidy()

    def _derive_metadata(self, storage: Storage, directory: StepDir) -> None:
        if self._config.dcp_metadata == "never":
            return
        limit = AUTO_MAX_CHUNKS if self._config.dcp_metadata == "auto" else None
        derive_metadata(storage, directory, max_chunks=limit)

    def _resumed_from(self, report: LoadReport) -> None:
        """Rank 0: steps go on after this one, and it is never removed while this epoch lives."""
        assert self._steps is not None
        assert self._janitor is not None
        directory = StepDir.parse(os.path.basename(report.path))
        assert directory is not None, "it came from the catalogue"
        self._steps.floor = report.step
        self._janitor.protect(directory, "resumed from")
        record_resumed(self._storage, self._steps.epoch, directory, report.epoch, report.step)

    def _info(self, entry: CheckpointEntry) -> CheckpointInfo:
        manifest = entry.manifest
        return CheckpointInfo(
            step=manifest.step,
            path=os.path.join(self._url, str(entry.directory)),
            bytes=manifest.total_bytes,
            stall_seconds=0.0,
            durable_seconds=0.0,
            metrics=dict(entry.metrics),
            tags=tuple(manifest.tags),
            world_size=manifest.world_size,
            created_at=manifest.created_at,
        )


def load_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    *,
    config: CheckpointConfig | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Load one checkpoint without owning its run: for evaluation, fine-tuning, or a look.

    Called on all ranks; blocks. Claims nothing and writes nothing, so it may read the run of a training that
    is going on.

    Args:
        path: a checkpoint directory or URL.
        state: filled in place, as by `Checkpointer.load`.
        config: `verify` and `timeout_seconds` count.
        process_group: the ranks that load together; None means all.

    Raises:
        CheckpointNotFound, StateMismatch, CorruptCheckpoint: as `Checkpointer.load`.
    """
    config = config or CheckpointConfig()
    with closing(connect(process_group, timeout_seconds=config.timeout_seconds)) as channel:
        return _load_path(path, components_of(state), channel, config, tag="load/1")


def _load_path(
    path: str | os.PathLike[str],
    components: Sequence[Component],
    channel: Channel,
    config: CheckpointConfig,
    *,
    tag: str,
) -> LoadReport:
    root, _, directory = os.fspath(path).rstrip("/").rpartition("/")
    with closing(open_storage(root or ".")) as storage:
        return Loader(storage, root or ".", channel, config, tag=tag).load_directory(components, directory)


def _global_ranks(process_group: dist.ProcessGroup | None, world_size: int) -> list[int]:
    """The group's ranks as device meshes number them."""
    if process_group is None or not dist.is_initialized():
        return list(range(world_size))
    return dist.get_process_group_ranks(process_group)
