"""Canonical names of a module's parameters and buffers.

Owns the walk over modules: which wrappers vanish from names, which tensors are the same, what
is persistent. Called by the model component and, through it, for the names of an optimizer's
parameters. Knows nothing of checkpoints; never calls `state_dict()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcp_ckpt.errors import StateError
from dcp_ckpt.state.model_parts import ModelParts

__all__ = ["ModuleNames", "NamedTensor"]

_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
_FLAT_PARAMETER = ("torch.distributed.fsdp._flat_param", "FlatParameter")
_FSDP2 = ("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")


@dataclass(frozen=True, kw_only=True)
class NamedTensor:
    """A live parameter or persistent buffer.

    Args:
        name: the first name by which the walk met it.
        aliases: its other names, where parameters are tied or modules shared.
        tensor: the live object.
    """

    name: str
    aliases: tuple[str, ...]
    tensor: torch.Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """One module as the walk saw it; cheap to compare with what it is now."""

    module: nn.Module
    kind: type[nn.Module]
    children: tuple[tuple[str, nn.Module | None], ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    transient: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> _Visit:
        return cls(
            module=module,
            kind=type(module),
            children=tuple(module._modules.items()),
            parameters=tuple(module._parameters),
            buffers=tuple(module._buffers),
            transient=frozenset(module._non_persistent_buffers_set),
        )

    def is_current(self) -> bool:
        module = self.module
        return (
            type(module) is self.kind
            and tuple(module._modules.items()) == self.children
            and tuple(module._parameters) == self.parameters
            and tuple(module._buffers) == self.buffers
            and module._non_persistent_buffers_set == self.transient
        )


class ModuleNames:
    """The names in one module tree.

    The walk is kept while the tree keeps its shape; tensors are read from their modules at every
    call, so parameters that were replaced are seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._visits: list[tuple[str, _Visit]] = []

    def tensors(self) -> list[NamedTensor]:
        """All parameters and persistent buffers, each once, in the order of `named_parameters()`.

        FSDP2 modules that stand unsharded (after an evaluation) are resharded first; their parameters would
        otherwise be missed.

        Raises:
            StateError: FSDP1, or two tensors with one name.
        """
        names: dict[int, list[str]] = {}
        live: dict[int, torch.Tensor] = {}
        owners: dict[str, int] = {}
        for name, tensor in self._entries():
            key = id(tensor)
            if owners.setdefault(name, key) != key:
                raise StateError(
                    f"two tensors of the model have the name {name!r} once wrappers are left out and parts "
                    "put together; rename one of them"
                )
            live[key] = tensor
            names.setdefault(key, []).append(name)
        return [
            NamedTensor(name=names[key][0], aliases=tuple(names[key][1:]), tensor=tensor)
            for key, tensor in live.items()
        ]

    def parameter_names(self) -> dict[int, tuple[str, ...]]:
        """The names of every parameter, its own first, by `id()` of the live parameter object."""
        return {id(entry.tensor): entry.names for entry in self.tensors()}

    def extra_states(self) -> list[tuple[tuple[str, ...], nn.Module]]:
        """Modules that override `get_extra_state`, with the names that torch gives that state."""
        self._refresh()
        found: dict[int, tuple[tuple[str, ...], nn.Module]] = {}
        for prefix, visit in self._visits:
            if visit.kind.get_extra_state is not nn.Module.get_extra_state:
                known, module = found.get(id(visit.module), ((), visit.module))
                found[id(module)] = (*known, f"{prefix}_extra_state"), module
        return list(found.values())

    def _entries(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._refresh()
        for prefix, visit in self._visits:
            for attribute in visit.parameters:
                parameter = visit.module._parameters[attribute]
                if parameter is not None:
                    yield prefix + attribute, parameter
            for attribute in visit.buffers:
                buffer = visit.module._buffers[attribute]
                if buffer is not None and attribute not in visit.transient:
                    yield prefix + attribute, buffer

    def _refresh(self) -> None:
        if not self._visits or not all(visit.is_current() for _, visit in self._visits):
            wrappers = [
                (kind, attribute)
                for module, name, attribute in _WRAPPERS
                if (kind := _loaded(module, name)) is not None
            ]
            visits = list(_walk(self._module, "", wrappers, ()))
            _refuse_flat_parameters(visits)
            self._visits = visits
        fsdp: Any = _loaded(*_FSDP2)
        if fsdp is not None:
            for _, visit in self._visits:
                if isinstance(visit.module, fsdp):
                    fsdp.reshard(visit.module)


def _loaded(module: str, name: str) -> type | None:
    """A class, if its module was imported: before that nothing can be an instance of it, and
    importing torch.compile or FSDP only to ask would cost a second of every start."""
    return getattr(sys.modules.get(module), name, None)


def _walk(
    module: nn.Module,
    prefix: str,
    wrappers: list[tuple[type, str]],
    ancestors: tuple[nn.Module, ...],
) -> Iterator[tuple[str, _Visit]]:
    visit = _Visit.of(module)
    yield prefix, visit
    hidden = {attribute for kind, attribute in wrappers if isinstance(module, kind)}
    if isinstance(module, ModelParts):
        hidden = set(module._modules)
    ancestors = (*ancestors, module)
    for name, child in visit.children:
        if child is None or any(child is ancestor for ancestor in ancestors):
            continue
        child_prefix = prefix if name in hidden else f"{prefix}{name}."
        yield from _walk(child, child_prefix, wrappers, ancestors)


def _refuse_flat_parameters(visits: list[tuple[str, _Visit]]) -> None:
    fsdp, flat = _loaded(*_FSDP1), _loaded(*_FLAT_PARAMETER)
    for prefix, visit in visits:
        flattened = flat is not None and any(
            isinstance(parameter, flat) for parameter in visit.module._parameters.values()
        )
        if flattened or (fsdp is not None and isinstance(visit.module, fsdp)):
            raise StateError(
                f"module {prefix.removesuffix('.') or '(root)'} is sharded by FSDP1 "
                "(FullyShardedDataParallel), whose flat parameters cannot be resharded; shard it with "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
