"""Export: what other programs read is bit for bit what was saved."""

from __future__ import annotations

import json
import math
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import TrainState, export, load_checkpoint, open_checkpoint
from dcp_ckpt.errors import CheckpointNotFound, ConfigError, StateMismatch
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.load.stock import STOCK_UNVERIFIED
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.ops.exports import TiedModel, every_dtype, files, read_safetensors, same_bits, saved

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

NOT_IN_SAFETENSORS = ("of.complex32", "of.complex128")


@pytest.fixture(scope="module")
def dtypes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tensor of every dtype, and a value that is none."""
    return saved(tmp_path_factory.mktemp("dtypes"), {"model": every_dtype(), "lr": 0.5})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TiedModel, torch.optim.AdamW]:
    """A tied model and its AdamW after a step."""
    model = TiedModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.arange(11)).square().mean().backward()
    optimizer.step()
    state = TrainState(model=model, optimizer=optimizer, extra={"history": [0.5, 0.25]}, per_rank={"seed": 3})
    return saved(tmp_path_factory.mktemp("trained"), state), model, optimizer


@pytest.fixture(scope="module")
def state_dict(trained: tuple[str, TiedModel, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors, each once."""
    tensors = dict(trained[1].state_dict())
    del tensors["head.weight"]
    return tensors


def storable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in NOT_IN_SAFETENSORS}


def test_safetensors_of_every_dtype(dtypes: str, tmp_path: Path) -> None:
    report = export(dtypes, tmp_path / "out", exclude=[f"model.{name}" for name in NOT_IN_SAFETENSORS])
    assert report.files == ("model.safetensors",)
    assert report.path == str(tmp_path / "out")
    assert (report.step, report.prefix, report.num_tensors) == (10, "model.", len(DTYPES))
    assert report.left_out == {"excluded": 2, "not of a model": 1}
    assert report.num_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    same_bits(read_safetensors(tmp_path / "out"), storable(every_dtype()))


def test_what_safetensors_cannot_hold_is_named_before_anything_is_written(
    dtypes: str, tmp_path: Path
) -> None:
    with pytest.raises(
        StateMismatch, match=r"no complex128 and no complex32: of.complex32.*exclude them, or export"
    ):
        export(dtypes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_header_is_what_the_format_asks_for(dtypes: str, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    assert export(dtypes, out, exclude="*complex*").path == str(out)
    data = out.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    assert header_bytes % 8 == 0
    header = json.loads(data[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    position = 0
    for entry in header.values():
        start, position_after = entry["data_offsets"]
        item_bytes = (position_after - start) // max(math.prod(entry["shape"]), 1) or 1
        assert start == position, "there is a gap"
        assert (8 + header_bytes + start) % item_bytes == 0, "a tensor is not aligned"
        position = position_after
    assert 8 + header_bytes + position == len(data)
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_torch_file_of_every_dtype(dtypes: str, tmp_path: Path) -> None:
    report = export(dtypes, tmp_path / "model.pt", format="torch")
    assert report.files == ("model.pt",)
    assert report.path == str(tmp_path / "model.pt")
    for mmap in (False, True):
        same_bits(torch.load(report.path, weights_only=True, mmap=mmap), every_dtype())
    with zipfile.ZipFile(report.path) as archive:
        assert archive.testzip() is None


def test_a_dcp_directory_of_every_dtype(dtypes: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(dtypes, out, format="dcp")
    assert report.files == ("__0_0.distcp", ".metadata")
    assert (report.num_values, report.prefix) == (1, "")
    target = {name: torch.zeros_like(tensor) for name, tensor in every_dtype().items()}
    state = {"model": target, "lr": 0.0}
    stock_load(state, checkpoint_id=out)
    same_bits(target, every_dtype())
    assert state["lr"] == 0.5
    with open_checkpoint(out) as checkpoint:
        whole = {name: checkpoint.read_tensor(f"model.{name}") for name in target}
        assert checkpoint.read_value("lr") == 0.5
    same_bits(whole, every_dtype())
    dcp_to_torch_save(out, tmp_path / "all.pt")
    same_bits(torch.load(tmp_path / "all.pt", weights_only=False)["model"], every_dtype())


def test_a_whole_training_state_comes_back_from_a_dcp_directory(
    trained: tuple[str, TiedModel, torch.optim.AdamW], tmp_path: Path
) -> None:
    ref, model, optimizer = trained
    report = export(ref, tmp_path / "step-10", format="dcp")
    assert report.left_out == {"of single ranks": 2}
    other = TiedModel(seed=1)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    extra: dict[str, Any] = {"history": []}
    state = TrainState(model=other, optimizer=other_optimizer, extra=extra, rng=False)
    assert load_checkpoint(tmp_path / "step-10", state).step == 10
    same_bits(other.state_dict(), dict(model.state_dict()))
    assert extra == {"history": [0.5, 0.25]}
    moments, right = other_optimizer.state_dict(), optimizer.state_dict()
    assert moments["param_groups"] == right["param_groups"]
    for number, entries in right["state"].items():
        same_bits(moments["state"][number], entries)


def test_models_alone_and_their_tied_tensors_once(
    trained: tuple[str, TiedModel, Any], state_dict: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As transformers saves: loaders tie what the model ties."""
    ref, model, _ = trained
    report = export(ref, tmp_path)
    same_bits(read_safetensors(tmp_path), state_dict)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
    assert report.left_out.keys() == {"not of a model"}
    other = TiedModel(seed=1)
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert (set(missing), list(unexpected)) == (set(), [])
    assert other.head.weight is other.embedding.weight
    same_bits(dict(other.state_dict()), dict(model.state_dict()))


def test_a_torch_file_and_a_dcp_directory_have_tied_tensors_under_all_names(
    trained: tuple[str, TiedModel, Any], tmp_path: Path
) -> None:
    ref, model, _ = trained
    report = export(ref, tmp_path / "model.pt", format="torch")
    found = torch.load(report.path, weights_only=True)
    same_bits(found, dict(model.state_dict()))
    assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
    TiedModel(seed=1).load_state_dict(found)
    export(ref, tmp_path / "stock", format="dcp")
    target = {"model": {name: torch.zeros_like(one) for name, one in model.state_dict().items()}}
    stock_load(target, checkpoint_id=tmp_path / "stock")
    same_bits(target["model"], dict(model.state_dict()))


def test_shards_are_described_by_the_index(
    trained: tuple[str, TiedModel, Any], state_dict: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    report = export(trained[0], tmp_path, max_shard_bytes=600)
    *shards, index_name = report.files
    assert index_name == "model.safetensors.index.json"
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 2
    index = json.loads((tmp_path / index_name).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state_dict.values())}
    assert set(index["weight_map"].values()) == set(shards)
    same_bits(read_safetensors(tmp_path), state_dict)
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in held.values()) <= 600 or len(held) == 1
    # A layer is in the shard after the one before it, also where sorting by letters would say otherwise.
    layers = [index["weight_map"][f"layers.{number}.weight"] for number in range(11)]
    assert layers == sorted(layers)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}
    report = export(saved(tmp_path / "run", {"model": state}), tmp_path / "out", max_shard_bytes=16)
    assert len(report.files) == 4
    same_bits(read_safetensors(tmp_path / "out"), state)


@pytest.mark.parametrize("shard_dim", [0, 1])
@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_what_was_sharded_is_put_together(tmp_path: Path, shard_dim: int, format: Any) -> None:
    shape = (700, 1000)
    write_tiny_checkpoint(open_storage(tmp_path / "run"), step=1, ranks=3, shape=shape, shard_dim=shard_dim)
    out = tmp_path / ("model.pt" if format == "torch" else "out")
    export(f"{tmp_path / 'run'}@1", out, format=format)
    right = {
        "weight": torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape),
        "bias": torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 2),
    }
    if format == "safetensors":
        same_bits(read_safetensors(out), right)
    elif format == "torch":
        same_bits(torch.load(out, weights_only=True), right)
    else:
        found = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
        stock_load({"model": found}, checkpoint_id=out)
        same_bits(found, right)


def test_a_stock_checkpoint_is_exported_as_well(tmp_path: Path) -> None:
    model = {"w": torch.arange(12.0).reshape(3, 4).T, "n": torch.tensor(3)}
    state = {"model": model, "lr": 0.5, "pair": (1, torch.ones(2))}
    stock_save(state, checkpoint_id=tmp_path / "step-7")
    report = export(tmp_path / "step-7", tmp_path / "out")
    assert (report.step, report.unverified) == (7, STOCK_UNVERIFIED)
    same_bits(read_safetensors(tmp_path / "out"), {name: one.contiguous() for name, one in model.items()})
    export(tmp_path / "step-7", tmp_path / "w.pt", format="torch", include="model.w")
    same_bits(torch.load(tmp_path / "w.pt", weights_only=True), {"w": model["w"].contiguous()})
    export(tmp_path / "step-7", tmp_path / "again", format="dcp")
    found = {"model": {name: torch.zeros_like(one) for name, one in model.items()}, "lr": 0.0, "pair": None}
    stock_load(found, checkpoint_id=tmp_path / "again")
    same_bits(found["model"], model)  # type: ignore[arg-type]
    assert found["lr"] == 0.5
    assert torch.equal(found["pair"][1], torch.ones(2))  # type: ignore[index]


def test_dtype_converts_floating_tensors_only(tmp_path: Path) -> None:
    state = {
        "wide": torch.tensor([1.0, 1e30, math.inf, -1e-30]),
        "half": torch.tensor([0.1], dtype=torch.float16),
        "double": torch.tensor([0.1, 1e300], dtype=torch.float64),
        "count": torch.tensor([2**60 + 1]),
        "phase": torch.tensor([1 + 2j]),
        "flag": torch.tensor(True),
    }
    ref = saved(tmp_path / "run", {"model": state})
    report = export(ref, tmp_path / "out", dtype="bf16")
    floating = {"wide", "half", "double"}
    right = {name: one.bfloat16() if name in floating else one for name, one in state.items()}
    same_bits(read_safetensors(tmp_path / "out"), right)
    assert report.converted == {
        "float32 to bfloat16": 1,
        "float16 to bfloat16": 1,
        "float64 to bfloat16": 1,
    }
    assert report.notes == ("double: finite elements that became infinite in the new dtype: 1",)
    narrow = export(ref, tmp_path / "half.pt", format="torch", dtype=torch.float16)
    assert sorted(narrow.notes) == [
        "double: finite elements that became infinite in the new dtype: 1",
        "wide: finite elements that became infinite in the new dtype: 1",
    ]
    assert torch.equal(torch.load(narrow.path, weights_only=True)["wide"], state["wide"].half())
    # What the optimizer holds no longer fits the converted model: it stays behind.
    assert export(ref, tmp_path / "dcp", format="dcp", dtype="float64").converted.keys() == {
        "float32 to float64", "float16 to float64",
    }  # fmt: skip


def test_one_of_several_models_and_averages_beside_it(tmp_path: Path) -> None:
    models = {"gen": nn.Linear(2, 3), "dis": nn.Linear(3, 1)}
    average = {"gen.weight": torch.ones(3, 2)}
    ref = saved(tmp_path / "run", TrainState(model=models, extra={"ema": average}))
    both = export(ref, tmp_path / "both")
    same_bits(
        read_safetensors(tmp_path / "both"),
        {f"{key}.{name}": one for key, model in models.items() for name, one in model.state_dict().items()},
    )
    assert "several models, whose keys stay in the names: dis, gen" in both.notes[0]
    one = export(ref, tmp_path / "one", include="model.gen.*")
    assert one.prefix == "model.gen."
    same_bits(read_safetensors(tmp_path / "one"), dict(models["gen"].state_dict()))
    export(ref, tmp_path / "ema", include="extra.ema.*", strip_prefix="extra.ema")
    same_bits(read_safetensors(tmp_path / "ema"), average)
    mixed = export(ref, tmp_path / "mixed", include=["extra.*", "model.dis.*"])
    assert read_safetensors(tmp_path / "mixed").keys() == {
        "extra.ema.gen.weight", "model.dis.bias", "model.dis.weight",
    }  # fmt: skip
    assert "names are kept whole" in mixed.notes[0]


def test_arguments_that_make_no_sense(dtypes: str, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"format": "onnx"}, ConfigError, "choose one of safetensors, torch, dcp"),
        ({"dtype": "int8"}, ConfigError, "bfloat16, float16, float32 or float64"),
        ({"format": "torch", "max_shard_bytes": 5}, ConfigError, "safetensors only"),
        ({"max_shard_bytes": 0}, ConfigError, "at least 1"),
        ({"lora_alpha": 8.0}, ConfigError, "fuse_lora only"),
        ({"fuse_lora": True, "lora_alpha": math.nan}, ConfigError, "finite number"),
        ({"include": "model.off.*"}, StateMismatch, r"include 'model.off.\*' matches nothing"),
        ({"exclude": ["lr", "lrr"]}, StateMismatch, "exclude 'lrr' matches nothing"),
        ({"include": "lr"}, StateMismatch, "no tensor to export"),
        ({"strip_prefix": "net"}, StateMismatch, "do not begin with strip_prefix 'net.'"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            export(dtypes, tmp_path / "out", **arguments)
    with pytest.raises(ConfigError, match="is a directory: name the file"):
        export(dtypes, tmp_path, format="torch")
    with pytest.raises(ConfigError, match="s3://bucket is a directory"):
        export(dtypes, "s3://bucket", format="torch")
    with pytest.raises(ConfigError, match=r"need \d+ shards of at most 60, which one file 'x.safetensors'"):
        export(dtypes, tmp_path / "x.safetensors", max_shard_bytes=60, exclude="*complex*")
    with pytest.raises(CheckpointNotFound):
        export(tmp_path / "nothing", tmp_path / "out")
    assert files(tmp_path) == {}


def test_a_state_without_a_model_is_exported_by_name(tmp_path: Path) -> None:
    ref = saved(tmp_path / "run", {"net": {"w": torch.ones(2)}, "lr": 0.5})
    with pytest.raises(StateMismatch, match=r"no tensor below 'model'.*holds net.w, lr: choose by include"):
        export(ref, tmp_path / "out")
    export(ref, tmp_path / "out", include="net.*")
    assert read_safetensors(tmp_path / "out").keys() == {"net.w"}


def test_a_checkpoint_is_no_place_for_an_export(dtypes: str, tmp_path: Path) -> None:
    run = Path(dtypes.partition("@")[0])
    step = run / "step-00000010"
    before = files(step)
    for out, format in ((step, "safetensors"), (step / "model.pt", "torch"), (step, "dcp")):
        with pytest.raises(ConfigError, match=r"is (a|the) checkpoint"):
            export(dtypes, out, format=format, exclude="*complex*", force=True)  # type: ignore[arg-type]
    assert files(step) == before


def test_a_run_and_a_save_under_way_are_no_places_for_an_export(dtypes: str, tmp_path: Path) -> None:
    """Among the files of a save, a forced export would take data for that of an older export."""
    run = Path(shutil.copytree(dtypes.partition("@")[0], tmp_path / "run"))
    step = run / "step-00000010"
    (step / "manifest.json").unlink()
    before = files(step)
    for out, what in ((step, "a checkpoint that is not finished"), (run, "a run")):
        with pytest.raises(ConfigError, match=f"is {what}, where"):
            export(dtypes, out, format="dcp", exclude="*complex*", force=True)
    assert files(step) == before
    assert not (run / ".metadata").exists()
    export(dtypes, run / "model.pt", format="torch")


def test_a_checkpoint_is_not_exported_over_itself(tmp_path: Path) -> None:
    stock_save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "step-7")
    (tmp_path / "newest").symlink_to("step-7")
    before = files(tmp_path / "step-7")
    for out in ("step-7", "newest"):
        with pytest.raises(ConfigError, match="is the checkpoint that is exported"):
            export(tmp_path / "step-7", tmp_path / out, format="dcp", dtype="bf16", force=True)
    assert files(tmp_path / "step-7") == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ref = saved(tmp_path / "run", TrainState(model=model))
    tokens = torch.arange(20).reshape(2, 10)
    for name, max_shard_bytes in (("whole", None), ("shards", 10_000)):
        out = tmp_path / name
        export(ref, out, max_shard_bytes=max_shard_bytes)
        config.save_pretrained(out)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
