"""Saves with overlap="step" in one process: what is copied when, what fails them, and what never does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dcp_ckpt import (
    CheckpointConfig,
    Checkpointer,
    TrainState,
    load_checkpoint,
    open_checkpoint,
    verify,
)
from dcp_ckpt.errors import CheckpointError, SaveFailed
from dcp_ckpt.save.handle import SaveHandle
from tests.save.slow_tensors import Gate, slow_parameter

WAIT = 30.0
A_WHILE = 0.2


def settings(**changes: Any) -> CheckpointConfig:
    defaults: dict[str, Any] = {
        "keep": None,
        "grace_seconds": 0.0,
        "timeout_seconds": WAIT,
        "overlap": "step",
        "dcp_metadata": "never",
    }
    return CheckpointConfig(**defaults | changes)


class Net(nn.Module):
    """A slow parameter, a plain one, one that no optimizer has, and a buffer."""

    mean: torch.Tensor

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.slow = slow_parameter(torch.arange(6.0), gate)
        self.quick = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self) -> torch.Tensor:
        return (self.slow * 2).sum() + (self.quick * 3).sum()


class Training:
    """One model with an optimizer that has taken a step."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.net = Net(self.gate)
        self.optimizer = torch.optim.AdamW([self.net.slow, self.net.quick], lr=0.1)
        self.extra = {"ema": torch.zeros(3)}
        self.step()

    @property
    def state(self) -> TrainState:
        return TrainState(model=self.net, optimizer=self.optimizer, extra=self.extra, rng=False)

    def backward(self) -> None:
        self.net().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of everything, by stored name."""
        found = {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for name in ("slow", "quick"):
            for key, tensor in self.optimizer.state[getattr(self.net, name)].items():
                found[f"optimizer.state.{name}.{key}"] = tensor
        found["extra.ema"] = self.extra["ema"]
        return {name: t.detach().as_subclass(torch.Tensor).clone() for name, t in found.items()}


@pytest.fixture
def training() -> Iterator[Training]:
    made = Training()
    yield made
    made.gate.open()


def stored(path: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, read into a training of its own."""
    into = Training()
    into.gate.open()
    load_checkpoint(path, into.state)
    return into.tensors()


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name]))


def in_thread(act: Callable[[], object]) -> threading.Event:
    done = threading.Event()

    def run() -> None:
        act()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def num_hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks)


# The normal way


def test_what_is_saved_is_the_state_at_the_call(tmp_path, training):
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        expected = training.tensors()
        handle = checkpointer.save(training.state, step=1)
        assert training.gate.reached.wait(WAIT)
        assert not handle.wait_staged(0.0)
        # Everything that steps do not write is copied by now.
        with torch.no_grad():
            training.net.frozen.fill_(9.0)
            training.net.mean.fill_(9.0)
            training.extra["ema"].fill_(9.0)
        training.backward()
        # Before all other hooks, so that the copy goes on while the step waits for it, not earlier.
        opening = register_optimizer_step_pre_hook(training.gate.open)
        training.optimizer.step()
        opening.remove()
        assert "model.slow" in differing(training.tensors(), expected)
        assert handle.wait_staged(WAIT)
        info = handle.result(WAIT)
        assert differing(stored(info.path), expected) == []


def test_the_wait_at_the_fence_is_part_of_the_stall(tmp_path, training):
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        training.gate.open()
        checkpointer.save(training.state, step=1).result(WAIT)
        training.gate.shut()
        started = time.monotonic()
        handle = checkpointer.save(training.state, step=2)
        save_seconds = time.monotonic() - started
        done = in_thread(training.step)
        assert not done.wait(A_WHILE)
        training.gate.open()
        assert done.wait(WAIT)
        info = handle.result(WAIT)
    assert save_seconds < info.stall_seconds < info.durable_seconds


@pytest.mark.parametrize("what", ["fence", "load", "save", "close"])
def test_whoever_writes_or_reuses_memory_waits_for_the_copy(tmp_path, training, what):
    checkpointer = Checkpointer(tmp_path, config=settings())
    expected = training.tensors()
    training.gate.open()
    checkpointer.save(training.state, step=1).result(WAIT)
    training.gate.shut()
    handle = checkpointer.save(training.state, step=2)
    acts: dict[str, Callable[[], object]] = {
        "fence": checkpointer.fence,
        "load": lambda: checkpointer.load(training.state, 1),
        "save": lambda: checkpointer.save(training.state, step=3),
        "close": checkpointer.close,
    }
    done = in_thread(acts[what])
    assert training.gate.reached.wait(WAIT)
    assert not done.wait(A_WHILE)
    training.gate.open()
    assert done.wait(WAIT)
    with torch.no_grad():
        checkpointer.fence()
        training.net.slow.add_(1.0)
    assert differing(stored(handle.result(WAIT).path), expected) == []
    checkpointer.close()


def test_nothing_waits_where_nothing_is_late(tmp_path, training):
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.fence()
        # The objects of a plain dictionary may be written by anybody.
        plain = {"net": training.net, "optimizer": training.optimizer}
        expected = training.tensors()
        handle = checkpointer.save(plain, step=1)
        assert handle.wait_staged(0.0)
        assert num_hooks(training.optimizer) == 0
        training.step()
        info = handle.result(WAIT)
        read = Training()
        load_checkpoint(info.path, {"net": read.net, "optimizer": read.optimizer})
        assert differing(read.tensors(), expected | {"extra.ema": read.extra["ema"]}) == []


@pytest.mark.parametrize("how", ["autocast", "checkpointed", "compiled"])
def test_forward_and_backward_in_all_ways_change_nothing(tmp_path, training, how):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    forward: Callable[[torch.Tensor], torch.Tensor] = block
    if how == "compiled":
        forward = torch.compile(block, backend="aot_eager")
    elif how == "checkpointed":
        forward = partial(torch.utils.checkpoint.checkpoint, block, use_reentrant=False)
    optimizer = torch.optim.AdamW(block.parameters())
    state = TrainState(
        model={"net": training.net, "block": block},
        optimizer={"net": training.optimizer, "block": optimizer},
        rng=False,
    )
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        for step in (1, 2):
            training.gate.shut()
            expected = [parameter.detach().clone() for parameter in block.parameters()]
            handle = checkpointer.save(state, step=step)
            assert training.gate.reached.wait(WAIT)
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                loss = forward(torch.ones(2, 4)).sum()
            loss.backward()
            training.gate.open()
            optimizer.step()
            read = open_checkpoint(handle.result(WAIT).path)
            for name, parameter in zip(dict(block.named_parameters()), expected, strict=True):
                assert torch.equal(read.read_tensor(f"model.block.{name}"), parameter)


class Wrapper(torch.optim.Optimizer):
    """Hands everything on to another optimizer and has no hooks of its own, as some libraries do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # as they do
        self.inner.step()


def test_an_optimizer_without_hooks_has_its_tensors_copied_at_once(tmp_path, training):
    expected = training.tensors()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        state = TrainState(
            model=training.net, optimizer=Wrapper(training.optimizer), extra=training.extra, rng=False
        )
        handle = checkpointer.save(state, step=1)
        assert handle.wait_staged(0.0)
        training.step()
        assert differing(stored(handle.result(WAIT).path), expected) == []


def test_an_optimizer_that_was_replaced_is_let_go(tmp_path, training):
    training.gate.open()
    old = training.optimizer
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.save(training.state, step=1).result(WAIT)
        training.optimizer = torch.optim.AdamW([training.net.slow, training.net.quick], lr=0.2)
        training.step()
        handle = checkpointer.save(training.state, step=2)
        assert (num_hooks(old), num_hooks(training.optimizer)) == (0, 1)
        training.step()
        handle.result(WAIT)
    assert num_hooks(training.optimizer) == 0


# Failures


MOMENT = "optimizer.state.slow.exp_avg"
CHANGES: dict[str, tuple[str, Callable[[Training], object]]] = {
    "parameter": ("model.slow", lambda t: t.net.slow.add_(1.0)),
    "other parameter": ("model.quick", lambda t: t.net.quick.mul_(2.0)),
    "moment": (MOMENT, lambda t: t.optimizer.state[t.net.slow]["exp_avg"].zero_()),
    "replaced data": ("model.quick", lambda t: setattr(t.net.quick, "data", torch.zeros(5))),
    "set_": ("model.quick", lambda t: t.net.quick.set_(torch.zeros(5).untyped_storage(), 0, (5,), (1,))),
    "resized": ("model.quick", lambda t: t.net.quick.untyped_storage().resize_(1 << 16)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_during_the_copy_fails_the_save_by_name(tmp_path, training, name, change):
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        handle = checkpointer.save(training.state, step=1)
        assert training.gate.reached.wait(WAIT)
        with torch.no_grad():
            change(training)
        training.gate.open()
        checkpointer.fence()
        with pytest.raises(SaveFailed, match=rf"copy: {name};") as caught:
            handle.result(WAIT)
        assert (caught.value.rank, caught.value.step, caught.value.phase) == (0, 1, "stage")
        assert not handle.wait_staged(0.0)
        expected = training.tensors()
        training.gate.shut()
        handle = checkpointer.save(training.state, step=2)
        training.gate.open()
        assert differing(stored(handle.result(WAIT).path), expected) == []
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [2]


def test_a_copy_that_hangs_fails_the_save_and_not_the_step(tmp_path, training):
    with Checkpointer(tmp_path, config=settings(timeout_seconds=2.0)) as checkpointer:
        handle = checkpointer.save(training.state, step=1)
        before = training.tensors()
        training.step()
        assert "model.slow" in differing(training.tensors(), before)
        with pytest.raises(SaveFailed, match="not copied in time"):
            handle.result(WAIT)
        # The thread may still read: the next save must not reuse its memory.
        with pytest.raises(SaveFailed, match="still being copied"):
            checkpointer.save(training.state, step=2).result(WAIT)
        training.gate.open()
        checkpointer.save(training.state, step=3).result(WAIT)
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [3]


class Interrupting:
    """Somebody presses Ctrl-C while its state is asked for."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def test_an_interrupt_leaves_no_hooks(tmp_path, training):
    training.gate.open()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.save(training.state, step=1).result(WAIT)
        training.extra["interrupting"] = Interrupting()
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(training.state, step=2)
        assert num_hooks(training.optimizer) == 0
        del training.extra["interrupting"]
        checkpointer.save(training.state, step=3).result(WAIT)
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [1, 3]


def test_a_save_that_fails_early_does_not_open_the_fence_of_the_one_before(tmp_path, training):
    with Checkpointer(tmp_path, config=settings(timeout_seconds=1.0)) as checkpointer:
        first = checkpointer.save(training.state, step=1)
        # Nothing can be copied until the gate opens, so this one gives up waiting for the first.
        second = checkpointer.save(training.state, step=2)
        assert num_hooks(training.optimizer) == 1
        training.gate.open()
        for handle in (first, second):
            handle.wait_done(WAIT)
            handle.mark_failure_seen()
        assert second.outcome == "failed"


KILLED = """
import os, signal, sys
from dcp_ckpt import Checkpointer
from tests.save.test_overlap import WAIT, Training, settings
training = Training()
checkpointer = Checkpointer(sys.argv[1], config=settings())
training.gate.open()
checkpointer.save(training.state, step=1).result(WAIT)
training.gate.shut()
checkpointer.save(training.state, step=2)
assert training.gate.reached.wait(WAIT)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_save_that_was_killed_before_its_copy_was_done_leaves_nothing(tmp_path, training):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    training.gate.open()
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        report = checkpointer.load(training.state)
        assert report is not None
        assert report.step == 1
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001"]


# The storm


class Storm:
    """In-place changes of everything, as they come; `changed` names what was touched since it was cleared."""

    def __init__(self, training: Training, seed: int) -> None:
        self._training = training
        self._random = random.Random(seed)
        self.changed: set[str] = set()

    def rage(self, *, uncounted: bool) -> None:
        """A few changes; `uncounted` are those that PyTorch does not count, so that nobody can see them."""
        for _ in range(self._random.randrange(4)):
            name, tensor = self._random.choice(list(self._live().items()))
            kinds: list[Callable[[torch.Tensor], object]] = [
                lambda t: t.add_(1.0),
                lambda t: t.copy_(torch.full_like(t, 7.0)),
                lambda t: t.set_((t.detach() * 2).untyped_storage(), 0, t.shape, t.stride()),
                lambda t: setattr(t, "data", t.detach() * 3),
            ]
            if uncounted or name in ("model.mean", "extra.ema"):
                kinds += [lambda t: t.data.add_(1.0), lambda t: t.detach().numpy().fill(2.0)]
            with torch.no_grad():
                self._random.choice(kinds)(tensor)
            self.changed.add(name)

    def _live(self) -> dict[str, torch.Tensor]:
        training = self._training
        moments = {
            f"optimizer.state.quick.{key}": tensor
            for key, tensor in training.optimizer.state[training.net.quick].items()
            if key != "step"
        }
        net = training.net
        return {
            "model.quick": net.quick,
            "model.mean": net.mean,
            "extra.ema": training.extra["ema"],
            **moments,
        }


@pytest.mark.parametrize("overlap", ["off", "step"])
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_changes_never_reaches_a_checkpoint(tmp_path, training, overlap, seed):
    storm = Storm(training, seed)
    num_failed = 0
    with Checkpointer(tmp_path, config=settings(overlap=overlap)) as checkpointer:
        for step in range(1, 16):
            expected = training.tensors()
            training.gate.shut()
            if random.Random(step).random() < 0.5:
                training.gate.open()
            storm.changed.clear()
            handle = checkpointer.save(training.state, step=step)
            storm.rage(uncounted=overlap == "off")
            training.gate.open()
            num_failed += not holds(handle, expected, storm.changed, may_fail=overlap == "step")
            training.step()
    assert num_failed < 15
    assert (num_failed > 0) == (overlap == "step")


def holds(
    handle: SaveHandle, expected: dict[str, torch.Tensor], changed: set[str], *, may_fail: bool
) -> bool:
    """Whether the save is a checkpoint; it then holds what is expected, else its error names a change."""
    try:
        info = handle.result(WAIT)
    except CheckpointError as error:
        assert may_fail
        named = error.message.partition(": ")[2].partition(";")[0].split(", ")
        assert set(named) <= changed - {"model.mean", "extra.ema"}
        return False
    assert differing(stored(info.path), expected) == []
    return True


def test_only_committed_files_are_left(tmp_path: Path, training: Training) -> None:
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        failing = checkpointer.save(training.state, step=1)
        with torch.no_grad():
            assert training.gate.reached.wait(WAIT)
            training.net.slow.zero_()
        training.gate.open()
        failing.wait_done(WAIT)
        checkpointer.save(training.state, step=2).result(WAIT)
    assert failing.outcome == "failed"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002"]
