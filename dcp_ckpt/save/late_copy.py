"""Copying tensors after `save()` has returned, and finding those that did not stay as they were.

Made on the main thread, which says how every tensor is at that moment; run on the fence's thread, beside
forward and backward, which only read. Knows nothing of threads, files or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.save.host_copy import copy_to_host
from dcp_ckpt.save.replicas import sample_of
from dcp_ckpt.state.placements import local_tensor
from dcp_ckpt.wording import shown_names

__all__ = ["LateCopy", "LateTensor", "can_be_late"]

_GROUP_BYTES = 32 << 20
"""Copied in one call: long enough to cost the training thread nothing, short enough to show progress."""

_Stamp = tuple[int, int, int]


def can_be_late(tensor: torch.Tensor) -> bool:
    """Whether a change can be seen and the copy ordered: a device whose streams we know, with a version."""
    return tensor.device.type in ("cpu", "cuda") and not tensor.is_inference()


@dataclass(frozen=True, kw_only=True)
class LateTensor:
    """One tensor to be copied later.

    Args:
        live: plain or DTensor.
        local: its local part as it is now, without autograd.
        is_sampled: a sample for the comparison between ranks is taken with it.
        parts: what to copy: the part of `local` (None for all of it), and the memory to copy it into.
    """

    name: str
    live: torch.Tensor
    local: torch.Tensor
    is_sampled: bool
    parts: Sequence[tuple[tuple[slice, ...] | None, torch.Tensor]]


class LateCopy:
    """The late tensors of one save, with how they were when this was made.

    Holds on to their memory, so that it is not given to others, until it is dropped.
    """

    def __init__(self, tensors: Sequence[LateTensor]) -> None:
        self._tensors = tensors
        self._stamps = [_stamp(tensor.live) for tensor in tensors]
        self._readers: dict[torch.device, AbstractContextManager[object]] = {}
        self._streams: list[torch.cuda.Stream] = []
        for device in {tensor.local.device for tensor in tensors}:
            self._readers[device] = self._reader(device)

    def __bool__(self) -> bool:
        return bool(self._tensors)

    @torch.no_grad()
    def run(self, go_on: Callable[[], bool]) -> dict[str, bytes]:
        """Copy everything. Blocks until the memory copied into holds it.

        Args:
            go_on: called after each group of copies; ends the work by returning False.

        Returns:
            The samples by name.

        Raises:
            SaveFailed: tensors were changed or moved since this was made, by name.
        """
        samples: dict[str, bytes] = {}
        for device, reader in self._readers.items():
            with reader:
                for group in self._groups(device):
                    # What was resized must not even be read.
                    self._refuse_changed(group)
                    samples.update(self._copy(group))
                    if not go_on():
                        return {}
        for stream in self._streams:
            stream.synchronize()
        self._refuse_changed(range(len(self._tensors)))
        return samples

    def _reader(self, device: torch.device) -> AbstractContextManager[object]:
        """Where to read: on a CUDA device a stream of its own, behind what was submitted until now."""
        if device.type != "cuda":
            return nullcontext()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        self._streams.append(stream)
        return torch.cuda.stream(stream)

    def _groups(self, device: torch.device) -> Iterator[list[int]]:
        group: list[int] = []
        num_bytes = 0
        for index, tensor in enumerate(self._tensors):
            if tensor.local.device != device:
                continue
            group.append(index)
            num_bytes += sum(view.nbytes for _, view in tensor.parts)
            if num_bytes >= _GROUP_BYTES:
                yield group
                group, num_bytes = [], 0
        yield group

    def _copy(self, group: Sequence[int]) -> dict[str, bytes]:
        tensors = [self._tensors[index] for index in group]
        views = [view for tensor in tensors for _, view in tensor.parts]
        if views:
            sources = [
                tensor.local if part is None else tensor.local[part]
                for tensor in tensors
                for part, _ in tensor.parts
            ]
            copy_to_host(views, sources)
        return {tensor.name: sample_of(tensor.local) for tensor in tensors if tensor.is_sampled}

    def _refuse_changed(self, indices: Sequence[int]) -> None:
        changed = [
            self._tensors[index].name
            for index in indices
            if _stamp(self._tensors[index].live) != self._stamps[index]
        ]
        if not changed:
            return
        raise SaveFailed(
            f"changed or moved between save() and the end of their copy: {shown_names(changed)}; what writes "
            "parameters or moments other than through optimizer.step() must call Checkpointer.fence() first, "
            "or use overlap='off'",
            phase="stage",
        )


def _stamp(live: torch.Tensor) -> _Stamp:
    """Differs when the tensor was written in place by PyTorch, or is somewhere else.

    A DTensor counts what is written through it, its local tensor what is written past it.
    """
    local = local_tensor(live)
    return live._version, local._version, local.data_ptr()
