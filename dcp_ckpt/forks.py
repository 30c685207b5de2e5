"""What a process that is forked from a trainer must leave alone, such as a worker of a DataLoader.

Knows nothing of who forks. Called by whoever has, or lets others have, threads of torch in this process.
"""

from __future__ import annotations

import functools
import gc
import os

__all__ = ["spare_forked_children"]


@functools.cache
def spare_forked_children() -> None:
    """Let no forked child destroy what this process has become unable to reach, from now on. Once is enough.

    Process groups and stores of torch own threads. In a child these do not exist, and an object that waits
    for its threads there waits for ever, aborts or crashes. So it is with the groups of a mesh: FSDP2 holds
    them in cycles, and a worker that happens to collect garbage destroys those of a training that is over.
    With `gc.freeze` a child collects only what it has made itself.
    """
    os.register_at_fork(after_in_child=gc.freeze)
