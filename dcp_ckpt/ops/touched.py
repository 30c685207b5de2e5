"""From bytes of a data file back to what is stored there, for messages that a person can act on.

Pure. Called by `dcp_ckpt.ops.verify`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from dcp_ckpt.format.fragment import Fragment

__all__ = ["FileMap", "Touched"]


@dataclass(frozen=True, kw_only=True)
class Touched:
    """Sorted names of the tensors and of the values stored in some bytes."""

    tensors: tuple[str, ...]
    values: tuple[str, ...]


class FileMap:
    """What lies where in one data file.

    Args:
        fragment: of the file's rank; None when it is lost, then nothing is known.
        file: index of the file.
    """

    def __init__(self, fragment: Fragment | None, file: int) -> None:
        spans: list[tuple[int, int, str, bool]] = []
        if fragment is not None:
            for chunk in fragment.chunks:
                if chunk.file == file:
                    stop = chunk.container_offset + chunk.container_bytes
                    spans.append((chunk.container_offset, stop, chunk.tensor, True))
        if fragment is not None and file == 0:
            for name, value in fragment.values.items():
                if value.container_offset is not None:
                    stop = value.container_offset + (value.container_bytes or 0)
                    spans.append((value.container_offset, stop, name, False))
        self._spans = sorted(spans)
        self._stops = [span[1] for span in self._spans]

    def touched(self, start: int, stop: int) -> Touched:
        """What is stored in the bytes from `start` to `stop`."""
        # Containers do not overlap, so they end in the order in which they begin.
        names: dict[bool, set[str]] = {True: set(), False: set()}
        for position in range(bisect_left(self._stops, start + 1), len(self._spans)):
            begin, _, name, is_tensor = self._spans[position]
            if begin >= stop:
                break
            names[is_tensor].add(name)
        return Touched(tensors=tuple(sorted(names[True])), values=tuple(sorted(names[False])))
