"""The commit: checking the fragments of one attempt and publishing its manifest (docs/format.md, section 8).

`check_summaries` and `check_layouts` decide and are pure; `publish_manifest` acts. Used by the coordinator of
a save, which knows the fragments from its writers' reports, and by recover, which reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dcp_ckpt.errors import (
    CommitUnknown,
    CorruptCheckpoint,
    SaveFailed,
    StorageError,
    StorageExists,
    StorageTransient,
)
from dcp_ckpt.format.boxes import Box, expand_ranks, tiling_problem
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.fragment import Fragment, TensorEntry, decode_fragment
from dcp_ckpt.format.joining import join_values
from dcp_ckpt.format.manifest import FragmentSummary, Manifest, decode_manifest, encode_manifest
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, fragment_name
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = ["check_layouts", "check_summaries", "parts_agree", "publish_manifest", "read_fragments"]

_TRIES = 3
_CONCURRENT_READS = 8


def check_summaries(summaries: Sequence[FragmentSummary]) -> str | None:
    """Why these summaries are not one complete attempt, or None when they are. Pure."""
    if not summaries:
        return "no fragments"
    first = summaries[0]
    ranks = {summary.rank for summary in summaries}
    missing = sorted(set(range(first.world_size)) - ranks)
    if missing:
        return f"rank(s) {', '.join(map(str, missing))} published no fragment"
    for summary in summaries:
        if summary.identity != first.identity:
            return f"rank {summary.rank} published a fragment of another attempt, step or world"
    differing = [summary.rank for summary in summaries if summary.replicated != first.replicated]
    if differing:
        return f"rank(s) {', '.join(map(str, differing))} hold other replicated state than rank 0"
    return _copies_problem(summaries)


def _copies_problem(summaries: Sequence[FragmentSummary]) -> str | None:
    """Why some ranks do not hold the same where they should."""
    held: dict[tuple[tuple[int, ...], ...], dict[int, str]] = {}
    for summary in summaries:
        for entry in summary.copies:
            held.setdefault(tuple(map(tuple, entry.ranks)), {})[summary.rank] = entry.digest
    for runs, digests in held.items():
        ranks = expand_ranks(runs)
        differing = [rank for rank in ranks if digests.get(rank) != digests.get(ranks[0])]
        if differing:
            shown = ", ".join(map(str, differing))
            return f"rank(s) {shown} hold other state of their part of the model than rank {ranks[0]}"
    return None


def parts_agree(summaries: Iterable[FragmentSummary]) -> bool:
    """Whether values that several ranks store parts of have in common what they must. Pure."""
    known: dict[str, str] = {}
    told = (item for summary in summaries for item in summary.joined.items())
    return all(known.setdefault(name, found) == found for name, found in told)


def check_layouts(fragments: Sequence[Fragment]) -> str | None:
    """Why the tables of all ranks do not make up tensors and values exactly, or None when they do. Pure."""
    tensors: dict[str, TensorEntry] = {}
    indexed_by: dict[str, int] = {}
    chunks: dict[str, list[Box]] = {}
    stored_by: dict[str, set[int]] = {}
    for fragment in fragments:
        tensors.update((entry.name, entry) for entry in fragment.tensors)
        for name in fragment.indexed_names:
            first = indexed_by.setdefault(name, fragment.rank)
            if first != fragment.rank:
                return (
                    f"{name} is described by rank {first} and by rank {fragment.rank}, which do not "
                    "share a mesh; MeshRoles says which ranks hold copies of a tensor, and which parts of a "
                    "model share one"
                )
        for chunk in fragment.chunks:
            chunks.setdefault(chunk.tensor, []).append(chunk.box)
            stored_by.setdefault(chunk.tensor, set()).add(fragment.rank)
    for name, ranks in stored_by.items():
        if name not in tensors:
            return f"rank(s) store {name}, which the lowest rank of its mesh does not have"
        if others := ranks.difference(expand_ranks(tensors[name].owners)):
            shown = ", ".join(map(str, sorted(others)))
            return f"{name}: rank(s) {shown} store parts of it, where readers will not look for them"
    for name, entry in tensors.items():
        problem = tiling_problem(entry.shape, chunks.get(name, ()))
        if problem:
            return (
                f"{name}: {problem}; do all ranks save the same model? Where they hold parts of it, "
                "MeshRoles(pipeline=...) says so"
            )
    try:
        join_values((fragment.rank, fragment.values) for fragment in fragments)
    except CorruptCheckpoint as error:
        return error.message
    return None


def read_fragments(
    storage: Storage, directory: StepDir, attempt: AttemptId, ranks: Sequence[int], sizes: Sequence[int]
) -> list[tuple[Fragment, bytes]]:
    """Read and decode fragments of one attempt, several at a time.

    Raises:
        StorageNotFound: one is missing.
        CorruptCheckpoint: one is damaged.
    """
    keys = [f"{directory}/{fragment_name(rank, attempt)}" for rank in ranks]
    found: dict[int, bytes] = {}
    storage.read_ranges(
        [ByteRange(key=key, offset=0, num_bytes=size) for key, size in zip(keys, sizes, strict=True)],
        lambda index, data: found.__setitem__(index, bytes(data)),
        concurrency=min(_CONCURRENT_READS, len(keys)),
    )
    return [(decode_fragment(found[index], path=key), found[index]) for index, key in enumerate(keys)]


def publish_manifest(storage: Storage, directory: StepDir | str, manifest: Manifest) -> None:
    """Make the checkpoint visible. Idempotent: publishing the same manifest again succeeds.

    Raises:
        SaveFailed: the name is taken by something else.
        CommitUnknown: the storage gave no answer; call again to learn.
        StorageError: the storage refused.
    """
    key = f"{directory}/{MANIFEST}"
    data = encode_manifest(manifest)
    unanswered: StorageError | None = None
    for _ in range(_TRIES):
        try:
            storage.create_exclusive(key, data)
            return
        except StorageExists:
            found = _read_found(storage, key, manifest)
            _require_same(found, data, manifest, key)
            if unanswered is not None and storage.capabilities.directories:
                # A directory that failed to sync once reports it once: what a second try says proves nothing.
                raise _unknown(manifest, key, unanswered) from unanswered
            return
        except StorageTransient as error:
            unanswered = error
        except StorageError as error:
            if unanswered is None:
                raise
            raise _unknown(manifest, key, error) from error
    assert unanswered is not None, "every other way out of the loop returned or raised"
    raise _unknown(manifest, key, unanswered) from unanswered


def _read_found(storage: Storage, key: str, manifest: Manifest) -> bytes:
    """What stands in the place of the manifest; it may be ours, so not knowing it is not a failure."""
    try:
        return storage.read(key)
    except StorageError as error:
        raise _unknown(manifest, key, error) from error


def _unknown(manifest: Manifest, key: str, error: StorageError) -> CommitUnknown:
    return CommitUnknown(
        f"the storage did not say whether the manifest is there and durable: {error.message}",
        step=manifest.step,
        phase="commit",
        path=key,
    )


def _require_same(found: bytes, data: bytes, manifest: Manifest, key: str) -> None:
    """Equal manifests mean that this attempt was committed already, by us or by whoever recovered it."""
    if found == data:
        return
    if is_tombstone(found, path=key):
        raise SaveFailed(
            "the attempt was removed before it was committed: another start has taken over this run",
            step=manifest.step,
            phase="commit",
            path=key,
        )
    other = decode_manifest(found, path=key)
    if (other.attempt, other.epoch_id, other.fragments) != (
        manifest.attempt,
        manifest.epoch_id,
        manifest.fragments,
    ):
        raise SaveFailed(
            f"the step was committed by another attempt, {other.attempt}",
            step=manifest.step,
            phase="commit",
            path=key,
        )
