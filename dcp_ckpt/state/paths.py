"""Where entries of the state sit: paths, the names made of them, and what lies under a prefix.

Knows no tensor but as something that has a path. Called by everything that captures or restores state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from dcp_ckpt.format.dotted import is_below
from dcp_ckpt.state.component import Path, StoredState

__all__ = ["by_name", "is_under", "join_path", "names_under", "path_of", "stored_under"]


def join_path(path: Path) -> str:
    """The name of a path: its parts joined with dots, as DCP flattens them."""
    return ".".join(path)


def by_name(tensors: Mapping[Path, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Captured tensors under their names."""
    return {join_path(path): tensor for path, tensor in tensors.items()}


def names_under(names: Iterable[str], prefix: Path) -> list[str]:
    """Those of `names` that are the prefix itself or lie below it; all of them for the empty prefix."""
    root = join_path(prefix)
    return [name for name in names if is_below(name, root)]


def is_under(path: Path, prefix: Path) -> bool:
    """Whether a path is the prefix or lies below it.

    By parts, for one part may hold dots: `optimizer.a.b` is not below `optimizer.a` when its key is "a.b". A
    path of one part (a flat state has no others) is looked at by its name.
    """
    return path[: len(prefix)] == prefix or (len(path) == 1 and path[0].startswith(f"{join_path(prefix)}."))


def stored_under(stored: StoredState, prefix: Path, names: Iterable[str] | None = None) -> list[str]:
    """Those of `names` that lie under the prefix; of all tensors and values where no names are given."""
    candidates = (*stored.tensors, *stored.values) if names is None else names
    return [name for name in candidates if is_under(path_of(stored, name), prefix)]


def path_of(stored: StoredState, name: str) -> Path:
    """The path of a stored tensor or replicated value."""
    tensor = stored.tensors.get(name)
    return tensor.path if tensor is not None else stored.value_paths[name]
