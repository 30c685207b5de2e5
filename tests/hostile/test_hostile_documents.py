"""Documents that nobody of ours wrote: each is read, or refused by an error that names field and file."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_ckpt import open_checkpoint, verify
from dcp_ckpt.errors import CorruptCheckpoint, FormatTooNew, LoadError
from dcp_ckpt.format.documents import decode_document, encode_json
from dcp_ckpt.format.epoch import (
    RESUMED_FORMAT,
    TOMBSTONE_FORMAT,
    EpochClaim,
    Resumed,
    Tombstone,
    decode_epoch,
    is_tombstone,
)
from dcp_ckpt.format.fragment import (
    FileOrigin,
    Fragment,
    decode_fragment,
    encode_fragment,
    layout_digest,
)
from dcp_ckpt.format.manifest import FragmentRef, decode_manifest
from dcp_ckpt.format.names import MANIFEST
from dcp_ckpt.format.values import decode_value, encode_value
from dcp_ckpt.lifecycle.marks import MARK_FORMAT, Mark
from dcp_ckpt.lifecycle.runs import RUN_FORMAT, RunDocument, ensure_run
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.hostile.documents import (
    HOSTILE_VALUES,
    Pointer,
    mutations,
    pointers,
    removed,
    replaced,
    signed_fragment,
    signed_manifest,
)

PATH = "run/the-file"
STEP = "step-00000007"
SHARED = {"directory": "step-00000003", "attempt": "e0001-s000000", "file": 0}


@dataclass(frozen=True)
class Kind:
    """One kind of document: a valid one, and how it is read."""

    fields: dict[str, Any]
    decode: Callable[[bytes], Any]
    sign: Callable[[Any], Any] = lambda fields: fields


def _tiny() -> MemoryStorage:
    storage = MemoryStorage()
    ensure_run(storage)
    write_tiny_checkpoint(storage, step=7, ranks=2, metrics={"loss": 0.5, "steps": 2**60}, tags=["a"])
    return storage


def _fields(storage: MemoryStorage, key: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(storage.read(key))
    return found


def _kinds() -> dict[str, Kind]:
    storage = _tiny()
    claim = EpochClaim(
        run_id="1" * 32,
        epoch=3,
        epoch_id="2" * 32,
        world_size=2,
        host="h",
        pid=5,
        created_at="t",
        purpose="train",
    )
    mark = Mark(
        kind="bad",
        epoch=1,
        step=7,
        attempt="e0001-s000001",
        created_at="t",
        detail={"reason": "r"},
        cancels=["a"],
    )
    others = [
        ("resumed", Resumed(epoch=3, directory=STEP, resumed_epoch=2, step=7), Resumed, RESUMED_FORMAT),
        ("tombstone", Tombstone(by_epoch=3, attempt=""), Tombstone, TOMBSTONE_FORMAT),
        ("mark", mark, Mark, MARK_FORMAT),
    ]

    def reader(kind: type[Any], format: str) -> Callable[[bytes], Any]:
        return lambda data: decode_document(data, kind, format=format, path=PATH)

    kinds = {
        "manifest": Kind(
            _fields(storage, f"{STEP}/{MANIFEST}"),
            lambda data: decode_manifest(data, path=PATH),
            signed_manifest,
        ),
        "epoch": Kind(msgspec.to_builtins(claim), lambda data: decode_epoch(data, path=PATH)),
        "run": Kind(_fields(storage, "run.json"), reader(RunDocument, RUN_FORMAT)),
    }
    for rank in (0, 1):
        key = f"{STEP}/rank-0000{rank}.e0001-s000001.json"
        kinds[f"fragment {rank}"] = Kind(
            _fields(storage, key), lambda data: decode_fragment(data, path=PATH), signed_fragment
        )
    kinds["fragment 0"].fields["aliases"] = {"model.bias": [["model", "tied"], ["again"]]}
    sharing = kinds["fragment 1"].fields
    sharing = replaced(sharing, ("files", 0, "origin"), SHARED)
    sharing["payload_digests"] = "0123456789abcdef" * 2 * len(sharing["chunks"])
    kinds["fragment that shares"] = replace(kinds["fragment 1"], fields=sharing)
    for name, document, kind, format in others:
        kinds[name] = Kind(msgspec.to_builtins(document), reader(kind, format))
    return kinds


KINDS = _kinds()
KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def refused(kind: Kind, data: bytes, *, match: str | None = None) -> str:
    """The message of the error, which has to be one of damage and to name the file."""
    with pytest.raises(CorruptCheckpoint, match=match) as caught:
        kind.decode(data)
    assert caught.value.path == PATH
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def read_or_refused(kind: Kind, data: bytes) -> None:
    """The property: what is read means what was written, and all else is an error of ours."""
    document, failure = None, None
    try:
        document = kind.decode(data)
    except LoadError as error:
        failure = error
    if failure is not None:
        assert failure.path == PATH
        assert len(str(failure)) < 2000
    else:
        assert kind.decode(encode_json(document)) == document


@KIND
def test_the_document_itself_is_read(kind):
    document = kind.decode(encode_json(kind.fields))
    assert msgspec.to_builtins(document).items() <= {**kind.fields, "id": ""}.items()


@KIND
def test_every_value_in_every_place_is_read_or_refused(kind):
    for at in pointers(kind.fields):
        for value in HOSTILE_VALUES:
            read_or_refused(kind, encode_json(kind.sign(replaced(kind.fields, at, value))))


@KIND
def test_a_wrong_type_is_refused_by_the_name_of_the_field(kind):
    for name, value in kind.fields.items():
        for wrong in (True, 1.5, "x", [None], {"x": None}):
            if type(wrong) is type(value) or (name, type(value)) in (("config", dict), ("detail", dict)):
                continue
            if value is None and isinstance(wrong, str | dict):
                continue
            message = refused(kind, encode_json(replaced(kind.fields, (name,), wrong)))
            assert f"$.{name}" in message or name == "format"


@KIND
def test_numbers_out_of_range_are_refused_by_the_name_of_the_field(kind):
    numbers = [
        at for at in pointers(kind.fields) if type(found_at(kind.fields, at)) is int and not is_free(at)
    ]
    assert numbers
    for at in numbers:
        for wrong in (-1, 2**63, 2**64, 1.0, True, "1", None):
            if wrong is None and at[-1] in ("mesh", "container_offset", "container_bytes"):
                continue
            if at == ("format_version",) and wrong in (2**63, 2**64):
                continue
            data = json.dumps(replaced(kind.fields, at, wrong)).encode()
            message = refused(kind, data)
            last = [part for part in at if isinstance(part, str)][-1]
            assert last in message
        data = json.dumps(replaced(kind.fields, at, 10**400)).encode()
        if at != ("format_version",):
            refused(kind, data)


def is_free(at: Pointer) -> bool:
    """Whether this is in a part of a document that holds what users gave."""
    return any(part in ("metrics", "values", "per_rank", "config", "git", "detail") for part in at)


def found_at(document: Any, at: Pointer) -> Any:
    for key in at:
        document = document[key]
    return document


@KIND
def test_a_missing_field_is_refused_by_its_name(kind):
    optional = {"aliases", "metrics", "tags", "created_at", "byte_order", "detail", "cancels", "id"}
    optional |= {"command", "copies", "payload_digests"}
    for name in kind.fields.keys() - optional:
        message = refused(kind, encode_json(removed(kind.fields, (name,))))
        assert name in message


@KIND
def test_a_field_that_is_there_twice_is_refused_by_its_name(kind):
    data = encode_json(kind.fields)
    for name, value in kind.fields.items():
        again = encode_json({name: value})[1:]
        refused(kind, data[:-1] + b"," + again, match=f"{name}' is there twice")
    hidden = encode_json(kind.fields | {"new": {"a": 1}}).replace(b'{"a":1}', b'{"a":1,"a":2}')
    refused(kind, hidden, match="'a' is there twice")


@KIND
def test_bytes_that_are_no_json_are_refused(kind):
    data = encode_json(kind.fields)
    assert b'"format":"' in data
    cases = {
        "empty": b"",
        "white space": b" \n",
        "garbage": b"\x00\xff" * 20,
        "cut": data[: len(data) // 2],
        "one short": data[:-1],
        "more": data + b"x",
        "twice": data + data,
        "byte order mark": b"\xef\xbb\xbf" + data,
        "utf-16": data.decode().encode("utf-16"),
        "list": b"[" + data + b"]",
        "NaN": data[:-1] + b',"new":NaN}',
        "Infinity": data[:-1] + b',"new":-Infinity}',
        "too large": data[:-1] + b',"new":1e999}',
        "lone surrogate": data[:-1] + b',"new":"\\ud800"}',
        "lone surrogate in a name": data[:-1] + b',"\\udc00":1}',
        "wrong utf-8": data[:-1] + b',"new":"\xff"}',
        "wrong utf-8 in a name": data[:-1] + b',"\xc0\x80":1}',
        "wrong utf-8 in a field": data.replace(b'"format":"', b'"format":"\xff'),
        "single quotes": data.replace(b'"', b"'"),
        "comment": data + b"//",
        "deep list": data[:-1] + b',"new":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        "deeper list": data[:-1] + b',"new":' + b"[" * 1_000_000,
        "deep object": data[:-1] + b',"new":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
    }
    for case, wrong in cases.items():
        with pytest.raises(CorruptCheckpoint) as caught:
            kind.decode(wrong)
        assert caught.value.path == PATH, case


@KIND
def test_versions_are_told_apart_from_damage(kind):
    for newer in (2, 99, 2**63, 2**64, 10**400):
        data = json.dumps(replaced(kind.fields, ("format_version",), newer)).encode()
        with pytest.raises(FormatTooNew, match="upgrade dcp_ckpt") as caught:
            kind.decode(data)
        assert (caught.value.path, len(str(caught.value)) < 300) == (PATH, True)
        # Nothing else of it is looked at: it may mean anything.
        with pytest.raises(FormatTooNew):
            kind.decode(
                b'{"format":"%s","format_version":%s,"new":[]}' % (kind.fields["format"].encode(), b"2")
            )
    for older in (0, -1, -(2**70)):
        data = json.dumps(replaced(kind.fields, ("format_version",), older)).encode()
        refused(kind, data, match="format_version")
    for wrong in ("2", 2.0, None, [2], True):
        refused(kind, encode_json(replaced(kind.fields, ("format_version",), wrong)), match="format_version")


@KIND
def test_a_document_of_another_kind_is_refused(kind):
    for other in KINDS.values():
        if other.fields["format"] != kind.fields["format"]:
            refused(kind, encode_json(other.fields), match="not a dcp_ckpt")


@pytest.mark.parametrize("name", KINDS)
def test_fuzzed_documents_are_read_or_refused(name):
    kind = KINDS[name]

    @settings(max_examples=80)
    @given(mutations(kind.fields, kind.sign) | st.binary(max_size=60))
    def check(data: bytes) -> None:
        read_or_refused(kind, data)
        is_tombstone(data, path=PATH)

    check()


def test_what_a_fragment_says_of_itself_has_to_fit_together():
    fragment = decode_fragment(encode_json(KINDS["fragment 0"].fields), path=PATH)
    weight, bias, *_ = fragment.tensors
    chunk = fragment.chunks[0]
    (file,) = fragment.files
    mesh = fragment.meshes[0]
    lr = fragment.values["optim.lr"]

    def tensor(**changes: Any) -> Fragment:
        return replace(fragment, tensors=[replace(weight, **changes), *fragment.tensors[1:]])

    def with_chunk(**changes: Any) -> Fragment:
        return replace(fragment, chunks=[replace(chunk, **changes), *fragment.chunks[1:]])

    def with_mesh(**changes: Any) -> Fragment:
        return replace(fragment, meshes=[replace(mesh, **changes)])

    def with_aliases(name: str, *paths: list[str]) -> Fragment:
        return replace(fragment, aliases={name: list(paths)})

    for wrong, problem in (
        (tensor(dtype="float99"), r"tensors\[0\].shape: dtype 'float99'"),
        (tensor(shape=[2**40, 2**40]), r"tensors\[0\].shape: .* more bytes than can be counted"),
        (tensor(shape=[0, 2**62, 2**62]), r"tensors\[0\].shape: .* more bytes than can be counted"),
        (tensor(shape=[1] * 65), r"\$\.tensors\[0\].shape"),
        (tensor(mesh=1), r"tensors\[0\].mesh: 1 of 1"),
        (tensor(placements=["R", "R"]), r"tensors\[0\].placements: 2 for a mesh of 1"),
        (tensor(placements=["S2"]), r"tensors\[0\].placements: S2 of a tensor of 2 dimensions"),
        (tensor(placements=["P"]), r"tensors\[0\].placements: unknown placement 'P'"),
        (tensor(placements=["S\u0661"]), r"tensors\[0\].placements: unknown placement"),
        (tensor(mesh=None), r"tensors\[0\].placements: there is no mesh"),
        (tensor(owners=[[0, 2**60]]), r"tensors\[0\].owners: .* in a world of 2"),
        (tensor(owners=[[0, 1]] * 2), r"tensors\[0\].owners: a rank is repeated"),
        (tensor(owners=[[1, 2]]), r"tensors\[0\].owners: .* out of range"),
        (tensor(owners=[[0]]), r"\$\.tensors\[0\].owners"),
        (tensor(path=[]), r"tensors\[0\].path: it is empty"),
        (replace(fragment, values={"v": replace(lr, path=[])}), r"values\['v'\].path: it is empty"),
        (with_aliases("model.bias", []), r"aliases\['model.bias'\]: a path is empty"),
        (tensor(path=bias.path), r"tensors\[1\].path: 'model.bias' is there twice"),
        (with_aliases("model.other", ["x"]), r"aliases\['model.other'\]: .* describes no such tensor"),
        (
            with_aliases("model.bias", ["model", "weight"]),
            r"aliases\['model.bias'\]: 'model.weight' is there",
        ),
        (with_aliases("model.bias", ["optim", "lr"]), r"aliases\['model.bias'\]: 'optim.lr' is there twice"),
        (with_aliases("model.bias", ["x"], ["x"]), r"aliases\['model.bias'\]: 'x' is there twice"),
        (with_mesh(ranks=[[0, 1]]), r"meshes\[0\].shape"),
        (with_mesh(ranks=[[0, 1], [0, 1]]), r"meshes\[0\].ranks: a rank is repeated"),
        (with_mesh(ranks=[[0, 2**62]] * 3), r"meshes\[0\].ranks"),
        (with_mesh(ranks=[], shape=[0]), r"meshes\[0\].shape"),
        (with_mesh(shape=[2**31, 2**31]), r"meshes\[0\].shape"),
        (with_mesh(ranks=[[0, 1]], shape=[1]), "owners: not all are ranks of its mesh"),
        (with_chunk(sizes=[3]), r"chunks\[0\].offsets: not as many as sizes"),
        (with_chunk(payload_offset=file.size_bytes), r"chunks\[0\].payload_offset: outside of the container"),
        (with_chunk(container_offset=chunk.payload_offset + 1), r"chunks\[0\].payload_offset"),
        (with_chunk(container_bytes=2**60), r"chunks\[0\].container_bytes: .* lies outside of its file"),
        (with_chunk(container_bytes=chunk.container_bytes + 700), "the containers of .* overlap"),
        (with_chunk(file=2), r"chunks\[0\].file"),
        (replace(fragment, values={"v": replace(lr, container_offset=None)}), r"values\['v'\]"),
        (replace(fragment, values={"v": replace(lr, container_bytes=2**60)}), r"values\['v'\]"),
        (replace(fragment, values={"v": replace(lr, container_offset=0)}), "overlap"),
    ):
        layout = layout_digest(wrong.meshes, wrong.tensors, wrong.chunks)
        with pytest.raises(CorruptCheckpoint, match=problem) as caught:
            decode_fragment(encode_fragment(replace(wrong, layout=layout)), path=PATH)
        assert caught.value.path == PATH


def test_a_few_bytes_that_state_much_take_little_memory():
    manifest, fragment = KINDS["manifest"], KINDS["fragment 0"]
    huge = [
        (manifest, ("index",), [[0, 2**60]]),
        (manifest, ("index",), [[0, 2**31]] * 100),
        (manifest, ("world_size",), 2**60),
        (manifest, ("attempt",), "e" + "9" * 100_000),
        (fragment, ("meshes", 0, "ranks"), [[0, 2**60]]),
        (fragment, ("meshes", 0, "shape"), [2**62] * 64),
        (fragment, ("tensors", 0, "owners"), [[0, 2**60]]),
        (fragment, ("tensors", 0, "shape"), [2**62] * 64),
        (fragment, ("chunks", 0, "sizes"), [2**62] * 64),
        (fragment, ("world_size",), 2**60),
        (fragment, ("files", 0, "size_bytes"), 2**60),
    ]
    tracemalloc.start()
    try:
        for kind, at, value in huge:
            read_or_refused(kind, encode_json(kind.sign(replaced(kind.fields, at, value))))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "encoded",
    [
        {"$int": "1_0"}, {"$int": " 1"}, {"$int": "+1"}, {"$int": 1.5}, {"$int": True}, {"$int": "9" * 5000},
        {"$int": "\u0661"}, {"$float": ["nan"]}, {"$complex": ["1", "2"]}, {"$complex": [1.0, 2.0, 3.0]},
        {"$bytes": "YQ"}, {"$bytes": "Y!Q=="}, {"$bytes": "YQ==\n"}, {"$bytes": "YQ==YQ=="}, {"$bytes": [97]},
        {"$tuple": "ab"}, {"$tuple": {"a": 1}}, {"$set": [1, 1]}, {"$set": "ab"}, {"$frozenset": [1, 1]},
        {"$dict": [["a", 1], ["a", 2]]}, {"$dict": ["ab"]}, {"$dict": {"a": 1}},
        {"$ordered": [[1, 1], [1, 2]]},
        {"$counter": [["a", 1], ["a", 1]]}, {"$deque": [[1, 2], 1]}, {"$deque": [[1], True]},
        {"$deque": [[1], 2**70]}, {"$deque": [[1], -1]}, {"$deque": ["ab", None]},
        {"$ndarray": ["<f4", [2**40, 2**40], "AAAAAA=="]}, {"$ndarray": ["<f4", [-1], "AAAAAA=="]},
        {"$ndarray": ["<f4", 1, "AAAAAA=="]}, {"$ndarray": ["f4,i4", [1], "AAAAAAAAAAA="]},
        {"$ndarray": [["<f4"], [1], "AAAAAA=="]}, {"$ndarray": ["<f4", [True], "AAAAAA=="]},
        {"$ndarray": ["9" * 5000, [1], "AAAAAA=="]},
        {"$ndarray": ["|V999999999999", [1], ""]}, {"$npscalar": ["<f4", "AAAAAAAAAAA="]},
        {"$npscalar": ["<f4", "AAAA AA="]}, {"$tensor": 5}, {"$tensor": ["x"]}, {"#": 1, "$int": "5"},
        {"$value": 5}, {"$ndarray": ["<f16", [1], "AAAAAAAAAAAAAAAAAAAAAA=="]},
        {"a": 1, "$z": 2}, {"$": 1},
    ],
    ids=lambda encoded: repr(encoded)[:60],
)  # fmt: skip
def test_an_ill_formed_value_is_refused_by_its_name(encoded):
    for nested in (encoded, [encoded], {"a": encoded}, {"$tuple": [encoded]}):
        with pytest.raises(CorruptCheckpoint, match=r"value the\.name is not valid typed JSON"):
            decode_value(nested, path="the.name")


def test_a_value_that_is_nested_endlessly_is_refused():
    encoded: Any = 1
    for _ in range(10_000):
        encoded = [encoded]
    with pytest.raises(CorruptCheckpoint, match=r"the\.name"):
        decode_value(encoded, path="the.name")


@settings(max_examples=200)
@given(
    st.recursive(
        st.sampled_from(HOSTILE_VALUES) | st.floats(allow_nan=False) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["$int", "$float", "$complex", "$bytes", "$bytearray", "$tuple", "$set", "$frozenset",
                     "$dict", "$ordered", "$counter", "$deque", "$ndarray", "$npscalar", "$tensor", "$value",
                     "a"]
                ),
                inner,
                max_size=2,
            )
        ),
        max_leaves=8,
    )
)  # fmt: skip
def test_any_value_means_one_thing_or_is_refused(encoded):
    try:
        value = decode_value(encoded, path="v")
    except CorruptCheckpoint:
        return
    again = encode_value(value, path="v")
    assert encode_json(encode_value(decode_value(again, path="v"), path="v")) == encode_json(again)


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        ("directory", "..", "no older attempt"),
        ("directory", "/etc", "no older attempt"),
        ("directory", "step-00000003/..", "no older attempt"),
        ("directory", "../run-002/step-00000003", "no older attempt"),
        ("directory", "x" * 200, "directory"),
        ("attempt", "e0001-s000001", "no older attempt"),
        ("attempt", "e0002-s000000", "no older attempt"),
        ("attempt", "../e0001-s000000", "no older attempt"),
        ("attempt", "e0001-s" + "9" * 19, "no older attempt"),
        ("file", -1, "file"),
        ("file", 2**63, "file"),
        ("file", "0", "file"),
    ],
)
def test_the_origin_of_a_shared_file_is_an_older_attempt(at, value, match):
    """Never itself, never in a circle, and a name and no path."""
    kind = KINDS["fragment that shares"]
    refused(kind, encode_json(replaced(kind.fields, ("files", 0, "origin", at), value)), match=match)


@pytest.mark.parametrize("count", [0.5, 1, 2.5, 40])
def test_there_is_one_payload_digest_for_each_chunk(count):
    kind = KINDS["fragment that shares"]
    assert len(kind.fields["chunks"]) == 2
    digests = "0" * int(32 * count)
    refused(kind, encode_json(replaced(kind.fields, ("payload_digests",), digests)), match="payload_digests")


def test_an_origin_is_told_and_never_followed(tmp_path):
    """It may lead to nothing, or to other bytes: the checkpoint's own file counts."""
    storage = LocalStorage(tmp_path)
    ensure_run(storage)
    manifest = write_tiny_checkpoint(storage, step=7, ranks=2)
    write_tiny_checkpoint(storage, step=3, ranks=2, save=9, shape=(8, 4), commit=False)
    key = f"{STEP}/rank-00001.e0001-s000001.json"
    fragment = decode_fragment(storage.read(key), path=key)
    origin = FileOrigin(directory="step-00000003", attempt="e0001-s000000", file=0)
    data = encode_fragment(replace(fragment, files=[replace(fragment.files[0], origin=origin)]))
    storage.put(key, data)
    ref = FragmentRef.of(decode_fragment(data, path=key), data)
    fields = msgspec.to_builtins(replace(manifest, fragments=[manifest.fragments[0], ref]))
    storage.put(f"{STEP}/{MANIFEST}", encode_json(signed_manifest(fields)))
    assert verify(tmp_path / STEP).ok
    with open_checkpoint(tmp_path / STEP) as checkpoint:
        assert checkpoint.read_tensor("model.weight").numel() == 24
        assert checkpoint.manifest.shared_bytes == fragment.files[0].size_bytes
