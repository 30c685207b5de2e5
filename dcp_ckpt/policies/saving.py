"""When to save: policies over the moment at which they are asked. Asked by `dcp_ckpt.save.due`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.policies.checks import require_count, require_number, require_seconds

__all__ = [
    "AtFirstStep",
    "AtLastStep",
    "AtSteps",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "Moment",
    "SaveCosts",
    "SavePolicy",
    "Young",
]


@dataclass(frozen=True, kw_only=True)
class SaveCosts:
    """What saves and loads of this training were measured to take, in seconds.

    Args:
        stall_seconds: how long a save holds the training.
        durable_seconds: from the call of a save until its checkpoint is committed.
        load_seconds: of the load that this start began with; 0.0 when it loaded nothing.
    """

    stall_seconds: float
    durable_seconds: float
    load_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a save policy sees when it is asked.

    Args:
        step: the number of finished optimizer steps.
        seconds_since_save: since the last save began, or since the start when there was none.
        finished_epoch: the number of the pass over the data that this step completes; None: it ends none.
        is_first: nobody has asked before in this start.
        is_last: the training ends with this step.
        costs: None until a save of this start was committed.
    """

    step: int
    seconds_since_save: float = 0.0
    finished_epoch: int | None = None
    is_first: bool = False
    is_last: bool = False
    costs: SaveCosts | None = None


class SavePolicy(ABC):
    """Says whether a save is due."""

    @abstractmethod
    def is_due(self, moment: Moment) -> bool:
        """Whether to save now. The more seconds have passed, the more it is: ranks rely on that."""


@dataclass(frozen=True)
class EverySteps(SavePolicy):
    """Save when the step is a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        require_count("EverySteps", self.n)

    def is_due(self, moment: Moment) -> bool:
        return moment.step % self.n == 0


@dataclass(frozen=True)
class EveryEpochs(SavePolicy):
    """Save when a pass over the data ends whose number is a multiple of `n`.

    `should_save` has to be told: `should_save(step, finished_epoch=3)` after the last step of the third.
    """

    n: int = 1

    def __post_init__(self) -> None:
        require_count("EveryEpochs", self.n)

    def is_due(self, moment: Moment) -> bool:
        return moment.finished_epoch is not None and moment.finished_epoch % self.n == 0


@dataclass(frozen=True)
class EverySeconds(SavePolicy):
    """Save when the last save lies `seconds` back, by rank 0's clock."""

    seconds: float

    def __post_init__(self) -> None:
        require_seconds("EverySeconds", self.seconds)

    def is_due(self, moment: Moment) -> bool:
        return moment.seconds_since_save >= self.seconds


@dataclass(frozen=True, init=False)
class AtSteps(SavePolicy):
    """Save at exactly these steps."""

    steps: tuple[int, ...]

    def __init__(self, *steps: int) -> None:
        if not steps:
            raise ConfigError("AtSteps() needs at least one step")
        for step in steps:
            require_count("AtSteps", step)
        object.__setattr__(self, "steps", steps)

    def is_due(self, moment: Moment) -> bool:
        return moment.step in self.steps


@dataclass(frozen=True)
class AtFirstStep(SavePolicy):
    """Save after the first step of each start: what keeps saves from working shows at once."""

    def is_due(self, moment: Moment) -> bool:
        return moment.is_first


@dataclass(frozen=True)
class AtLastStep(SavePolicy):
    """Save after the last step; `should_save` has to be told: `should_save(step, is_last=step == steps)`."""

    def is_due(self, moment: Moment) -> bool:
        return moment.is_last


@dataclass(frozen=True)
class Young(SavePolicy):
    """Save as often as costs least, from what saves were measured to cost and how often the job fails.

    A save takes its stall away from the training; a failure takes away what was trained since the last
    durable checkpoint. For a stall of d seconds and a restart cost R (the time to become durable, in which
    the newest save does not count yet, and the time to load) the sum is least at an interval of
    sqrt(2 d (mtbf + R)): J. T. Daly, "A model for predicting the optimum checkpoint period" (2003), after
    J. W. Young, "A first order approximation to the optimum checkpoint interval" (1974).

    Args:
        mtbf_seconds: mean time between failures of the whole job: that of one node, divided by their number.
        max_overhead: the share of the time that stalls may take, whatever the formula says.
        first_seconds: the interval until a save was measured.
    """

    mtbf_seconds: float
    max_overhead: float = 0.05
    first_seconds: float = 60.0

    def __post_init__(self) -> None:
        require_seconds("Young", self.mtbf_seconds)
        require_number("Young", "max_overhead", self.max_overhead, above=0.0)
        require_seconds("Young", self.first_seconds)

    def interval_seconds(self, costs: SaveCosts | None) -> float:
        """Seconds from the beginning of one save to that of the next.

        Never less than a save takes to become durable: the next one would have to wait for it.
        """
        if costs is None:
            return self.first_seconds
        restart_seconds = costs.durable_seconds + costs.load_seconds
        optimum = math.sqrt(2 * costs.stall_seconds * (self.mtbf_seconds + restart_seconds))
        return max(optimum, costs.stall_seconds / self.max_overhead, costs.durable_seconds)

    def is_due(self, moment: Moment) -> bool:
        # Without any time gone by it never is, or ranks that measured other costs would not agree on that.
        return 0 < moment.seconds_since_save >= self.interval_seconds(moment.costs)
