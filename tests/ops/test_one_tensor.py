"""One tensor out of the text of fragments: exactly what the decoded tables say, or nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, open_checkpoint
from dcp_ckpt.format.fragment import decode_fragment
from dcp_ckpt.format.manifest import build_manifest, encode_manifest, summarize
from dcp_ckpt.format.names import MANIFEST, fragment_name
from dcp_ckpt.ops.checkpoint import Checkpoint, read_manifest
from dcp_ckpt.ops.one_tensor import TensorSearch
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

STEP = "step-00000001"
TEXT = '"path":["layers.1"],"placements":[],"tensor":"layers.1"}'
LOOK_ALIKE = {"container_bytes": 1, "tensor": "layers.1", "tensors": [], "chunks": [], "copies": []}


def odd_state() -> dict[str, object]:
    """Names that are parts of others, with what JSON escapes in them, and values that look like tables."""
    tied = torch.arange(3)
    return {
        "layers.1": torch.tensor([1.0]),
        "layers": {
            "1.weight": torch.tensor([2.0]),
            "11": torch.tensor([3.0]),
            "x": {"1": torch.tensor([4.0])},
        },
        "1": torch.tensor([5.0]),
        'a"b\\ü\n.c': torch.tensor([6.0]),
        TEXT: torch.tensor([7.0]),
        "empty": torch.zeros(0, 2),
        "tied": {"first": tied, "second": tied},
        "text": [TEXT, LOOK_ALIKE, {"copies": [LOOK_ALIKE], "path": ["layers.1"]}],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    with Checkpointer(path, config=CheckpointConfig(dcp_metadata="never")) as checkpointer:
        checkpointer.save(odd_state(), step=1).result(30)
    return path / STEP


def test_every_tensor_is_found_as_it_is_in_the_tables(saved: Path) -> None:
    with open_checkpoint(saved) as checkpoint:
        search = TensorSearch(checkpoint.storage, checkpoint.directory, checkpoint.manifest)
        names = [*checkpoint.tensors, "tied.second"]
        assert len(names) == 10
        for name in names:
            found = search.find(name)
            assert found is not None, name
            stored = "tied.first" if name == "tied.second" else name
            assert found.entry == checkpoint.tensors[stored]
            expected = [one for one in checkpoint.fragment(0).chunks if one.tensor == stored]
            assert [one.chunk for one in found.chunks] == [one for one in expected if one.box.num_elements]
        assert search.find("layers") is None
        assert search.find("text.0") is None


def test_each_reads_what_was_saved_where_nothing_else_was_read(saved: Path) -> None:
    expected = {"layers.1": 1.0, "layers.1.weight": 2.0, "layers.11": 3.0, "layers.x.1": 4.0, "1": 5.0}
    for name, value in expected.items():
        with open_checkpoint(saved) as checkpoint:
            assert checkpoint.read_tensor(name).tolist() == [value]
    with open_checkpoint(saved) as checkpoint:
        assert checkpoint.read_tensor("tied.second").tolist() == [0, 1, 2]
        assert checkpoint.read_tensor("empty").shape == (0, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_found_where_a_later_version_added_a_field(rank: int) -> None:
    """How its text looks is not known; what does not tile the tensor is not relied on."""
    storage = MemoryStorage()
    manifest = write_tiny_checkpoint(storage, step=1, commit=False)
    summaries = []
    for number in range(2):
        key = f"{STEP}/{fragment_name(number, manifest.attempt_id)}"
        data = storage.read(key)
        fragment = decode_fragment(data, path=key)
        if number == rank:
            data = data.replace(b'"tensor":"model.weight"}', b'"tensor":"model.weight","z":1}')
            storage.put(key, data)
        summaries.append(summarize(fragment, data))
    storage.put(f"{STEP}/{MANIFEST}", encode_manifest(build_manifest(summaries)))
    search = TensorSearch(storage, STEP, read_manifest(storage, STEP))
    assert search.find("model.weight") is None
    assert search.find("model.bias") is not None
    with closing(Checkpoint(storage, STEP, read_manifest(storage, STEP))) as checkpoint:
        assert checkpoint.read_tensor("model.weight").tolist() == torch.arange(24.0).view(6, 4).tolist()
