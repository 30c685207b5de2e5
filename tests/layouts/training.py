"""Training states around the model: moments, groups, schedulers and values, all of them known.

Imported by the ranks of the pool as well as by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcp_ckpt import TrainState
from tests.layouts.models import Layout, known, same_bits

__all__ = ["MOMENTS", "RECIPES", "UNTOUCHED", "VALUES", "blank", "differing", "trained"]

MOMENTS = ("exp_avg", "exp_avg_sq")
UNTOUCHED = "head.bias"
"""A parameter without state, as one that never had a gradient."""

VALUES: dict[str, Any] = {"best": 0.25, "history": [3.0, 2.5], "by_int": {1: ("a", None)}}

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and by which optimizers.

    Args:
        models: their keys; none for a single model without one.
        optimizers: makes them from the parameters by name; one without a key, or several by key.
    """

    models: tuple[str, ...] = ()
    optimizers: Callable[[Named], Any]


def _two_groups(named: Named) -> torch.optim.Optimizer:
    # Every rank makes all groups, also where a group has nothing of its part of the model.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0)


def _muon_for_matrices(named: Named) -> dict[str, torch.optim.Optimizer]:
    matrices = {name: p for name, p in named.items() if p.ndim == 2}
    others = [p for name, p in named.items() if name not in matrices]
    found: dict[str, torch.optim.Optimizer] = {}
    # An optimizer without parameters cannot be made: some stages of a pipeline lack one.
    if matrices:
        found["muon"] = torch.optim.Muon([*matrices.values()], lr=1.0)
    if others:
        found["adamw"] = torch.optim.AdamW(others, lr=1.0)
    return found


def _one_each(named: Named) -> dict[str, torch.optim.Optimizer]:
    """As for steps that are taken in the backward pass: a key is the name of a parameter, with dots."""
    return {name: torch.optim.AdamW([p], lr=1.0) for name, p in named.items()}


def _one_per_model(named: Named) -> dict[str, torch.optim.Optimizer]:
    keys = sorted({name.partition(".")[0] for name in named})
    return {
        key: torch.optim.AdamW([p for name, p in named.items() if name.startswith(f"{key}.")], lr=1.0)
        for key in keys
    }


RECIPES: Mapping[str, Recipe] = {
    "adamw": Recipe(optimizers=_two_groups),
    "muon": Recipe(optimizers=_muon_for_matrices),
    "backward": Recipe(optimizers=_one_each),
    "gan": Recipe(models=("critic", "generator"), optimizers=_one_per_model),
}


def _make(layout: Layout, recipe: Recipe, kind: str) -> Any:
    models = {key: layout.model(key + kind) for key in recipe.models or ("",)}
    optimizers = recipe.optimizers(dict(_parameters(models)))
    several = isinstance(optimizers, dict)
    schedulers = {
        key: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.5)
        for key, optimizer in (optimizers if several else {"": optimizers}).items()
    }
    return TrainState(
        model=models if recipe.models else models[""],
        optimizer=optimizers or None,
        lr_scheduler=schedulers if several else schedulers[""],
        extra=dict.fromkeys(VALUES),
        rng=False,
        mesh_roles=layout.roles,
    )


def _give_moments(state: Any, layout: Layout, prefix: str) -> None:
    """The state that steps would make, with known bytes."""
    models = _by_key(state.model)
    of_kind = {
        kind: dict(_parameters({key: layout.model(key + prefix + kind) for key in models}))
        for kind in ("momentum_buffer", *MOMENTS)
    }
    names = {parameter: name for name, parameter in _parameters(models)}
    for optimizer in _by_key(state.optimizer).values():
        kinds = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else MOMENTS
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[parameter]
            if name == UNTOUCHED:
                continue
            optimizer.state[parameter] = {kind: of_kind[kind][name].detach() for kind in kinds}
            if kinds == MOMENTS:
                optimizer.state[parameter]["step"] = known(name, prefix + "step", torch.zeros(()))


def trained(layout: Layout, recipe: str = "adamw") -> Any:
    """A state in the middle of a run."""
    state = _make(layout, RECIPES[recipe], "parameter")
    _give_moments(state, layout, "")
    for key, optimizer in _by_key(state.optimizer).items():
        for group in optimizer.param_groups:
            group["lr"] = 0.125 + len(key)
    for scheduler in _by_key(state.lr_scheduler).values():
        scheduler.last_epoch = 3
    state.extra.update(VALUES)
    return state


def blank(layout: Layout, recipe: str = "adamw", *, stepped: bool) -> Any:
    """A state to load into, which holds nothing that is right; before or after its first step."""
    state = _make(layout, RECIPES[recipe], "other")
    if stepped:
        _give_moments(state, layout, "other ")
    return state


def differing(state: Any, right: Any) -> list[str]:
    """What a state of this rank holds that is not, bit for bit, what another one holds."""
    tensors, expected = dict(_tensors(state)), dict(_tensors(right))
    found = [name for name in expected if name not in tensors or not same_bits(tensors[name], expected[name])]
    found += [name for name in tensors if name not in expected]
    return found + [name for name, value in _values(state).items() if value != _values(right)[name]]


def _tensors(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    models = _by_key(state.model)
    names = {parameter: name for name, parameter in _parameters(models)}
    yield from ((name, parameter) for parameter, name in names.items())
    for key, model in models.items():
        yield from ((_name(key, name), buffer) for name, buffer in model.named_buffers())
    for key, optimizer in _by_key(state.optimizer).items():
        for parameter, moments in optimizer.state.items():
            for kind, moment in moments.items():
                yield f"{names[parameter]}/{kind} in {key}", moment


def _values(state: Any) -> dict[str, Any]:
    values = {f"extra {name}": value for name, value in state.extra.items()}
    for key, optimizer in _by_key(state.optimizer).items():
        values[f"groups {key}"] = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
    for key, scheduler in _by_key(state.lr_scheduler).items():
        values[f"scheduler {key}"] = scheduler.state_dict()
    return values


def _by_key(given: Any) -> dict[str, Any]:
    """Objects by their keys; a single one under an empty key."""
    if given is None:
        return {}
    return given if isinstance(given, dict) else {"": given}


def _parameters(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for key, model in models.items():
        yield from ((_name(key, name), parameter) for name, parameter in model.named_parameters())


def _name(key: str, name: str) -> str:
    """As TrainState names it: without wrappers, with the model's key in front."""
    return ".".join(filter(None, (key, name.removeprefix("module."))))
