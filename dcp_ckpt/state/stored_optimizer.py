"""What a checkpoint holds of one optimizer, by parameter, and what of it a load is to restore.

Knows names and paths only, no optimizer. Called by the optimizer component.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from dcp_ckpt.state.component import Path, StoredState
from dcp_ckpt.state.param_groups import listed_params
from dcp_ckpt.state.paths import join_path, path_of, stored_under

__all__ = ["StoredOptimizer"]


class StoredOptimizer:
    """The part of a stored state that lies under an optimizer's prefix.

    Args:
        stored: what is selected of the checkpoint.
        prefix: of the optimizer.
    """

    def __init__(self, stored: StoredState, prefix: Path) -> None:
        self._stored = stored
        self._prefix = prefix
        self.names_by_parameter = _by_parameter(stored, prefix)
        """Names of the stored state of each parameter that has any."""

    @property
    def groups_name(self) -> str:
        return join_path((*self._prefix, "param_groups"))

    @property
    def groups(self) -> Any:
        """The stored groups of hyper-parameters, decoded, whatever they are; None without."""
        return self._stored.values.get(self.groups_name)

    @property
    def parameters(self) -> set[str]:
        """All that the checkpoint knows as parameters of this optimizer."""
        return {*self.names_by_parameter, *listed_params(self.groups)}

    def state_name(self, parameter: str, *key: str) -> str:
        """The name of a parameter's state, or of one key of it."""
        return join_path((*self._prefix, "state", parameter, *key))

    def key_of(self, name: str) -> tuple[str, ...]:
        """What follows the parameter in the path of its stored state: a key, and what lies below it."""
        return path_of(self._stored, name)[len(self._prefix) + 2 :]

    def keys(self, parameter: str) -> frozenset[str]:
        """The keys of a parameter's stored state (`step`, `exp_avg`, ...)."""
        return frozenset(self.key_of(name)[0] for name in self.names_by_parameter.get(parameter, ()))

    def restores(self, parameter: str) -> bool:
        """Whether anything of a parameter's state may be restored."""
        return self._stored.selects(self.state_name(parameter) + ".")

    def kept(self, parameter: str, live: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a parameter's live state that this load is not to touch."""
        return {
            key: value
            for key, value in live.items()
            if not self._stored.selects(self.state_name(parameter, key))
        }

    def left_out_keys(self, parameters: Container[str]) -> dict[str, set[str]]:
        """The keys of each parameter's stored state that are not selected."""
        root = self.state_name("")
        found: dict[str, set[str]] = {}
        for left_out in self._stored.left_out:
            if not left_out.startswith(root):
                continue
            name, _, key = left_out.removeprefix(root).rpartition(".")
            while name and name not in parameters:
                name, _, key = name.rpartition(".")
            found.setdefault(name, set()).add(key)
        return found


def _by_parameter(stored: StoredState, prefix: Path) -> dict[str, list[str]]:
    state_path, depth = (*prefix, "state"), len(prefix) + 1
    index: dict[str, list[str]] = {}
    for name in stored_under(stored, state_path):
        path = path_of(stored, name)
        if path[:depth] == state_path and len(path) > depth + 1:
            index.setdefault(path[depth], []).append(name)
    return index
