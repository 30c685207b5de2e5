"""Events: told in order, kept across crashes, and never at the cost of a save."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import (
    CheckpointConfig,
    Checkpointer,
    EventSink,
    JsonLinesSink,
    LatestN,
    SaveHandle,
    SaveHooks,
    read_events,
)
from dcp_ckpt.errors import ConfigError, SaveFailed, StateError
from dcp_ckpt.integrations.tensorboard import TensorBoardSink
from dcp_ckpt.observe.events import Event, SaveBegun, Scalars
from dcp_ckpt.observe.stream import EventStream


def config(**changes: Any) -> CheckpointConfig:
    defaults: dict[str, Any] = {"grace_seconds": 0.0, "dcp_metadata": "never"}
    return CheckpointConfig(**defaults | changes)


def state() -> dict[str, Any]:
    return {"tensor": torch.arange(1000)}


class Broken:
    def handle(self, event: Event) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise RuntimeError("nor this")


class Remembering:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def handle(self, event: Event) -> None:
        self.kinds.append(event.kind)

    def close(self) -> None:
        self.kinds.append("closed")


class Hanging:
    def __init__(self) -> None:
        self.go_on = threading.Event()

    def handle(self, event: Event) -> None:
        self.go_on.wait(60)

    def close(self) -> None:
        pass


def test_a_run_tells_its_story_in_a_file_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    log = run / "events.jsonl"
    remembering = Remembering()
    sinks: list[EventSink] = [Broken(), JsonLinesSink(log), remembering]
    with Checkpointer(run, config=config(keep=LatestN(1)), sinks=sinks) as checkpointer:
        for step in (1, 2):
            handle = checkpointer.save(
                state(), step=step, metrics={"loss": float("nan") if step == 2 else 1.0}
            )
            assert handle.result(30).step == step
        checkpointer.log_scalars(2, {"loss": 1.0})
        with pytest.raises(StateError):
            checkpointer.save({"tensor": object()}, step=3).result(30)
    with Checkpointer(run, config=config(), sinks=[JsonLinesSink(log)]) as checkpointer:
        checkpointer.load(state())
    told = [(event["event"], event["step"]) for event in read_events(log)]
    saved = ["save begun", "save staged", "save durable"]
    # Retention runs beside the next save.
    told_in_order = [item for item in told if item[0] != "removed"]
    assert told_in_order == [
        *((kind, 1) for kind in saved),
        *((kind, 2) for kind in saved),
        ("save begun", 3),
        ("save failed", 3),
        ("load", 2),
    ]
    durable = [event for event in read_events(log) if event["event"] == "save durable"]
    assert durable[1]["metrics"] == {"loss": {"$float": "nan"}}
    assert durable[0]["bytes"] > 8000
    assert durable[0]["stall_seconds"] <= durable[0]["durable_seconds"]
    assert remembering.kinds[-1] == "closed"
    assert "scalars" in remembering.kinds
    assert sum("Broken failed" in record.message for record in caplog.records) == 1, "said once"


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    sink = JsonLinesSink(log)
    sink.handle(SaveBegun(step=1))
    sink.close()
    log.write_bytes(log.read_bytes() + b'{"event": "save dur')
    sink = JsonLinesSink(log)
    sink.handle(Scalars(step=2, values={"loss": 1.0}))
    sink.handle(SaveBegun(step=3))
    sink.close()
    assert [event["step"] for event in read_events(log)] == [1, 3]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()[::2]] == [1, 3]
    with pytest.raises(ConfigError, match="s3://bucket"):
        JsonLinesSink("s3://bucket/events.jsonl")


def test_a_sink_that_hangs_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dcp_ckpt.observe.stream._END_SECONDS", 0.1)
    hanging = Hanging()
    stream = EventStream([hanging])
    started = time.monotonic()
    for step in range(10_100):
        stream.emit(SaveBegun(step=step))
    stream.close()
    assert time.monotonic() - started < 10
    messages = "\n".join(record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert "hangs" in messages
    assert "events were lost" in messages
    hanging.go_on.set()


class Ema(SaveHooks):
    """Swaps something in before a save, and remembers outcomes."""

    def __init__(self, live: dict[str, Any]) -> None:
        self.live = live
        self.outcomes: list[str] = []

    def before_save(self, step: int) -> None:
        if step == 3:
            raise ValueError("no average yet")
        self.live["tensor"].fill_(step)

    def after_save(self, handle: SaveHandle) -> None:
        self.outcomes.append(handle.outcome)
        raise RuntimeError("harmless")


def test_hooks(tmp_path: Path) -> None:
    live = state()
    hook = Ema(live)
    with Checkpointer(tmp_path, config=config(), hooks=[hook]) as checkpointer:
        for step in (1, 2):
            checkpointer.save(live, step=step).result(30)
        failed = checkpointer.save(live, step=3)
        with pytest.raises(SaveFailed, match="no average yet"):
            failed.result(30)
        target = state()
        report = checkpointer.load(target)
        assert report is not None
        assert report.step == 2
    assert torch.equal(target["tensor"], torch.full((1000,), 2))
    assert hook.outcomes == ["committed", "committed", "failed"]


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_tensorboard_shows_one_line_across_resumes(tmp_path: Path) -> None:
    """The first start trains to step 6 and has saved step 4; the second goes on from there."""
    run, board = tmp_path / "run", tmp_path / "board"
    with Checkpointer(run, config=config(), sinks=[TensorBoardSink(board)]) as checkpointer:
        for step in range(1, 7):
            checkpointer.log_scalars(step, {"train/loss": 10.0 - step})
            if step == 4:
                checkpointer.save(state(), step=step).result(30)
    with Checkpointer(run, config=config(), sinks=[TensorBoardSink(board)]) as checkpointer:
        assert checkpointer.load(state()) is not None
        for step in (5, 6, 7):
            checkpointer.log_scalars(step, {"train/loss": 20.0 - step})
    expected = [(step, 10.0 - step) for step in range(1, 5)] + [(step, 20.0 - step) for step in (5, 6, 7)]
    assert scalars(board, "train/loss") == expected
    assert [step for step, _ in scalars(board, "checkpoint/durable_seconds")] == [4]
    assert scalars(board, "checkpoint/failures") == [(4, 0.0)]
    assert [step for step, _ in scalars(board, "checkpoint/load_seconds")] == [4]
