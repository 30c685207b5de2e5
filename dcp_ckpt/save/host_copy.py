"""Copies into host memory, from wherever tensors live, and memory that GPUs copy into fastest.

Knows tensors and CUDA, nothing of arenas, files or ranks. Called where state is staged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

__all__ = ["copy_to_host", "pin", "unpin"]

log = logging.getLogger(__name__)

_PORTABLE = 1
"""Pinned for all devices of the process (cudaHostRegisterPortable)."""


def copy_to_host(views: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its view, on the current streams. Blocks until the views hold the bytes.

    All copies are submitted before the first is waited for; one after the other they would leave a GPU's
    copy engine idle in between.
    """
    torch._foreach_copy_(list(views), list(sources), non_blocking=True)
    for device in {source.device for source in sources if source.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def pin(memory: torch.Tensor) -> bool:
    """Lock host memory and register it with CUDA, so that copies from a GPU go by DMA.

    As `torch.distributed.checkpoint` does for its shared buffers. Takes a while for many pages: once for each
    arena, not for each save.

    Returns:
        Whether CUDA did so; copies are correct without, and slower.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
    if int(result) != 0:
        log.warning(
            "CUDA cannot lock %d bytes of staging memory (error %d): copies from the GPU will be slower",
            memory.nbytes,
            int(result),
        )
        return False
    return True


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`. No copy may be going on."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
