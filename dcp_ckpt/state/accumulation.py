"""Gradients that no optimizer step has used: a save between them and the step would lose them.

Owns how that is seen: a few gradients are remembered at the end of every step and looked at again when state
is captured, and FSDP2 is asked for what it has not reduced yet. Gradients that a step has used may stay; so
may those that cannot be told from them. Holds on to no optimizer, parameter or gradient. Called by the
components of models and optimizers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dcp_ckpt.errors import StateError

__all__ = ["StepWatch", "mid_accumulation", "runs_hooks", "unreduced_parameter", "watch_steps"]

log = logging.getLogger(__name__)

_SAMPLES = 8
"""Gradients that are remembered, of all optimizers together: 7 us a step."""
_RENEWAL_STEPS = 1024
"""How often other parameters are chosen, since some may be frozen or unused by now."""


def mid_accumulation(name: str) -> StateError:
    """The error of a save in the middle of a gradient accumulation.

    Args:
        name: of a parameter with such gradients.
    """
    return StateError(
        f"{name} has gradients that no optimizer step has used, and gradients are not saved: this is the "
        "middle of an accumulation. Save after optimizer.step(); if these gradients are not wanted, call "
        "zero_grad() before the save"
    )


def runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step()` calls the hooks that are registered; a wrapper may skip `Optimizer.__init__`."""
    return hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer).step, "hooked", False)


def watch_steps(optimizers: Sequence[torch.optim.Optimizer], scaler: Any = None) -> StepWatch:
    """The watch over these optimizers: the one that is there, or a new one. It lives as long as they do.

    Args:
        scaler: the GradScaler that may skip their steps; anything else counts as none.
    """
    scaler = scaler if isinstance(scaler, torch.amp.GradScaler) else None
    if not optimizers or not all(map(runs_hooks, optimizers)):
        return StepWatch((), None)
    for hook in optimizers[0]._optimizer_step_post_hooks.values():
        if isinstance(hook, StepWatch) and hook.is_over(optimizers, scaler):
            return hook
    watch = StepWatch(optimizers, scaler)
    for optimizer in optimizers:
        optimizer.register_step_post_hook(watch)
    return watch


class StepWatch:
    """Knows whether gradients have come since the last step of any of several optimizers.

    Of any, since some step rarely: the discriminator's gradients after a step of the generator are leftovers
    of that step or the beginning of an accumulation, and nobody can tell.

    Args:
        optimizers: all run hooks; without any, nothing is ever seen.
        scaler: see `watch_steps`.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None
    ) -> None:
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._scaler = None if scaler is None else weakref.ref(scaler)
        self._num_steps = 0
        self._is_blind = False
        self._samples: list[_Sample] = []
        self._expected_updates = 0
        self.forget()

    def is_over(
        self, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None
    ) -> bool:
        """Whether it watches exactly these."""
        watched = [*(reference() for reference in self._optimizers), self._scaler and self._scaler()]
        wanted = [*optimizers, scaler]
        return len(watched) == len(wanted) and all(a is b for a, b in zip(watched, wanted, strict=True))

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The hook after a step: what gradients there are, it has used."""
        if torch.compiler.is_compiling():
            self._is_blind = True  # from now on, steps run without their hooks
            return
        self._num_steps += 1
        chooses = self._num_steps & (self._num_steps - 1) == 0 or self._num_steps % _RENEWAL_STEPS == 0
        self._remember(chooses=chooses, num_updates_to_come=1)

    def forget(self) -> None:
        """Take the gradients that are there now for used; called when a load has replaced the state."""
        self._remember(chooses=True, num_updates_to_come=0)

    def pending(self) -> torch.Tensor | None:
        """A parameter with gradients that came after the last step; None when there is none, or in doubt.

        Reads nothing but attributes where gradients are gone or stand as the step left them; else it waits
        for their device.
        """
        try:
            return self._pending()
        except Exception:
            self._give_up()
            return None

    def _pending(self) -> torch.Tensor | None:
        if self._is_blind or self._was_step_skipped():
            return None
        if any(sample.is_parameter_rewritten() for sample in self._samples):
            return None  # whoever does that may well be a step that runs no hooks
        found = next((sample for sample in self._samples if sample.has_new_gradient()), None)
        if found is None or not self._are_gradients_finite():
            return None  # a loss scaler of which nobody told us skips the step of such gradients
        return found.parameter()

    def _remember(self, *, chooses: bool, num_updates_to_come: int) -> None:
        try:
            if chooses:
                self._choose()
            for sample in self._samples:
                sample.remember()
            self._expected_updates = self._scaler_updates() + num_updates_to_come
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        # Tensors of other libraries may lack anything, and no step or save may fail for that.
        log.warning("saves in the middle of a gradient accumulation are not seen", exc_info=True)
        self._is_blind = True

    def _choose(self) -> None:
        """Choose parameters evenly, of those that have gradients if there are any."""
        parameters = [p for p in self._parameters() if not is_lazy(p) and not p.is_inference()]
        used = [p for p in parameters if p.grad is not None] or [p for p in parameters if p.requires_grad]
        chosen = {len(used) * number // _SAMPLES for number in range(_SAMPLES)} if used else set()
        self._samples = [_Sample(used[index]) for index in sorted(chosen)]

    def _parameters(self) -> Iterator[torch.Tensor]:
        for reference in self._optimizers:
            optimizer = reference()
            if optimizer is not None:
                for group in optimizer.param_groups:
                    yield from group["params"]

    def _was_step_skipped(self) -> bool:
        """Whether the scaler has been updated without a step: it found gradients that were not finite."""
        return self._scaler_updates() > self._expected_updates

    def _scaler_updates(self) -> int:
        """Grows by one with each `scaler.update()`."""
        scale = getattr(None if self._scaler is None else self._scaler(), "_scale", None)
        return scale._version if isinstance(scale, torch.Tensor) else 0

    def _are_gradients_finite(self) -> bool:
        gradients = (p.grad for p in self._parameters() if p.grad is not None)
        return all(bool(torch.isfinite(_elements(gradient)).all()) for gradient in gradients)


class _Sample:
    """One parameter, and what it and its gradient looked like at the last step."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = weakref.ref(parameter)
        self._written: tuple[int, int] | None = None
        self._gradient: weakref.ref[torch.Tensor] | None = None
        self._version = 0

    def remember(self) -> None:
        parameter = self.parameter()
        if parameter is None:
            return
        gradient = parameter.grad
        self._written = _written(parameter)
        self._gradient = None if gradient is None else weakref.ref(gradient)
        self._version = 0 if gradient is None else _own_part(gradient)._version

    def is_parameter_rewritten(self) -> bool:
        parameter = self.parameter()
        return parameter is not None and _written(parameter) != self._written

    def has_new_gradient(self) -> bool:
        """Whether it has another gradient than then, and not one of zeros, which zero_grad leaves behind."""
        parameter = self.parameter()
        gradient = None if parameter is None else parameter.grad
        if gradient is None:
            return False
        is_known = self._gradient is not None and self._gradient() is gradient
        if is_known and _own_part(gradient)._version == self._version:
            return False
        return bool(torch.count_nonzero(_elements(gradient)))


def unreduced_parameter(module: nn.Module) -> torch.Tensor | None:
    """A parameter of an FSDP2 module whose gradients wait for a backward that reduces them; None without.

    They are where neither `parameter.grad` nor `zero_grad()` reaches them
    (`set_requires_gradient_sync(False)`, `set_requires_all_reduce(False)`).
    """
    for part in module.modules():
        state_of = getattr(part, "_get_fsdp_state", None)
        if state_of is None:
            continue
        for group in state_of()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                waits = (
                    parameter.unsharded_accumulated_grad is not None
                    or group._partial_reduce_output is not None
                )
                if waits or (whole is not None and whole.grad is not None):
                    sharded: torch.Tensor = parameter.sharded_param
                    return sharded
    return None


def _written(parameter: torch.Tensor) -> tuple[int, int]:
    """Changes when the parameter is written in place, or given other memory."""
    own = _own_part(parameter)
    return parameter._version + own._version, own.data_ptr()


def _elements(gradient: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a gradient, those of a sparse one without its zeros."""
    own = _own_part(gradient).detach()
    return own.coalesce().values() if own.is_sparse else own


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor itself; makes no new one, which would cost every step."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
