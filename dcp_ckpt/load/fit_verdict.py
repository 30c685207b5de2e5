"""Whether a checkpoint fits the state of all ranks: one verdict, in one message.

Owns that exchange between ranks, which costs one message of each rank where all fits. Called by
`load.restore`, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dcp_ckpt.coordination import (
    Channel,
    as_checkpoint_error,
    broadcast,
    error_fields,
    error_from_fields,
    gather,
    raise_first,
)
from dcp_ckpt.errors import CheckpointError, ConfigError, LoadError, StateMismatch
from dcp_ckpt.load.diff import Answer, answer, of_all_ranks
from dcp_ckpt.load.elsewhere import common_to_all
from dcp_ckpt.load.fit import Fitted
from dcp_ckpt.load.mismatch import mismatch_message
from dcp_ckpt.load.selection import unmatched_message
from dcp_ckpt.state.component import Problem

__all__ = ["agreed_fit", "raise_worst"]


def agreed_fit(
    channel: Channel, fit_here: Callable[[], Fitted], *, tag: str, timeout_seconds: float
) -> tuple[Fitted, frozenset[str]]:
    """Fit on every rank, and go on only if all of them fit. Called on all ranks; blocks.

    Args:
        fit_here: fits on this rank.
        tag: unique in the life of the channel.

    Returns:
        What fits, and the stored names that no rank has a use for.

    Raises:
        ConfigError: a glob matches nothing on any rank.
        StateMismatch: it does not fit; the same message on all ranks.
        CheckpointError: what `fit_here` raised on some rank.
    """
    fitted: Fitted | None = None
    failure: dict[str, Any] | None = None
    try:
        fitted = fit_here()
    except Exception as error:
        failure = error_fields(as_checkpoint_error(error, rank=channel.rank))
    own = {
        "failure": failure,
        "fits": fitted is None or not fitted.problems,
        "is_part": fitted is not None and fitted.elsewhere is not None,
        "unmatched": [] if fitted is None else fitted.unmatched,
    }
    verdicts = gather(channel, f"{tag}/fit", own, timeout_seconds=timeout_seconds)
    raise_worst([error_from_fields(one["failure"]) for one in verdicts if one["failure"] is not None])
    assert fitted is not None, "no rank failed"
    verdict = _Verdict(channel, fitted, tag=tag, timeout_seconds=timeout_seconds)
    if unmatched := set.intersection(*(set(one["unmatched"]) for one in verdicts)):
        raise verdict.unmatched_error(sorted(unmatched))
    problems, left_over, fits = list(fitted.problems), fitted.unasked, all(one["fits"] for one in verdicts)
    if any(one["is_part"] for one in verdicts):
        nobodys, left_over = verdict.elsewhere()
        problems += nobodys
        fits = all(gather(channel, f"{tag}/fits", not problems, timeout_seconds=timeout_seconds))
    if not fits:
        verdict.require_fit(problems)
    return fitted, left_over


def raise_worst(failures: Sequence[CheckpointError]) -> None:
    """Raise one of the failures, if any: rather one that says something of the checkpoint."""
    raise_first(sorted(failures, key=lambda failure: not isinstance(failure, LoadError)))


class _Verdict:
    """What the ranks say to each other where something does not fit."""

    def __init__(self, channel: Channel, fitted: Fitted, *, tag: str, timeout_seconds: float) -> None:
        self._channel = channel
        self._fitted = fitted
        self._tag = tag
        self._timeout_seconds = timeout_seconds

    def unmatched_error(self, unmatched: Sequence[str]) -> ConfigError:
        names = self._fitted.names
        return ConfigError(self._told("globs", lambda: unmatched_message(unmatched, names)), phase="diff")

    def elsewhere(self) -> tuple[list[Problem], frozenset[str]]:
        """Where ranks hold parts of a model: what no rank has a use for and should, and all else of that."""
        foreign = self._fitted.elsewhere or {}
        common = common_to_all(
            self._channel,
            f"{self._tag}/elsewhere",
            {*self._fitted.unasked, *foreign},
            timeout_seconds=self._timeout_seconds,
        )
        return [foreign[key] for key in sorted(common) if key in foreign], common & self._fitted.unasked

    def require_fit(self, own: Sequence[Problem]) -> None:
        """Raise what does not fit all ranks together, if there is anything.

        Most often all ranks find the same, so only how a rank differs from rank 0 is told.

        Args:
            own: what this rank finds.
        """
        fitted = self._fitted
        first = _decoded(self._told("problems", lambda: _encoded(own)))
        difference = answer(first, own)
        answers = gather(
            self._channel,
            f"{self._tag}/answers",
            {"more": _encoded(difference.more), "lacks": difference.lacks},
            timeout_seconds=self._timeout_seconds,
        )
        problems = of_all_ranks(
            first, [Answer(more=tuple(_decoded(a["more"])), lacks=tuple(a["lacks"])) for a in answers]
        )
        if not problems:
            return
        source = fitted.source
        raise StateMismatch(
            self._told(
                "mismatch", lambda: mismatch_message(problems, fitted.state_names, sorted(fitted.unasked))
            ),
            step=fitted.state.step,
            phase="diff",
            path=f"{source.storage.url}/{source.directory}",
        )

    def _told(self, what: str, say: Callable[[], Any]) -> Any:
        """What rank 0 says."""
        return broadcast(self._channel, f"{self._tag}/{what}", say, timeout_seconds=self._timeout_seconds)


def _encoded(problems: Iterable[Problem]) -> list[list[str]]:
    return [[problem.kind, problem.key, problem.detail] for problem in problems]


def _decoded(items: Iterable[Sequence[str]]) -> list[Problem]:
    return [Problem(kind=kind, key=key, detail=detail) for kind, key, detail in items]
