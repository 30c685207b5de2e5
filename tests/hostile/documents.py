"""What the tests of hostile input share: valid documents, places in them, and what to put there instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json

Pointer = tuple[str | int, ...]

HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, 1e300, -0.0,
    "", "x", "..", "../../etc/passwd", "/etc/passwd", "a\\b", "a\0b", "\u2028", "9" * 5000, "e0001-s000001",
    "e" + "9" * 4000 + "-s000001", "0" * 32, "$int", [], [[]], [0], [-1], [[0, 2**60]], [[2**62, 2**62]],
    [[0, 1], [0, 1]], [2**60, 2**60], {}, {"$int": "1"}, {"$tensor": "x"}, {"$ndarray": ["<f4", [2**60], ""]},
    {"$bytes": "!"}, {"$new": 1}, ["float32"], "S0", "S9", "S0/0", "R", "float99",
]  # fmt: skip


def pointers(value: Any, at: Pointer = ()) -> Iterator[Pointer]:
    """The place of everything in a document, the document itself first."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from pointers(item, (*at, key))


def replaced(document: Any, at: Pointer, value: Any) -> Any:
    """A copy with `value` in one place."""
    if not at:
        return value
    result = copy.deepcopy(document)
    parent = result
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    return result


def removed(document: Any, at: Pointer) -> Any:
    """A copy without one place."""
    result = copy.deepcopy(document)
    parent = result
    for key in at[:-1]:
        parent = parent[key]
    del parent[at[-1]]
    return result


def signed_manifest(fields: Any) -> Any:
    """With its own digest made right again, so that what follows the digest is looked at, too."""
    if not isinstance(fields, dict):
        return fields
    unsigned = {name: value for name, value in fields.items() if name != "digest"}
    return unsigned | {"digest": digest(encode_json(unsigned))}


def signed_fragment(fields: Any) -> Any:
    """With the digest of its tables made right again."""
    if not isinstance(fields, dict) or not {"meshes", "tensors", "chunks"} <= fields.keys():
        return fields
    return fields | {"layout": digest(encode_json([fields["meshes"], fields["tensors"], fields["chunks"]]))}


def mutations(document: Any, sign: Callable[[Any], Any]) -> st.SearchStrategy[bytes]:
    """Bytes near a valid document: places replaced or taken out, then bytes flipped, spliced and cut off."""
    places = st.sampled_from(list(pointers(document)))

    @st.composite
    def mutated(draw: st.DrawFn) -> bytes:
        result = document
        at: Pointer = draw(places)
        is_removed = bool(at) and draw(st.booleans())
        if is_removed:
            result = removed(result, at)
        else:
            result = replaced(result, at, draw(st.sampled_from(HOSTILE_VALUES)))
        if draw(st.booleans()):
            result = sign(result)
        return encode_json(result)

    @st.composite
    def bent(draw: st.DrawFn) -> bytes:
        data = bytearray(encode_json(document))
        for _ in range(draw(st.integers(1, 3))):
            position = draw(st.integers(0, max(len(data) - 1, 0)))
            change = draw(st.sampled_from(["flip", "splice", "cut", "repeat"]))
            if change == "flip" and data:
                data[position] ^= 1 << draw(st.integers(0, 7))
            elif change == "splice":
                data[position:position] = draw(st.binary(max_size=8))
            elif change == "cut":
                del data[position : position + draw(st.integers(1, 40))]
            else:
                data[position:position] = data[position : position + draw(st.integers(1, 60))]
        return bytes(data)

    return mutated() | bent()
