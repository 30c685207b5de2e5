"""This rank's fragment of one attempt, complete but for the digests that its writer makes.

Pure. Called by the saver when everything is staged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dcp_ckpt.format.boxes import compress_ranks
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.fragment import CopiesEntry, Fragment
from dcp_ckpt.format.names import AttemptId
from dcp_ckpt.lifecycle.metrics import encode_metrics
from dcp_ckpt.save.replicas import ReplicaSet
from dcp_ckpt.save.staging import Staged

__all__ = ["own_fragment"]


def own_fragment(
    staged: Staged,
    replicas: Sequence[ReplicaSet],
    claim: EpochClaim,
    attempt: AttemptId,
    *,
    rank: int,
    world_size: int,
    step: int,
    created_at: str,
    metrics: Mapping[str, Any],
    tags: Sequence[str],
) -> Fragment:
    """What a rank says of one attempt.

    Args:
        replicas: first what all ranks hold.
        created_at, metrics, tags: stated by rank 0 only.

    Raises:
        StateError: a metric cannot be stored.
    """
    coordinates = rank == 0
    of_all, *of_some = replicas
    return Fragment(
        run_id=claim.run_id,
        epoch=claim.epoch,
        epoch_id=claim.epoch_id,
        attempt=str(attempt),
        step=step,
        rank=rank,
        world_size=world_size,
        files=[file for file, _ in staged.files],
        meshes=staged.plan.meshes,
        tensors=staged.plan.tensors,
        chunks=staged.selection.chunks,
        layout=staged.selection.digest,
        aliases=staged.indexed_aliases,
        values=staged.values,
        per_rank=staged.per_rank,
        replicated=of_all.digest,
        copies=[CopiesEntry(ranks=compress_ranks(one.ranks), digest=one.digest) for one in of_some],
        created_at=created_at if coordinates else None,
        metrics=encode_metrics(metrics) if coordinates else {},
        tags=list(tags) if coordinates else [],
    )
