"""Which tensors and values are exported, and what is taken off their names: pure, with a reason for the rest.

Knows names and paths only. Called by `plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dcp_ckpt.errors import StateMismatch
from dcp_ckpt.format.stock_metadata import FlatPath
from dcp_ckpt.ops.exporting.request import ExportRequest
from dcp_ckpt.wording import shown_names

__all__ = ["NamePrefix", "Selection", "choose_prefix", "select"]

_MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is exported, in the checkpoint's order, and for everything else the reason why not."""

    tensors: tuple[str, ...]
    values: tuple[str, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class NamePrefix:
    """The beginning that all exported names lose (it may be empty), and why, where that needs saying."""

    text: str
    note: str | None = None


def select(
    tensors: Mapping[str, FlatPath], values: Mapping[str, FlatPath], request: ExportRequest
) -> Selection:
    """Choose by globs; without `include`, models or everything, as the request says.

    Args:
        tensors: stored name -> path.
        values: likewise.

    Raises:
        StateMismatch: a glob matches nothing, or nothing is left to export.
    """
    _require_matches((*tensors, *values), request)
    left_out: dict[str, str] = {}
    chosen_tensors = _chosen(tensors, request, left_out)
    chosen_values = _chosen(values, request, left_out)
    if request.format != "dcp":
        left_out |= dict.fromkeys(
            chosen_values, f"not a tensor, and {request.format} files hold tensors only"
        )
        chosen_values = ()
    if not chosen_tensors and not chosen_values:
        models = "" if request.include or not request.models_only else f" below {_MODEL!r}"
        raise StateMismatch(
            f"there is no tensor{models} to export; the checkpoint holds {_held([*tensors, *values])}: "
            "choose by include"
        )
    return Selection(tensors=chosen_tensors, values=chosen_values, left_out=left_out)


def choose_prefix(paths: Mapping[str, FlatPath], chosen: Iterable[str], request: ExportRequest) -> NamePrefix:
    """What the names of exported tensors lose.

    `model.` when all are of models; with it the key of one model out of several, when only its tensors are
    exported; nothing in a DCP directory, which is loaded into a state with these names.

    Args:
        paths: of all stored tensors.
        chosen: the exported ones.

    Raises:
        StateMismatch: `strip_prefix` is not the beginning of all of them.
    """
    chosen = list(chosen)
    if request.strip_prefix is not None:
        return _stated_prefix(request.strip_prefix, chosen)
    if request.format == "dcp" or not chosen:
        return NamePrefix(text="")
    if others := [name for name in chosen if paths[name][0] != _MODEL]:
        if len(others) == len(chosen):
            return NamePrefix(text="")
        return NamePrefix(
            text="", note=f"names are kept whole, since not all are of a model: {shown_names(others)}"
        )
    keys = _model_keys(paths.values())
    if len(keys) < 2:
        return NamePrefix(text=f"{_MODEL}.")
    used = sorted({str(paths[name][1]) for name in chosen})
    if len(used) == 1:
        return NamePrefix(
            text=f"{_MODEL}.{used[0]}.", note=f"of the models {', '.join(keys)}, {used[0]} alone"
        )
    return NamePrefix(
        text=f"{_MODEL}.",
        note=f"there are several models, whose keys stay in the names: {', '.join(used)}; choose one with "
        f"include '{_MODEL}.{used[0]}.*'",
    )


def _held(names: Iterable[str]) -> str:
    return shown_names(names) or "nothing"


def _require_matches(names: Iterable[str], request: ExportRequest) -> None:
    """A glob that matches nothing is a slip; what it was meant for would silently be missing, or be there."""
    listed = list(names)
    globs = [
        *(("include", glob) for glob in request.include),
        *(("exclude", glob) for glob in request.exclude),
    ]
    for option, glob in globs:
        if not any(fnmatchcase(name, glob) for name in listed):
            raise StateMismatch(
                f"{option} {glob!r} matches nothing; the checkpoint holds {_held(sorted(listed))}"
            )


def _chosen(
    paths: Mapping[str, FlatPath], request: ExportRequest, left_out: dict[str, str]
) -> tuple[str, ...]:
    chosen = []
    for name, path in paths.items():
        reason = _reason_against(name, path, request)
        if reason is None:
            chosen.append(name)
        else:
            left_out[name] = reason
    return tuple(chosen)


def _reason_against(name: str, path: FlatPath, request: ExportRequest) -> str | None:
    if request.include and not any(fnmatchcase(name, glob) for glob in request.include):
        return "not included"
    if not request.include and request.models_only and path[0] != _MODEL:
        return "not of a model"
    return "excluded" if any(fnmatchcase(name, glob) for glob in request.exclude) else None


def _stated_prefix(stated: str, chosen: list[str]) -> NamePrefix:
    text = stated if not stated or stated.endswith(".") else f"{stated}."
    if others := [name for name in chosen if not name.startswith(text)]:
        raise StateMismatch(f"these names do not begin with strip_prefix {text!r}: {shown_names(others)}")
    return NamePrefix(text=text)


def _model_keys(paths: Iterable[FlatPath]) -> list[str]:
    """The keys of several models; none where the names right below `model` are those of tensors."""
    below = [path for path in paths if path[0] == _MODEL]
    if any(len(path) < 3 for path in below):
        return []
    return sorted({str(path[1]) for path in below})
