"""Whether a checkpoint fits the state of all ranks: one verdict, in one message.

Owns that exchange between ranks, which costs one message of each rank where all fits, and one answer that
does not grow with the ranks. Called by `load.restore`, on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dcp_ckpt.coordination import (
    Channel,
    as_checkpoint_error,
    broadcast,
    error_fields,
    failures_from,
    first_failures,
    reduce,
)
from dcp_ckpt.errors import ConfigError, LoadError, StateMismatch
from dcp_ckpt.load.diff import Answer, answer, of_all_ranks
from dcp_ckpt.load.elsewhere import common_to_all
from dcp_ckpt.load.fit import Fitted
from dcp_ckpt.load.mismatch import mismatch_message
from dcp_ckpt.load.selection import unmatched_message
from dcp_ckpt.state.component import Problem

__all__ = ["agreed_fit", "verdict_of_all"]


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
    told = reduce(channel, f"{tag}/fit", own, verdict_of_all, timeout_seconds=timeout_seconds)
    failures_from(told["failures"]).raise_first(rather=LoadError)
    assert fitted is not None, "no rank failed"
    verdict = _Verdict(channel, fitted, tag=tag, timeout_seconds=timeout_seconds)
    if told["unmatched"]:
        raise verdict.unmatched_error(told["unmatched"])
    problems, left_over, fits = list(fitted.problems), fitted.unasked, told["fits"]
    if told["is_part"]:
        nobodys, left_over = verdict.elsewhere()
        problems += nobodys
        fits = reduce(channel, f"{tag}/fits", not problems, all, timeout_seconds=timeout_seconds)
    if not fits:
        verdict.require_fit(problems)
    return fitted, left_over


def verdict_of_all(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0: what all ranks are told of what each of them found. As short for many ranks as for one."""
    return {
        "failures": first_failures([one["failure"] for one in verdicts]),
        "fits": all(one["fits"] for one in verdicts),
        "is_part": any(one["is_part"] for one in verdicts),
        "unmatched": sorted(set.intersection(*(set(one["unmatched"]) for one in verdicts))),
    }


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

        def judge(answers: list[dict[str, Any]]) -> list[list[str]]:
            """On rank 0, of all answers."""
            found = [Answer(more=tuple(_decoded(a["more"])), lacks=tuple(a["lacks"])) for a in answers]
            return _encoded(of_all_ranks(first, found))

        told = reduce(
            self._channel,
            f"{self._tag}/answers",
            {"more": _encoded(difference.more), "lacks": difference.lacks},
            judge,
            timeout_seconds=self._timeout_seconds,
        )
        problems = _decoded(told)
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
