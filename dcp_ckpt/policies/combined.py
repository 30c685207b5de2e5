"""Several policies as one, and which kind of policy a value is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.policies.keeping import KeepPolicy, Saved
from dcp_ckpt.policies.saving import Moment, SavePolicy

__all__ = ["AnyOf", "is_keep_policy", "is_save_policy"]


@dataclass(frozen=True, init=False, repr=False)
class AnyOf(SavePolicy, KeepPolicy):
    """What any of the policies says; all of them save policies, or all keep policies."""

    policies: tuple[SavePolicy | KeepPolicy, ...]

    def __init__(self, *policies: SavePolicy | KeepPolicy) -> None:
        object.__setattr__(self, "policies", policies)
        if not policies:
            raise ConfigError("AnyOf() needs at least one policy")
        if not is_save_policy(self) and not is_keep_policy(self):
            raise ConfigError(
                f"AnyOf takes either save policies or keep policies, not {', '.join(map(repr, policies))}"
            )

    def __repr__(self) -> str:
        return f"AnyOf({', '.join(map(repr, self.policies))})"

    def is_due(self, moment: Moment) -> bool:
        return any(isinstance(policy, SavePolicy) and policy.is_due(moment) for policy in self.policies)

    def keeps(self, checkpoints: Sequence[Saved]) -> dict[int, str]:
        kept: dict[int, str] = {}
        for policy in self.policies:
            if isinstance(policy, KeepPolicy):
                for position, reason in policy.keeps(checkpoints).items():
                    kept[position] = f"{kept[position]}, {reason}" if position in kept else reason
        return kept


def is_save_policy(value: object) -> bool:
    """Whether `value` can be asked when to save."""
    if isinstance(value, AnyOf):
        return all(map(is_save_policy, value.policies))
    return isinstance(value, SavePolicy)


def is_keep_policy(value: object) -> bool:
    """Whether `value` can be asked what to keep."""
    if isinstance(value, AnyOf):
        return all(map(is_keep_policy, value.policies))
    return isinstance(value, KeepPolicy)
