"""Manifest and fragment: the same bytes each time, and whatever was changed is found."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dcp_ckpt.errors import CorruptCheckpoint, FormatTooNew
from dcp_ckpt.format.digests import BLOCK_BYTES, block_count, digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import (
    ChunkEntry,
    Fragment,
    decode_fragment,
    encode_fragment,
    layout_digest,
)
from dcp_ckpt.format.manifest import (
    FragmentSummary,
    Manifest,
    build_manifest,
    decode_manifest,
    encode_manifest,
    summarize,
)
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

RANKS = 3


@pytest.fixture
def step(tmp_path: Path) -> Path:
    write_tiny_checkpoint(
        open_storage(tmp_path), step=7, ranks=RANKS, metrics={"loss": 0.5, "acc": 1}, tags=["b", "a"]
    )
    return tmp_path / "step-00000007"


@pytest.fixture
def fragments(step: Path) -> list[tuple[Fragment, bytes]]:
    found = []
    for path in sorted(step.glob("rank-*.json")):
        data = path.read_bytes()
        found.append((decode_fragment(data, path=path.name), data))
    return found


@pytest.fixture
def summaries(fragments: list[tuple[Fragment, bytes]]) -> list[FragmentSummary]:
    return [summarize(fragment, data) for fragment, data in fragments]


@pytest.fixture
def fields(step: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((step / "manifest.json").read_bytes())
    return found


def signed(fields: dict[str, Any]) -> bytes:
    """A manifest whose own digest is right."""
    unsigned = {name: value for name, value in fields.items() if name != "digest"}
    return encode_json(unsigned | {"digest": digest(encode_json(unsigned))})


def test_a_manifest_is_a_function_of_the_fragments(step, summaries):
    again = [msgspec.convert(msgspec.to_builtins(summary), FragmentSummary) for summary in summaries]
    shuffled = [replace(summary, metrics=dict(reversed(summary.metrics.items()))) for summary in again]
    data = encode_manifest(build_manifest(summaries))
    assert encode_manifest(build_manifest(again)) == data
    assert encode_manifest(build_manifest(shuffled)) == data
    assert (step / "manifest.json").read_bytes() == data


def test_a_manifest_holds_what_is_needed_to_find_and_check_everything(step, summaries):
    manifest = decode_manifest((step / "manifest.json").read_bytes(), path="m")
    assert manifest == build_manifest(summaries)
    assert (manifest.order, manifest.world_size, str(manifest.attempt_id)) == ((1, 7), RANKS, "e0001-s000001")
    assert (manifest.metrics, manifest.tags) == ({"loss": 0.5, "acc": 1}, ["b", "a"])
    assert manifest.index == [[0, 1]]
    sizes = [path.stat().st_size for path in sorted(step.glob("__*.distcp"))]
    assert [ref.file_bytes for ref in manifest.fragments] == [[size] for size in sizes]
    assert manifest.total_bytes == sum(sizes)


def test_summaries_that_are_not_one_attempt_make_no_manifest(summaries):
    for wrong in (summaries[1:], summaries[:2], [*reversed(summaries)], [*summaries, summaries[0]]):
        with pytest.raises(ValueError, match="ranks"):
            build_manifest(wrong)
    for change in ({"step": 8}, {"epoch_id": "0" * 32}, {"run_id": "0" * 32}, {"attempt": "e0001-s000002"}):
        with pytest.raises(ValueError, match="not of one attempt"):
            build_manifest([summaries[0], replace(summaries[1], **change), summaries[2]])
    with pytest.raises(ValueError, match="created_at"):
        build_manifest([replace(summaries[0], created_at=None), *summaries[1:]])


@pytest.mark.parametrize(
    "name", sorted(set(Manifest.__annotations__) - {"format", "format_version"})
)  # fmt: skip
def test_a_changed_field_is_found(fields, name):
    changed = copy.deepcopy(fields)
    value = changed[name]
    if isinstance(value, int):
        changed[name] = value + 1
    elif isinstance(value, str):
        changed[name] = ("0" if value[0] != "0" else "1") + value[1:]
    elif isinstance(value, dict):
        changed[name] = {**value, "more": 1}
    else:
        changed[name] = [*value, value[0]]
    with pytest.raises(CorruptCheckpoint, match="damaged") as caught:
        decode_manifest(encode_json(changed), path="the/manifest")
    assert caught.value.path == "the/manifest"


def test_every_byte_of_a_manifest_counts(step):
    data = (step / "manifest.json").read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises((CorruptCheckpoint, FormatTooNew)):
            decode_manifest(bytes(changed), path="m")
    for length in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptCheckpoint):
            decode_manifest(data[:length], path="m")


def test_an_unknown_field_is_ignored_and_digested(fields):
    data = signed(fields | {"from_the_future": [1, 2]})
    assert decode_manifest(data, path="m").step == 7
    with pytest.raises(CorruptCheckpoint, match="changed after it was written"):
        decode_manifest(data.replace(b"[1,2]", b"[1,3]"), path="m")


def test_another_version_and_another_document_are_told_apart(fields):
    with pytest.raises(FormatTooNew, match=r"format version 2, .* up to 1: upgrade"):
        decode_manifest(signed(fields | {"format_version": 2, "fragments": "otherwise"}), path="m")
    with pytest.raises(CorruptCheckpoint, match=r"not a dcp_ckpt\.manifest document"):
        decode_manifest(signed(fields | {"format": "dcp_ckpt.fragment"}), path="m")
    missing = {name: value for name, value in fields.items() if name != "tags"}
    with pytest.raises(CorruptCheckpoint, match="tags"):
        decode_manifest(signed(missing), path="m")
    with pytest.raises(CorruptCheckpoint, match="step"):
        decode_manifest(signed(fields | {"step": "7"}), path="m")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"attempt": "../../etc"}, "is not an attempt id"),
        ({"epoch": 2}, "is not of epoch 2"),
        ({"world_size": 2}, "3 fragments for a world of 2"),
        ({"fragments": [], "world_size": 0}, "0 fragments"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_damaged(fields, change, problem):
    with pytest.raises(CorruptCheckpoint, match=problem):
        decode_manifest(signed(fields | change), path="m")


def test_a_fragment_comes_back_as_it_was(fragments):
    for fragment, data in fragments:
        assert encode_fragment(fragment) == data
        assert decode_fragment(encode_fragment(fragment), path="f") == fragment
        assert str(fragment.attempt_id) == fragment.attempt


def test_a_fragment_that_contradicts_itself_is_damaged(fragments):
    fragment: Fragment = fragments[0][0]
    (file,) = fragment.files
    chunk = fragment.chunks[0]

    def with_chunks(*chunks: ChunkEntry) -> Fragment:
        layout = layout_digest(fragment.meshes, fragment.tensors, list(chunks))
        return replace(fragment, chunks=list(chunks), layout=layout)

    for wrong, problem in (
        (replace(fragment, attempt="e1"), "is not an attempt id"),
        (replace(fragment, byte_order="big"), "byte_order: 'big'"),
        (replace(fragment, rank=RANKS), f"rank: {RANKS} of {RANKS}"),
        (replace(fragment, rank=-1), r">= 0 - at `\$\.rank`"),
        (
            replace(fragment, files=[replace(file, size_bytes=file.size_bytes + BLOCK_BYTES)]),
            "not the digests",
        ),
        (replace(fragment, files=[replace(file, block_digests="")]), "not the digests"),
        (replace(fragment, layout="0" * 32), "layout digest differs"),
        (replace(fragment, chunks=fragment.chunks[1:]), "layout digest differs"),
        (with_chunks(replace(chunk, file=1)), "is in file 1"),
        (with_chunks(replace(chunk, offsets=[-1, 0])), r">= 0 - at `\$\.chunks\[0\]\.offsets\[0\]`"),
        (with_chunks(replace(chunk, payload_offset=-1)), r">= 0 - at `\$\.chunks\[0\]\.payload_offset`"),
    ):
        with pytest.raises(CorruptCheckpoint, match=problem):
            decode_fragment(encode_fragment(wrong), path="f")


def test_a_fragment_of_another_version_is_too_new(fragments):
    with pytest.raises(FormatTooNew, match="format version 9"):
        decode_fragment(encode_fragment(replace(fragments[0][0], format_version=9)), path="f")


def test_digests_are_those_of_the_specification():
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert len(digest(b"x")) == 32
    assert [block_count(size) for size in (0, 1, BLOCK_BYTES, BLOCK_BYTES + 1)] == [0, 1, 1, 2]
