"""A component of which each rank holds a part: of a model that is cut into pipeline stages.

Owns who else holds the same, and whose business it is what this rank does not use. A wrapper around any
component; knows neither modules nor optimizers. Made by TrainState.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dcp_ckpt.state.component import Captured, Component, Path, StoredState, Targets
from dcp_ckpt.state.mesh_roles import MeshRoles
from dcp_ckpt.state.paths import is_under

__all__ = ["PartComponent"]


class PartComponent:
    """What another component holds, with the ranks that hold the same.

    Args:
        component: of this rank's part of the model.
        parameter_of: the full name of the parameter that a path belongs to. None: the component's tensors
            belong to no part; they are the same on all ranks.
    """

    def __init__(
        self, component: Component, roles: MeshRoles, parameter_of: Callable[[Path], str] | None
    ) -> None:
        self._component = component
        self._roles = roles
        self._parameter_of = parameter_of

    @property
    def component(self) -> Component:
        """The component that is wrapped."""
        return self._component

    @property
    def prefix(self) -> Path:
        return self._component.prefix

    def capture(self) -> Captured:
        captured = self._component.capture()
        paths = [*captured.values, *(captured.tensors if self._parameter_of else ())]
        holders = dict.fromkeys(paths, self._roles.holders())
        if self._parameter_of and self._roles.shared:
            holders = {path: self._roles.holders(self._parameter_of(path)) for path in paths}
        # A tensor in a value that all parts have, such as a learning rate, is the same on all ranks.
        for value in captured.joins:
            for path in captured.tensors:
                if is_under(path, value):
                    holders.pop(path, None)
        return replace(captured, holders=holders)

    def targets(self, stored: StoredState) -> Targets:
        """As the component; what is not expected here may be another rank's."""
        targets = self._component.targets(stored)
        if not self._roles.pipeline:
            return targets
        return replace(
            targets,
            problems=tuple(problem for problem in targets.problems if problem.kind != "unexpected"),
            elsewhere=tuple(problem for problem in targets.problems if problem.kind == "unexpected"),
        )

    def install(self, stored: StoredState, targets: Targets) -> list[str]:
        return self._component.install(stored, targets)
