"""What of a checkpoint a load restores, and under which names: a value. Pure.

Owns what globs over names mean. Knows no component and no file. Made by the functions that users call, used
while a checkpoint is fitted to the live state.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.load.nearest import did_you_mean

__all__ = ["EVERYTHING", "Selection", "unmatched_message"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to restore. Equal on all ranks.

    Globs are those of `fnmatch` (`*` also matches dots) over names as the live state has them. One that
    matches a name also covers what lies below it: `optimizer`, `optimizer.*` and `opt*` all cover
    `optimizer.state.0.weight.exp_avg`.

    Args:
        include: globs of what to restore; None means everything.
        exclude: globs of what to leave exactly as it is.
        rename: stored name -> live name, of single entries or of all that lies below; the longest one that
            fits counts. The empty string stands for the top of the state.
        cast: globs of the tensors that may be cast to the dtype of the live ones.

    Raises:
        ConfigError: an argument of another form.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    cast: Sequence[str] = ()

    def __post_init__(self) -> None:
        for keyword, globs in self._globs().items():
            if isinstance(globs, str):
                raise ConfigError(f'{keyword} takes a sequence of globs, such as {keyword}=("{globs}",)')
        for name in (*self.rename, *self.rename.values()):
            if name != name.strip(".") or "*" in name:
                raise ConfigError(
                    f"rename takes whole names, or prefixes without the dot behind them, not {name!r}"
                )

    @property
    def is_everything(self) -> bool:
        """Whether all is restored as it is stored."""
        return self.include is None and not (self.exclude or self.rename or self.cast)

    def selects(self, name: str) -> bool:
        """Whether what has this live name is restored; with a dot behind it, whether all below it is."""
        included, excluded, _ = self._patterns
        return included.match(name) is not None and not excluded.match(name)

    def casts(self, name: str) -> bool:
        """Whether a tensor of this live name may be cast."""
        return self._patterns[2].match(name) is not None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The globs that match none of `names`, each as `keyword=glob`."""
        names = list(names)
        return [
            f"{keyword}={glob}"
            for keyword, globs in self._globs().items()
            for glob in globs
            if not any(map(_pattern([glob]).match, names))
        ]

    def split_tie(self, ties: Iterable[Sequence[str]]) -> tuple[str, str] | None:
        """Two names of one thing, of which the first is selected and the second is not; None without any.

        Args:
            ties: all names of each thing that has several.
        """
        for names in ties:
            chosen = [name for name in names if self.selects(name)]
            if chosen and len(chosen) < len(names):
                return chosen[0], next(name for name in names if name not in chosen)
        return None

    def _globs(self) -> dict[str, Sequence[str]]:
        included = ("*",) if self.include is None else self.include
        return {"include": included, "exclude": self.exclude, "cast": self.cast}

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(map(_pattern, self._globs().values()))


EVERYTHING = Selection()


def _pattern(globs: Iterable[str]) -> re.Pattern[str]:
    """Matches names that match a glob, and names below them; nothing when there is no glob."""
    # translate() makes an expression that ends at the end of the text; here it may also end at a dot.
    bodies = [fnmatch.translate(glob).removesuffix(r"\Z").removesuffix(r"\z") for glob in globs]
    return re.compile("|".join(rf"{body}(?:\.|\Z)" for body in bodies) or "(?!)")


def unmatched_message(unmatched: Sequence[str], names: Iterable[str]) -> str:
    """The message about globs that match nothing, neither here nor in the checkpoint.

    Args:
        unmatched: as `Selection.unmatched` gives them.
        names: all that globs could match.
    """
    names = list(names)
    lines = []
    for item in unmatched:
        keyword, _, glob = item.partition("=")
        hint = did_you_mean(glob.removesuffix("*").removesuffix("."), names)
        lines.append(f"{keyword}: {glob!r} matches nothing in the state or the checkpoint{hint}")
    return "\n".join(lines)
