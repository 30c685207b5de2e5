"""What the driver tells: lines for people on stdout, JSON lines for programs; both from rank 0 only.

Called by `train.py` with what has happened; decides nothing and never waits for a save.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dcp_ckpt import LoadReport, RunParent, SaveHandle, errors, summarize_runs
from launch.data import Batch
from launch.settings import SettingChange

__all__ = ["Reporter", "exit_code", "print_runs", "ranks", "samples_digest", "stop_code"]

_PRINT_EVERY_STEPS = 10

_EXIT_CODES: tuple[tuple[type[errors.CheckpointError], int], ...] = (
    (errors.ConfigError, 2),
    (errors.CheckpointNotFound, 3),
    (errors.CorruptCheckpoint, 4),
    (errors.StateMismatch, 5),
)


def exit_code(error: errors.CheckpointError) -> int:
    """The driver's exit code for `error`: that of the command line for the same error."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)


def stop_code(reason: str | None) -> int:
    """The driver's exit code when training stopped for `reason`; None: it came to its end."""
    if reason is None or reason == "time limit":
        return 0
    return 128 + signal.Signals[reason] if reason in signal.Signals.__members__ else 1


def samples_digest(sample_ids: Sequence[int]) -> str:
    """16 hex digits that stand for the ids and order of one global batch."""
    return hashlib.blake2b(array("q", sample_ids).tobytes(), digest_size=8).hexdigest()


def ranks(count: int) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} rank{'' if count == 1 else 's'}"


class Reporter:
    """Prints progress and appends to the JSON log, on rank 0; on other ranks every method does nothing.

    Args:
        rank: of this process.
        log_json: file to append JSON lines to, or None. Floats are written so that they read back exactly.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, *, rank: int, log_json: Path | None) -> None:
        self._speaks = rank == 0
        self._log: TextIO | None = None
        if log_json is not None and self._speaks:
            self._log = _opened(log_json)
        self._saves: list[tuple[int, SaveHandle]] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def say(self, line: str) -> None:
        """Print one line."""
        if self._speaks:
            print(line, flush=True)

    def changed(self, changes: Sequence[SettingChange]) -> None:
        """These settings are not those that the run was started with; prints a table of them."""
        if not changes:
            return
        self.say("settings that differ from those of the run:")
        for change in changes:
            self.say(f"  {change!s:<32}  {change.verdict:<9}  {change.reason}")

    def loaded(self, loaded: LoadReport | None, parent: RunParent | None, *, world_size: int) -> None:
        """A checkpoint was loaded on `world_size` ranks: one of this run, or else the one it begins from."""
        if loaded is not None:
            saved_by = loaded.saved_world_size
            self._write(event="resume", step=loaded.step, from_world=saved_by, to_world=world_size)
            self.say(f"resumed at step {loaded.step}, saved by {ranks(saved_by)}, now {world_size}")
            for line in loaded.deviations:
                self.say(f"  {line}")
        elif parent is not None:
            self.say(f"fine-tuning step {parent.step} of {parent.run}")

    def stepped(self, *, step: int, last_step: int, loss: float, lr: float, batch: Batch) -> None:
        """One optimizer step was done on `batch` with learning rate `lr`; prints every tenth."""
        if not self._speaks:
            return
        self._write(event="step", step=step, loss=loss, lr=lr, samples=samples_digest(batch.sample_ids))
        self._tokens += batch.num_tokens
        if step % _PRINT_EVERY_STEPS == 0 or step == last_step:
            now = time.perf_counter()
            rate = self._tokens / (now - self._since)
            self.say(f"step {step}/{last_step}  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tok/s")
            self._tokens, self._since = 0, now

    def validated(self, *, step: int, loss: float) -> None:
        """The validation loss was measured."""
        self.say(f"step {step}  val_loss {loss:.4f}")

    def saving(self, *, step: int, handle: SaveHandle) -> None:
        """A save was accepted; its outcome is told by a later `poll`."""
        if self._speaks:
            self._saves.append((step, handle))

    def poll(self) -> None:
        """Tell the outcome of the saves that have one by now; does not block."""
        waiting = []
        for step, handle in self._saves:
            if handle.outcome == "pending":
                waiting.append((step, handle))
            else:
                self._finished(step, handle)
        self._saves = waiting

    def close(self) -> None:
        """Tell what is left to tell and close the log; may be called again."""
        self.poll()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _finished(self, step: int, handle: SaveHandle) -> None:
        if handle.outcome == "skipped":
            self.say(f"save of step {step} skipped: the one before was not done")
            return
        if handle.error is not None:
            # Only looked at: leaving the Checkpointer still raises it when no later save has succeeded.
            self.say(f"save of step {step} {handle.outcome}: {handle.error}")
            return
        info = handle.result()
        stall, durable = info.stall_seconds, info.durable_seconds
        self._write(event="save", step=step, stall_seconds=stall, durable_seconds=durable, bytes=info.bytes)
        written = (info.bytes - info.shared_bytes) / 1e6
        shared = f" and {info.shared_bytes / 1e6:.1f} MB unchanged" if info.shared_bytes else ""
        rate = written / durable if durable else 0.0
        self.say(
            f"saved step {step}: {written:.1f} MB{shared}, stalled {stall * 1e3:.0f} ms, "
            f"durable after {durable * 1e3:.0f} ms ({rate:.0f} MB/s)"
        )

    def _write(self, **event: Any) -> None:
        if self._log is not None:
            self._log.write(json.dumps(event) + "\n")


def _opened(log_json: Path) -> TextIO:
    try:
        log_json.parent.mkdir(parents=True, exist_ok=True)
        # Line buffered: whoever follows the file, or reads it after a kill, sees every event.
        return log_json.open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        message = f"--log-json: cannot write there: {error.strerror}"
        raise errors.ConfigError(message, path=str(log_json), errno=error.errno) from error


def print_runs(run_dir: str) -> None:
    """Print one line for each run below `run_dir`."""
    summaries = summarize_runs(run_dir)
    if not summaries:
        print(f"no runs under {run_dir}")
        return
    line = "{:>5}  {:<20}  {:<27}  {:>11}  {:>6}  {:<26}  {}"
    print(line.format("run", "name", "created", "checkpoints", "latest", "best", "path"))
    for summary in summaries:
        run, best = summary.run, summary.best
        shown = f"{best.metric} {best.value:.4f} at {best.step}" if best else ""
        latest = "" if summary.latest_step is None else summary.latest_step
        created = run.document.created_at
        print(
            line.format(run.number, run.name or "", created, summary.num_checkpoints, latest, shown, run.path)
        )
