"""A run of many checkpoints, of which there are the manifests only: all that a listing reads.

For measuring and testing catalogues. Written without fsync, since nothing is lost with it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.manifest import FragmentRef, FragmentSummary, Manifest, build_manifest, encode_manifest
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.storage import open_storage

__all__ = ["write_manifests"]


def write_manifests(path: str | os.PathLike[str], *, steps: range, world_size: int) -> None:
    """Make a run whose checkpoints are of these steps, each with its step as the metric `loss`."""
    storage = open_storage(path)
    try:
        run_id = ensure_run(storage).run_id
    finally:
        storage.close()
    for step in steps:
        directory = Path(path, str(StepDir(step)))
        directory.mkdir()
        manifest = _manifest(run_id, step, world_size)
        Path(directory, MANIFEST).write_bytes(encode_manifest(manifest))


def _manifest(run_id: str, step: int, world_size: int) -> Manifest:
    first = FragmentSummary(
        run_id=run_id,
        epoch=1,
        epoch_id="1" * 32,
        attempt=str(AttemptId(1, step)),
        step=step,
        rank=0,
        world_size=world_size,
        ref=FragmentRef(size_bytes=10_000 + step, digest="", file_bytes=[1 << 27]),
        layout="2" * 32,
        aliases="3" * 32,
        replicated="4" * 32,
        copies=[],
        joined={},
        created_at="2026-01-01T00:00:00.000000Z",
        metrics={"loss": step},
        tags=[],
        indexes=True,
    )
    summaries = [
        replace(
            first,
            rank=rank,
            ref=replace(first.ref, digest=digest(f"{step}/{rank}".encode())),
            indexes=rank == 0,
        )
        for rank in range(world_size)
    ]
    return build_manifest(summaries)
