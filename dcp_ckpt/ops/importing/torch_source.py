"""`torch.save` files as a source: each a dictionary of tensors and values, nested or not.

Read by `torch.load(weights_only=True)`, which executes nothing, and mapped where the file allows it, so that
tensors are read when they are asked for. Imports torch when it is opened. Called by `ops.import_checkpoint`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dcp_ckpt.errors import CorruptCheckpoint, LoadError, StateError, StateMismatch
from dcp_ckpt.format.dtypes import DTYPES, dtype_name
from dcp_ckpt.format.values import encode_value
from dcp_ckpt.ops.importing.source import contradiction
from dcp_ckpt.ops.new_state import NewTensor, NewValue
from dcp_ckpt.ops.windows import WINDOW_BYTES, windows_of
from dcp_ckpt.wording import shown_names

if TYPE_CHECKING:
    import torch

__all__ = ["TorchSource"]


class TorchSource:
    """The leaves of all files, under the paths of their keys, as DCP would name them.

    Args:
        paths: of local files: one, or those that an index names.
        index: name of each tensor -> its file, where there is an index.

    Raises:
        LoadError: only executing a pickle could read it.
        CorruptCheckpoint: a file is missing or damaged, or they contradict the index.
        StateMismatch: one holds no dictionary, or a tensor that is not plain.
    """

    kind = "torch"
    unverified = "torch.save files have no digests: damage inside of tensors would not be noticed"

    def __init__(self, paths: Sequence[str], index: Mapping[str, str] | None = None) -> None:
        self.left_out: dict[str, str] = {}
        self.tensors: list[NewTensor] = []
        self.values: list[NewValue] = []
        self._live: list[torch.Tensor] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        held = {name: os.path.basename(path) for path in paths for name in self._add(path)}
        if index is not None and (wrong := contradiction(index, held)):
            raise CorruptCheckpoint(wrong, phase="read", path=os.path.dirname(paths[0]))

    def windows(self, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        for number in numbers:
            tensor = self._live[number]
            for box in windows_of(tensor.shape, WINDOW_BYTES // tensor.itemsize):
                window = tuple(
                    slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True)
                )
                yield tensor[window].resolve_conj().resolve_neg().contiguous()

    def close(self) -> None:
        self._live.clear()

    def _add(self, path: str) -> list[str]:
        """The names of the tensors of one file."""
        import torch

        state = _load(path)
        if not isinstance(state, Mapping):
            raise StateMismatch(f"{path} holds a {type(state).__name__}, not a dictionary")
        names = []
        for leaf_path, leaf in _leaves((), state):
            if isinstance(leaf, torch.Tensor):
                self._add_tensor(leaf_path, leaf)
                names.append(".".join(leaf_path))
            else:
                self._add_value(leaf_path, leaf)
        return names

    def _add_tensor(self, path: tuple[str, ...], tensor: torch.Tensor) -> None:
        import torch

        name = ".".join(path)
        dtype = dtype_name(tensor.dtype)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or dtype not in DTYPES:
            raise StateMismatch(
                f"{name} is a {dtype} tensor of a kind that cannot be stored: {tensor.layout}"
            )
        memory = (tensor.data_ptr(), dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        number = self._numbers.setdefault(memory, len(self.tensors))
        if number < len(self.tensors):
            first = self.tensors[number]
            self.tensors[number] = replace(first, aliases=(*first.aliases, path))  # tied
            return
        self.tensors.append(NewTensor(path=path, dtype=dtype, shape=tuple(tensor.shape)))
        self._live.append(tensor.detach())

    def _add_value(self, path: tuple[str, ...], value: Any) -> None:
        name = ".".join(path)
        try:
            self.values.append(NewValue(path=path, encoded=encode_value(value, path=name)))
        except StateError:
            self.left_out[name] = f"of a type that is not stored: {type(value).__name__}"


def _load(path: str) -> Any:
    import torch

    def load(*, mapped: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        try:
            return load(mapped=True)
        except FileNotFoundError as error:
            raise CorruptCheckpoint("a file of the model is missing", phase="read", path=path) from error
        except RuntimeError:
            # Files of before torch 1.6 cannot be mapped.
            return load(mapped=False)
    except pickle.UnpicklingError as error:
        raise LoadError(
            "it holds more than tensors and plain values, which only executing its pickle could restore; "
            "nothing was executed. If you trust where it comes from, save its state_dict() alone with "
            f"torch.save and import that ({str(error).splitlines()[0]})",
            phase="read",
            path=path,
        ) from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CorruptCheckpoint(
            f"neither a safetensors nor a torch.save file that can be read ({why})", phase="read", path=path
        ) from error


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """As DCP flattens: every dictionary is entered, and every list that holds tensors or dictionaries."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
        if len({key for key, _ in items}) != len(items):
            raise StateMismatch(f"keys of {'.'.join(path)} differ in type alone: {shown_names(value)}")
    elif isinstance(value, list | tuple) and any(map(_is_entered, value)):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves((*path, key), item)


def _is_entered(value: Any) -> bool:
    import torch

    if isinstance(value, list | tuple):
        return any(map(_is_entered, value))
    return isinstance(value, torch.Tensor | Mapping)
