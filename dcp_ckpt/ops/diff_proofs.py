"""Which tensors of two checkpoints are known to be equal by their digests, without reading them. Pure.

Two proofs are known for two chunks of one box and dtype. Their payload digests, where saves with reuse wrote
some. And the digests of the blocks that they lie in, where they lie alike in them, as in two saves of one
layout, or in one shared file. Called by `ops.diff`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dcp_ckpt.format.digests import BLOCK_BYTES, DIGEST_DIGITS
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.format.fragment import ChunkEntry, Fragment

__all__ = ["Proofs", "are_equal", "proofs_of"]

_Place = tuple[tuple[int, ...], tuple[int, ...]]
Proofs = Mapping[_Place, frozenset[str]]
"""Of one tensor: for each of its chunks what can prove that another one has the same bytes."""


def proofs_of(fragments: Iterable[Fragment], dtypes: Mapping[str, str]) -> dict[str, Proofs]:
    """The proofs of all tensors by name.

    Args:
        dtypes: of all tensors.
    """
    found: dict[str, dict[_Place, frozenset[str]]] = {}
    for fragment in fragments:
        for number, chunk in enumerate(fragment.chunks):
            place = (tuple(chunk.offsets), tuple(chunk.sizes))
            proofs = frozenset(_proofs(fragment, number, chunk, DTYPES[dtypes[chunk.tensor]].item_bytes))
            found.setdefault(chunk.tensor, {})[place] = proofs
    return dict(found)


def are_equal(ours: Proofs, theirs: Proofs) -> bool:
    """Whether the proofs say that two tensors of one dtype and shape are equal; if not, they may still be."""
    if not ours or ours.keys() != theirs.keys():
        return False
    return all(proofs & theirs[place] for place, proofs in ours.items())


def _proofs(fragment: Fragment, number: int, chunk: ChunkEntry, item_bytes: int) -> Iterator[str]:
    if fragment.payload_digests:
        yield fragment.payload_digests[number * DIGEST_DIGITS : (number + 1) * DIGEST_DIGITS]
    stop = chunk.payload_offset + chunk.box.num_elements * item_bytes
    first, past = chunk.payload_offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
    blocks = fragment.files[chunk.file].block_digests[first * DIGEST_DIGITS : past * DIGEST_DIGITS]
    yield f"{chunk.payload_offset % BLOCK_BYTES} {blocks}"
