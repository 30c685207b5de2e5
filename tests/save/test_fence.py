"""The fence: steps wait for copies, for no longer than they may, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.save.fence import Fence
from dcp_ckpt.save.handover import Handover

WAIT = 30.0
A_WHILE = 0.2


def handover(*, deadline_seconds: float = WAIT, patience_seconds: float = WAIT) -> Handover:
    return Handover(
        rank=3, step=7, deadline=time.monotonic() + deadline_seconds, patience_seconds=patience_seconds
    )


def sgd() -> torch.optim.SGD:
    """An optimizer whose step changes its parameter from 1 to 0."""
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    return torch.optim.SGD([parameter], lr=1.0)


def value(optimizer: torch.optim.Optimizer) -> float:
    parameter: torch.Tensor = optimizer.param_groups[0]["params"][0]
    return parameter.detach()[0].item()


def num_hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks)


class Copying:
    """Work that is under way until it is told to end."""

    def __init__(self, copied: Handover) -> None:
        self._handover = copied
        self._end = threading.Event()

    def __call__(self) -> None:
        assert self._end.wait(WAIT)
        self._handover.mark_copied()

    def end(self, *_: object) -> None:
        self._end.set()


@pytest.fixture
def fence():
    made = Fence(rank=3)
    yield made
    made.close(timeout_seconds=WAIT)


def in_thread(act: Callable[[], object]) -> threading.Event:
    """Do it in another thread; the event is set when it is done."""
    done = threading.Event()

    def run() -> None:
        act()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def scaled_step(optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


STEPS: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "plain": lambda optimizer: optimizer.step(),
    "scaler": scaled_step,
    "scheduled": lambda optimizer: (torch.optim.lr_scheduler.ConstantLR(optimizer), optimizer.step()),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_waits_until_everything_is_copied(fence, step):
    ours, optimizer = handover(), sgd()
    copying = Copying(ours)
    fence.start(ours, copying, [optimizer])
    done = in_thread(lambda: step(optimizer))
    assert not done.wait(A_WHILE)
    assert value(optimizer) == 1.0
    copying.end()
    assert done.wait(WAIT)
    assert value(optimizer) < 1.0
    assert ours.error is None
    assert ours.fence_seconds > 0.0


def test_a_step_after_the_copy_does_not_wait(fence):
    ours, optimizer = handover(), sgd()
    fence.start(ours, ours.mark_copied, [optimizer])
    fence.wait_idle(timeout_seconds=WAIT)
    optimizer.step()
    assert value(optimizer) == 0.0
    assert ours.fence_seconds < WAIT / 2


def test_all_optimizers_of_the_state_wait_and_no_others(fence):
    ours, optimizers, other = handover(), [sgd(), sgd()], sgd()
    copying = Copying(ours)
    fence.start(ours, copying, optimizers)
    other.step()
    done = [in_thread(optimizer.step) for optimizer in optimizers]
    assert not any(event.wait(A_WHILE) for event in done)
    copying.end()
    assert all(event.wait(WAIT) for event in done)
    assert [value(optimizer) for optimizer in (*optimizers, other)] == [0.0] * 3


def test_a_failed_copy_lets_the_step_go_on(fence):
    ours, optimizer = handover(), sgd()

    def fail() -> None:
        ours.fail(SaveFailed("no luck"))

    fence.start(ours, fail, [optimizer])
    optimizer.step()
    assert value(optimizer) == 0.0
    ours.wait()
    assert isinstance(ours.error, SaveFailed)
    assert not ours.mark_copied()


@pytest.mark.parametrize(
    "limits", [{"deadline_seconds": A_WHILE}, {"patience_seconds": A_WHILE}], ids=["deadline", "no progress"]
)
def test_a_copy_that_hangs_fails_the_save_and_not_the_step(fence, limits):
    ours, optimizer = handover(**limits), sgd()
    copying = Copying(ours)
    fence.start(ours, copying, [optimizer])
    optimizer.step()
    assert value(optimizer) == 0.0
    assert isinstance(ours.error, SaveFailed)
    assert (ours.error.rank, ours.error.step, ours.error.phase) == (3, 7, "stage")
    assert "not copied in time" in ours.error.message
    with pytest.raises(SaveFailed, match="still being copied"):
        fence.wait_idle(timeout_seconds=0.0)
    assert not ours.go_on()
    copying.end()
    fence.wait_idle(timeout_seconds=WAIT)


def test_progress_keeps_the_fence_patient(fence):
    ours, optimizer = handover(patience_seconds=A_WHILE), sgd()

    def copy_in_many_parts() -> None:
        pause = threading.Event()
        while ours.fence_seconds == 0.0 and not pause.wait(A_WHILE / 10) and ours.go_on():
            if time.monotonic() > started + 3 * A_WHILE:
                ours.mark_copied()

    started = time.monotonic()
    fence.start(ours, copy_in_many_parts, [optimizer])
    optimizer.step()
    assert ours.error is None
    assert ours.fence_seconds > A_WHILE


def test_whoever_waits_for_the_end_gives_up_at_the_deadline():
    ours = handover(deadline_seconds=A_WHILE)
    ours.wait()
    assert isinstance(ours.error, SaveFailed)


def test_only_what_is_not_copied_yet_can_be_given_up():
    early, late = handover(), handover()
    early.give_up(SaveFailed("interrupted"))
    assert not early.mark_copied()
    assert late.mark_copied()
    late.give_up(SaveFailed("interrupted"))
    assert late.error is None


def test_hooks_follow_the_saves_and_go_at_the_end(fence):
    first, second = sgd(), sgd()
    for optimizers, counts in (([first], (1, 0)), ([first, second], (1, 1)), ([second], (0, 1))):
        ours = handover()
        fence.start(ours, ours.mark_copied, optimizers)
        fence.wait_idle(timeout_seconds=WAIT)
        assert (num_hooks(first), num_hooks(second)) == counts
    fence.release()
    assert num_hooks(second) == 0
    fence.start(ours, ours.mark_copied, [second])
    fence.close(timeout_seconds=WAIT)
    fence.close(timeout_seconds=WAIT)
    assert num_hooks(second) == 0
    assert "dcp_ckpt-fence" not in [thread.name for thread in threading.enumerate()]


def test_the_thread_does_not_hold_on_to_what_it_copied(fence):
    gone = threading.Event()

    class Work:
        def __call__(self) -> None:
            ours.mark_copied()

        def __del__(self) -> None:
            gone.set()

    ours = handover()
    fence.start(ours, Work(), [])
    assert gone.wait(WAIT)


def test_a_copy_that_ends_while_a_step_begins_does_not_break_it(fence):
    """Many rounds of the moment in which hooks must not change under the step that goes through them."""
    optimizer = sgd()
    for _ in range(200):
        ours = handover()
        copying = Copying(ours)
        with_end = register_optimizer_step_pre_hook(copying.end)
        try:
            fence.start(ours, copying, [optimizer])
            optimizer.step()
        finally:
            with_end.remove()
        fence.wait_idle(timeout_seconds=WAIT)
    assert ours.error is None
