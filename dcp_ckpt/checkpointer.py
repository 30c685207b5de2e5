"""The facade: `Checkpointer`, the one stateful object of this package.

Owns the life of an epoch on one rank: the channel to the other ranks, the claim, the saver, the janitor.
Knows the order in which things happen; how each is done is below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import connect, global_ranks, rank_in
from dcp_ckpt.errors import (
    CheckpointError,
    ConfigError,
    SaveFailed,
)
from dcp_ckpt.format.names import MAX_STEP
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.metrics import add_metrics
from dcp_ckpt.lifecycle.pins import pin, unpin
from dcp_ckpt.load.attempts import LoadAttempts
from dcp_ckpt.load.choose import Which, best_policy, path_of
from dcp_ckpt.load.report import LoadReport
from dcp_ckpt.load.selection import Selection
from dcp_ckpt.observe.events import EventSink
from dcp_ckpt.other_names import KnownByOtherNames
from dcp_ckpt.policies import SaveCosts
from dcp_ckpt.save.due import DueSaves
from dcp_ckpt.save.handle import CheckpointInfo, SaveHandle, info_of
from dcp_ckpt.save.hooks import SaveHooks
from dcp_ckpt.save.observer import SaveObserver
from dcp_ckpt.save.opening import open_together
from dcp_ckpt.save.orders import Orders
from dcp_ckpt.save.session import Session
from dcp_ckpt.save.writer_link import WriterLink
from dcp_ckpt.state.train_state import State, components_of, components_to_save
from dcp_ckpt.stopping.stopper import Stopper

__all__ = ["Checkpointer"]

log = logging.getLogger(__name__)


class Checkpointer(KnownByOtherNames):
    """Saves and loads the training state of one run. One per process; all ranks make it together.

    Making it starts this rank's writer process, which tries the storage out: a small object is written, read
    back and deleted, and seen from all ranks. The first `load` or `save` claims the run's next epoch: from
    then on an older training process of the same run cannot commit or delete any more.

    Args:
        path: the run's directory or URL; made if missing.
        config: equal on all ranks.
        process_group: the ranks that save and load together; None means all.
        sinks: what is told of events, on a thread of rank 0; closed with the Checkpointer.
        hooks: called before and after each save, on every rank.

    Raises:
        ConfigError: WORLD_SIZE is above 1 but torch.distributed is not initialised.
        StorageUnsuitable: ranks do not share the storage, or it loses bytes; on all ranks.
        CheckpointError: the storage or the writer of some rank does not work; on all ranks. Nothing is left
            behind then.
    """

    other_names = dict.fromkeys(("checkpoint_dir", "dirpath", "output_dir", "directory", "folder"), "path")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: CheckpointConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
        sinks: Sequence[EventSink] = (),
        hooks: Sequence[SaveHooks] = (),
    ) -> None:
        self._config = config or CheckpointConfig()
        self._session: Session | None = None
        self._starts = 0
        self._final_save: tuple[int, bool] | None = None
        self._due: DueSaves | None = None
        self._closed = False
        with ExitStack() as resources:
            # First, so that it starts while ranks meet; asked last.
            self._link = WriterLink(rank=rank_in(process_group), storage_url=os.fspath(path))
            resources.callback(self._link.close, timeout_seconds=self._config.timeout_seconds)
            self._channel = connect(process_group, timeout_seconds=self._config.timeout_seconds)
            resources.callback(self._channel.close)
            self._storage = open_together(
                path, self._channel, self._link, timeout_seconds=self._config.timeout_seconds
            )
            resources.callback(self._storage.close)
            self._observer = SaveObserver(
                self._channel.rank, self._channel.world_size, self._storage.url, sinks, hooks
            )
            resources.callback(self._observer.close)
            self._loads = LoadAttempts(self._storage, self._channel, self._config)
            self._orders = Orders(self._storage, self._channel, timeout_seconds=self._config.timeout_seconds)
            if self._config.save_when is not None:
                self._due = DueSaves(
                    self._channel,
                    self._config.save_when,
                    self._costs,
                    timeout_seconds=self._config.timeout_seconds,
                )
            self._stopper = Stopper(self._channel, self._config)
            resources.callback(self._stopper.close)
            self._global_ranks = global_ranks(process_group, self._channel.world_size)
            self._resources = resources.pop_all()

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
        be durable (`when_busy`). With `overlap="step"` parameters and moments are copied after it has
        returned: see `fence`, and `SaveHandle.wait_staged`.

        Args:
            state: a TrainState, or a nested dict of tensors, DTensors, Statefuls and values.
            step: the number of finished training steps; greater than that of every save before.
            metrics: numbers to find the best checkpoint by; rank 0's count.
            tags: free words kept with the checkpoint; rank 0's count.

        Returns:
            The handle; a failure of any rank shows in every rank's handle.

        Raises:
            StepAlreadySaved: the step is not after the last one.
            CheckpointError: that of an earlier save which failed, with `on_failure="raise"`; or that of a
                load after which the state may hold parts of several checkpoints.
            CoordinationError: rank 0 did not call `save` in time.
        """
        self._require_open()
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise ConfigError(f"step must be a whole number from 0 to {MAX_STEP}, not {step!r}")
        if self._loads.failure is not None:
            raise SaveFailed(
                "the last load failed halfway and the state may be a mixture; load before saving: "
                f"{self._loads.failure.message}",
                step=step,
            )
        saver = self._started().saver
        handle = saver.save(lambda: components_to_save(state), step=step, metrics=metrics or {}, tags=tags)
        if self._due is not None:
            self._due.saved()
        return handle

    def load(
        self,
        state: State,
        which: Which = "latest",
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        cast: Sequence[str] = (),
    ) -> LoadReport | None:
        """Restore the state in place, and make ready to save it. Called on all ranks; blocks.

        At its end, also when there was nothing to load, the memory that saves stage in is taken, and free
        space is looked at: what no save could do without fails here and not after hours of training. Whoever
        only reads uses `load_checkpoint`, which needs neither.

        Args:
            state: as for `save`; filled in place, values are put back through their objects.
            which: "latest", "best", a step, or the path of a checkpoint directory. Only "latest" falls back
                to an older checkpoint when one is damaged; the damaged one is marked and kept.
            include, exclude, rename, cast: what to restore, from which names and dtypes; see
                `load_checkpoint`. What is left out stays exactly as it is, random numbers included.

        Returns:
            What was done; None when nothing was ever committed in this run and `which` is "latest".

        Raises:
            CheckpointNotFound: there is no such checkpoint.
            StateMismatch, ConfigError: it, or an argument, does not fit the state; nothing was changed.
            CorruptCheckpoint: it is damaged, or all of them are, or what is older cannot be loaded. Where
                reading failed on a rank, in this way or another, what was to be filled there is NaN.
            StateError: all is loaded, but this state cannot be saved as it is; the message names the key.
            StorageFull: all is loaded, but there is no room on storage for a checkpoint, or no memory on some
                host to stage one; on all ranks, with what is needed and what there is.
            CheckpointError: any other failure, of any rank. After it, and after CorruptCheckpoint, `save` is
                refused until a load has succeeded.
        """
        self._require_open()
        session = self._started()
        self.fence()
        session.reuse_nothing()
        selection = Selection(include=include, exclude=exclude, rename=rename or {}, cast=cast)
        components = partial(components_of, state)
        report = self._loads.load(components, which, selection, session.catalogue, session.marks_changed)
        if report is not None:
            at, seconds, saved_by = report.path, self._loads.seconds, report.saved_world_size
            self._observer.loaded(report.step, at, seconds, saved_by, num_rejected=len(report.rejected))
        if report is not None and path_of(which) is None:
            resumed = os.path.basename(report.path), report.epoch, report.step
            self._orders.give("resumed", lambda: session.resumed_from(*resumed))
            session.reuse_from(resumed[0])
        session.prepare(components, tag=f"{self._loads.tag}/prepare")
        return report

    def should_save(self, step: int, *, finished_epoch: int | None = None, is_last: bool = False) -> bool:
        """Whether `config.save_when` asks for a save after this step, or the training stops and saves last.

        Called on all ranks; the answer is the same on all of them. When a stop was asked for (see
        `should_stop`), the answer is whether a final save fits in the time that is left; a save that is in
        flight is waited for first.

        Args:
            finished_epoch: the number of the pass over the data that ends with this step, for `EveryEpochs`;
                None where none ends.
            is_last: the training ends with this step, for `AtLastStep`.

        Raises:
            ConfigError: there is no `save_when`.
        """
        self._require_open()
        if self._due is None:
            raise ConfigError("should_save needs CheckpointConfig(save_when=...), such as EverySteps(100)")
        self._look_for_owner()
        stop = self._stopper.before_save()
        if stop is not None and self._final_save is None:
            why, until = f"{stop.reason}, rank {stop.rank}", stop.deadline
            due = self._orders.final_save(self._started(), step, deadline=until, why=why)
            self._final_save = step, due
        at, due = self._final_save or (None, False)
        if at == step:
            return due
        return self._due.is_due(step, finished_epoch=finished_epoch, is_last=is_last)

    def should_stop(self) -> bool:
        """Whether the training is to end now: a signal, the time limit, or a newer start of the run.

        Called on all ranks equally often, on the main thread, once a step and wherever time passes, such as
        in an evaluation; the answer is the same on all of them and stays. It costs nothing until somebody
        asks. Right after `should_save` it gives the answer of that call, so that the final save comes first:

            if checkpointer.should_save(step):
                checkpointer.save(state, step=step)
            if checkpointer.should_stop():
                break

        From its first call to `close`, the signals of `config.stop_signals` are noted instead of ending the
        process; a second one, a second later or more, ends it at once. Data-loading processes need
        `dcp_ckpt.ignore_stop_signals` as their `worker_init_fn`.

        Raises:
            CoordinationError: rank 0 is gone.
        """
        self._require_open()
        self._look_for_owner()
        return self._stopper.should_stop()

    @property
    def stop_reason(self) -> str | None:
        """Why `should_stop` said yes: the name of a signal, "time limit" or "taken over"."""
        return None if self._stopper.agreed is None else self._stopper.agreed.reason

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the sinks numbers of the training, by names such as "train/loss". On rank 0; never blocks."""
        self._observer.scalars(step, values)

    def fence(self) -> None:
        """Wait until the newest save has copied everything, so that all of its state may be written.

        Called on any rank by itself, from the thread that trains; blocks for what is left of the copy. The
        `step()` of the torch.optim optimizers in the saved TrainState does this by itself, and so does
        `load`. Only needed with `overlap="step"`, before other code writes parameters or moments:
        `load_checkpoint`, `load_state_dict`, weights that are clipped, swapped or averaged, a CUDA graph that
        holds the step. Without it the save fails and names what was changed. A write that PyTorch does not
        count (through `.data`, numpy, `torch._foreach_*` on DTensors, fused kernels, graph replays) cannot be
        seen: it may end up in the checkpoint, unless this is called first.

        Raises nothing: a copy that fails or hangs fails its save, never the training.
        """
        if self._session is not None:
            self._session.saver.fence()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the newest save has its outcome; failures stay in its handle.

        Raises:
            TimeoutError: it is still under way after `timeout` seconds.
        """
        if self._session is not None:
            self._session.saver.wait(timeout)

    def checkpoints(self) -> list[CheckpointInfo]:
        """All committed checkpoints, oldest first. Local to the rank; reads the run."""
        return [info_of(entry, self._storage.url) for entry in read_catalogue(self._storage).entries]

    def latest(self) -> CheckpointInfo | None:
        """The newest committed checkpoint that is not known to be damaged. Local to the rank."""
        entry = read_catalogue(self._storage).latest
        return None if entry is None else info_of(entry, self._storage.url)

    def best(self) -> CheckpointInfo | None:
        """The best committed checkpoint by the BestN of `config.keep`; None when none has the metric.

        Local to the rank.
        """
        ranking = best_policy(self._config.keep)
        entry = read_catalogue(self._storage).best(ranking.metric, ranking.mode)
        return None if entry is None else info_of(entry, self._storage.url)

    def report_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the checkpoint of a step, such as those of an evaluation that ends after its save.

        Called on all ranks; blocks, also for a save of that step that is under way. They count like those
        given to `save` from then on: in `best`, in retention, which looks after the next save, and for
        `suspect_when`. A checkpoint that waits for its metrics is not protected: let `keep` hold it so long.

        Args:
            metrics: rank 0's count; a value of a name that is there replaces it.

        Raises:
            CheckpointNotFound: there is no such checkpoint (any more); on all ranks.
            StateError, StorageError: they could not be written; on all ranks.
        """

        self._require_open()
        self._orders.mark(
            "metrics",
            step,
            lambda entry, catalogue: add_metrics(
                self._storage, entry, metrics, catalogue, self._config.suspect_when
            ),
            self._session,
            after_its_save=True,
        )

    def pin(self, step: int, *, reason: str | None = None) -> None:
        """Keep the checkpoint of a step until it is unpinned. Called on all ranks; blocks. Idempotent.

        `reason` is kept for those who come later.

        Raises:
            CheckpointNotFound: there is none, or retention has just removed it; on all ranks.
            StorageError: the pin could not be written; on all ranks.
        """
        self._require_open()
        self._orders.mark(
            "pin", step, lambda entry, _: pin(self._storage, entry, reason=reason), self._session
        )

    def unpin(self, step: int) -> None:
        """Take back every pin of the checkpoint of a step. As `pin`, also in what it raises."""
        self._require_open()
        self._orders.mark("unpin", step, lambda entry, _: unpin(self._storage, entry), self._session)

    def prune(self) -> list[str]:
        """Apply `config.keep` now instead of after the next save. Called on all ranks; blocks.

        Returns:
            The paths of what was taken back, oldest first; its files stay for `grace_seconds`.

        Raises:
            CheckpointError: the run could not be read or changed, or is a newer start's; on all ranks.
        """
        self._require_open()
        names = self._orders.give("prune", self._started().prune)
        return [os.path.join(self._storage.url, name) for name in names]

    def close(self) -> None:
        """Finish all saves, end the writer and leave. Called on all ranks; blocks. Idempotent.

        Raises:
            CheckpointError: the newest save failed, or any with `on_failure="raise"`, and nobody was told.
        """
        if self._closed:
            return
        self._closed = True
        untold = None
        stop = self._stopper.agreed
        try:
            if self._session is not None:
                self._session.close(waits=stop is None)
                untold = self._session.saver.untold
            if stop is not None:
                self._stopper.end_together()
        finally:
            self._resources.close()
        if untold is not None and untold.error is not None:
            untold.mark_failure_seen()
            raise untold.error

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

    def _started(self) -> Session:
        """Claim the epoch on the first call; collective then."""
        if self._session is None:
            self._starts += 1
            self._session = Session(
                self._storage,
                self._channel,
                self._link,
                self._config,
                global_ranks=self._global_ranks,
                observer=self._observer,
                tag=f"start/{self._starts}",
            )
        return self._session

    def _look_for_owner(self) -> None:
        if self._session is not None and self._session.saver.is_fenced:
            self._stopper.taken_over()

    def _costs(self) -> SaveCosts | None:
        """What saves and the load took on this rank; None until a save was committed."""
        costs = None if self._session is None else self._session.saver.costs
        return None if costs is None else replace(costs, load_seconds=self._loads.seconds)
