"""Ways in which a step directory gets damaged, each with the file that has to be named for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import (
    CopiesEntry,
    Fragment,
    ValueEntry,
    decode_fragment,
    encode_fragment,
    layout_digest,
)
from dcp_ckpt.format.manifest import FragmentRef
from tests.hostile.documents import signed_manifest

ATTEMPT = "e0001-s000001"
MANIFEST = "manifest.json"
DATA = tuple(f"__{rank}_0.{ATTEMPT}.distcp" for rank in (0, 1))
FRAGMENT = tuple(f"rank-0000{rank}.{ATTEMPT}.json" for rank in (0, 1))


@dataclass(frozen=True)
class Damage:
    """One way; `names` is in the message of whoever finds it."""

    act: Callable[[Path], None]
    names: str


def flip(file: str, offset: int) -> Callable[[Path], None]:
    """Another bit at `offset`, counted from the end if negative."""

    def act(step: Path) -> None:
        data = bytearray((step / file).read_bytes())
        data[offset] ^= 4
        (step / file).write_bytes(data)

    return act


def payload_of(step: Path, rank: int, tensor: str) -> int:
    fragment = fragment_of(step, rank)
    return next(chunk.payload_offset for chunk in fragment.chunks if chunk.tensor == tensor)


def flip_payload(rank: int, tensor: str) -> Callable[[Path], None]:
    return lambda step: flip(DATA[rank], payload_of(step, rank, tensor) + 1)(step)


def flip_value_container(step: Path) -> None:
    offset = fragment_of(step, 0).values["optim.lr"].container_offset
    assert offset is not None
    flip(DATA[0], offset + 40)(step)


def cut(file: str, keep_bytes: int) -> Callable[[Path], None]:
    return lambda step: os.truncate(step / file, keep_bytes)


def swap(one: str, other: str) -> Callable[[Path], None]:
    def act(step: Path) -> None:
        (step / one).rename(step / "aside")
        (step / other).rename(step / one)
        (step / "aside").rename(step / other)

    return act


def become(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def act(step: Path) -> None:
        (step / file).unlink()
        make(step / file)

    return act


def rename(file: str, name: str) -> Callable[[Path], None]:
    def act(step: Path) -> None:
        (step / file).rename(step / name)

    return act


def link_outside(path: Path) -> None:
    """To a file that is whole, and none of ours."""
    outside = path.parent.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    target = outside / path.name
    target.write_bytes(b"outside")
    path.symlink_to(target)


def fragment_of(step: Path, rank: int) -> Fragment:
    return decode_fragment((step / FRAGMENT[rank]).read_bytes(), path=FRAGMENT[rank])


def manifest_fields(step: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((step / MANIFEST).read_bytes())
    return found


def edit_manifest(*, sign: bool, **changes: Any) -> Callable[[Path], None]:
    """Fields changed, with the digest made right or not."""

    def act(step: Path) -> None:
        fields = manifest_fields(step) | changes
        (step / MANIFEST).write_bytes(encode_json(signed_manifest(fields) if sign else fields))

    return act


def edit_listed(rank: int, **changes: Any) -> Callable[[Path], None]:
    """What a manifest with a right digest says of one fragment."""

    def act(step: Path) -> None:
        fragments = manifest_fields(step)["fragments"]
        fragments[rank] |= changes
        edit_manifest(sign=True, fragments=fragments)(step)

    return act


def edit_fragment(rank: int, change: Callable[[Fragment], Fragment], *, sign: bool) -> Callable[[Path], None]:
    """One fragment changed, with all digests up to the manifest's made right or not."""

    def act(step: Path) -> None:
        changed = change(fragment_of(step, rank))
        changed = replace(changed, layout=layout_digest(changed.meshes, changed.tensors, changed.chunks))
        data = encode_fragment(changed)
        (step / FRAGMENT[rank]).write_bytes(data)
        if sign:
            edit_listed(rank, **msgspec.to_builtins(FragmentRef.of(changed, data)))(step)

    return act


def with_chunk(**changes: Any) -> Callable[[Fragment], Fragment]:
    return lambda fragment: replace(
        fragment, chunks=[replace(fragment.chunks[0], **changes), *fragment.chunks[1:]]
    )


def with_tensor(**changes: Any) -> Callable[[Fragment], Fragment]:
    return lambda fragment: replace(
        fragment, tensors=[replace(fragment.tensors[0], **changes), *fragment.tensors[1:]]
    )


def one_byte_further(fragment: Fragment) -> Fragment:
    """The payload reaches out of its container."""
    chunk = fragment.chunks[0]
    return with_chunk(payload_offset=chunk.container_offset + chunk.container_bytes - 8)(fragment)


def at_an_odd_place(fragment: Fragment) -> Fragment:
    """An element would lie across the end of a block."""
    return with_chunk(payload_offset=fragment.chunks[0].payload_offset - 1)(fragment)


def half_and_nothing(fragment: Fragment) -> Fragment:
    """One half of the rows, and in the place of the other a chunk without rows."""
    chunk = fragment.chunks[0]
    rows = chunk.sizes[0] // 2
    half = replace(chunk, sizes=[rows, *chunk.sizes[1:]], container_bytes=chunk.container_bytes - 4096)
    start = chunk.container_offset + half.container_bytes
    empty = replace(half, container_offset=start, payload_offset=start, container_bytes=4096)
    empty = replace(empty, sizes=[0, *chunk.sizes[1:]])
    return replace(fragment, chunks=[half, empty, *fragment.chunks[1:]])


def with_value(encoded: Any) -> Callable[[Fragment], Fragment]:
    return lambda fragment: replace(
        fragment,
        values=fragment.values | {"optim.lr": replace(fragment.values["optim.lr"], value=encoded)},
    )


def store_again(step: Path) -> None:
    """Rank 1 stores a value that rank 0 has, with another number."""
    again = ValueEntry(path=["optim", "lr"], value=9.5)
    edit_fragment(1, lambda fragment: replace(fragment, values={"optim.lr": again}), sign=True)(step)
    edit_manifest(sign=True, index=[[0, 2]])(step)


def append(file: str, data: bytes) -> Callable[[Path], None]:
    def act(step: Path) -> None:
        with open(step / file, "ab") as stream:
            stream.write(data)

    return act


BYTES = {
    "a bit of a payload": Damage(flip_payload(0, "model.weight"), DATA[0]),
    "a bit of a small tensor": Damage(flip_payload(0, "model.bias"), DATA[0]),
    "a bit of another rank's payload": Damage(flip_payload(1, "model.weight"), DATA[1]),
    "a bit of the framing": Damage(flip(DATA[0], 10), DATA[0]),
    "a bit of a value for stock readers": Damage(flip_value_container, DATA[0]),
    "a bit of the padding": Damage(flip(DATA[0], -1), DATA[0]),
    "a truncated file": Damage(cut(DATA[1], 1 << 20), DATA[1]),
    "a file that lacks one byte": Damage(
        lambda step: os.truncate(step / DATA[1], (step / DATA[1]).stat().st_size - 1), DATA[1]
    ),
    "an empty file": Damage(cut(DATA[0], 0), DATA[0]),
    "a missing file": Damage(lambda step: (step / DATA[1]).unlink(), DATA[1]),
    "swapped files": Damage(swap(*DATA), DATA[0]),
    "a file of another attempt": Damage(rename(DATA[1], DATA[1].replace("s000001", "s000002")), DATA[1]),
    "a directory for a file": Damage(become(DATA[1], Path.mkdir), DATA[1]),
    "a link for a file": Damage(become(DATA[1], link_outside), DATA[1]),
    "a link to nowhere": Damage(become(DATA[1], lambda path: path.symlink_to("nowhere")), DATA[1]),
    "a pipe for a file": Damage(become(DATA[1], os.mkfifo), DATA[1]),
    "a bit of a fragment": Damage(flip(FRAGMENT[1], 99), FRAGMENT[1]),
    "a truncated fragment": Damage(cut(FRAGMENT[1], 100), FRAGMENT[1]),
    "an empty fragment": Damage(cut(FRAGMENT[0], 0), FRAGMENT[0]),
    "a missing fragment": Damage(lambda step: (step / FRAGMENT[0]).unlink(), FRAGMENT[0]),
    "swapped fragments": Damage(swap(*FRAGMENT), FRAGMENT[0]),
    "a directory for a fragment": Damage(become(FRAGMENT[0], Path.mkdir), FRAGMENT[0]),
    "a link for a fragment": Damage(become(FRAGMENT[1], link_outside), FRAGMENT[1]),
    "an edited fragment": Damage(
        edit_fragment(1, lambda one: replace(one, replicated="0" * 32), sign=False), FRAGMENT[1]
    ),
}
"""What verify finds as well: bytes are not those that were written."""

TABLES = {
    "a chunk outside of its container": Damage(edit_fragment(1, one_byte_further, sign=True), FRAGMENT[1]),
    "a chunk at an odd place": Damage(edit_fragment(1, at_an_odd_place, sign=True), FRAGMENT[1]),
    "a chunk outside of its file": Damage(
        edit_fragment(1, with_chunk(payload_offset=1 << 40, container_offset=1 << 40), sign=True), FRAGMENT[1]
    ),
    "a chunk of 2^60 rows": Damage(edit_fragment(1, with_chunk(sizes=[2**60, 600]), sign=True), FRAGMENT[1]),
    "a chunk outside of its tensor": Damage(
        edit_fragment(1, with_chunk(offsets=[501, 0]), sign=True), FRAGMENT[1]
    ),
    "a chunk of other dimensions": Damage(
        edit_fragment(1, with_chunk(offsets=[0], sizes=[600]), sign=True), FRAGMENT[1]
    ),
    "chunks that overlap": Damage(edit_fragment(1, with_chunk(offsets=[0, 0]), sign=True), "model.weight"),
    "chunks with a gap": Damage(edit_fragment(1, half_and_nothing, sign=True), "model.weight"),
    "an unknown dtype": Damage(edit_fragment(0, with_tensor(dtype="float99"), sign=True), FRAGMENT[0]),
    "a mesh that is not there": Damage(edit_fragment(0, with_tensor(mesh=7), sign=True), FRAGMENT[0]),
    "owners of no world": Damage(edit_fragment(0, with_tensor(owners=[[0, 2**60]]), sign=True), FRAGMENT[0]),
    "copies in no world": Damage(
        edit_fragment(
            1,
            lambda one: replace(one, copies=[CopiesEntry(ranks=[[0, 2**60]], digest="0" * 32)]),
            sign=True,
        ),
        FRAGMENT[1],
    ),
    "a value of two ranks": Damage(store_again, "optim.lr"),
    "an ill-formed value": Damage(edit_fragment(0, with_value({"$int": "x"}), sign=True), "optim.lr"),
    "a value with an unknown tag": Damage(edit_fragment(0, with_value({"$new": 1}), sign=True), "optim.lr"),
    "another fragment's digest": Damage(edit_listed(1, digest="0" * 32), FRAGMENT[1]),
    "a fragment of 2^60 bytes": Damage(edit_listed(1, size_bytes=2**60), FRAGMENT[1]),
    "other sizes of files": Damage(edit_listed(1, file_bytes=[5]), FRAGMENT[1]),
}
"""What somebody wrote on purpose: all digests are right, and the tables make no sense."""

MANIFESTS = {
    "a bit of the manifest": Damage(flip(MANIFEST, 50), MANIFEST),
    "an edited manifest": Damage(edit_manifest(sign=False, world_size=1), MANIFEST),
    "another step's manifest": Damage(edit_manifest(sign=True, step=21), MANIFEST),
    "another run's manifest": Damage(edit_manifest(sign=True, run_id="f" * 32), MANIFEST),
    "an index of 2^60 ranks": Damage(edit_manifest(sign=True, index=[[0, 2**60]]), MANIFEST),
    "an attempt that is a path": Damage(edit_manifest(sign=True, attempt="../../../x"), MANIFEST),
    "an empty manifest": Damage(cut(MANIFEST, 0), MANIFEST),
    "a directory for the manifest": Damage(become(MANIFEST, Path.mkdir), MANIFEST),
    "a link for the manifest": Damage(become(MANIFEST, link_outside), MANIFEST),
    "a pipe for the manifest": Damage(become(MANIFEST, os.mkfifo), MANIFEST),
}
"""What keeps the directory from being a checkpoint at all: nobody removes it, and nobody loads it."""
