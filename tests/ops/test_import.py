"""Import: what others saved is a checkpoint of the run like any other, bit for bit, or nothing is."""

from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import (
    CheckpointConfig,
    Checkpointer,
    TrainState,
    diff,
    export,
    import_checkpoint,
    open_checkpoint,
    verify,
)
from dcp_ckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    LoadError,
    StateMismatch,
    StepAlreadySaved,
)
from dcp_ckpt.format.names import epoch_name
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.load.stock import STOCK_UNVERIFIED
from dcp_ckpt.storage import open_storage
from tests.ops.exports import TiedModel, every_dtype, files, read_safetensors, same_bits, saved

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

CONFIG = CheckpointConfig(timeout_seconds=30)


def trained(seed: int) -> tuple[TiedModel, torch.optim.AdamW]:
    model = TiedModel(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    model(torch.arange(11)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def same_model(found: torch.nn.Module, right: torch.nn.Module) -> None:
    same_bits(dict(found.state_dict()), dict(right.state_dict()))


def loaded_model(run: Path) -> TiedModel:
    """Of a training that begins with what is in the run."""
    model = TiedModel(seed=9)
    with Checkpointer(run, config=CONFIG) as checkpointer:
        report = checkpointer.load(TrainState(model=model, rng=False))
        assert report is not None
    assert model.head.weight is model.embedding.weight
    return model


def tensors_of(ref: str | Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(ref) as checkpoint:
        return {name: checkpoint.read_tensor(name) for name in checkpoint.tensors}


def test_a_training_goes_on_from_what_was_imported(tmp_path: Path) -> None:
    """From stock DCP: model, moments and settings; then a save of its own, and everything that reads."""
    model, optimizer = trained(0)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    stock_save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    run = tmp_path / "runs/run-001"
    report = import_checkpoint(tmp_path / "stock", run, step=1000)
    assert (report.path, report.kind, report.epoch) == (f"{run}/step-00001000", "dcp", 1)
    assert report.unverified == STOCK_UNVERIFIED
    assert verify(run).ok
    (entry,) = read_catalogue(open_storage(run)).entries
    assert entry.manifest.tags == ["dcp.save", "import"]
    assert json.loads((run / "epochs" / epoch_name(1)).read_text())["purpose"] == "import"

    other, other_optimizer = trained(1)
    with Checkpointer(run, config=CONFIG) as checkpointer:
        loaded = checkpointer.load(TrainState(model=other, optimizer=other_optimizer, rng=False))
        assert loaded is not None
        assert loaded.step == 1000
        same_model(other, model)
        for now, then in zip(
            other_optimizer.state_dict()["state"].values(),
            optimizer.state_dict()["state"].values(),
            strict=True,
        ):
            same_bits(now, then)
        assert other_optimizer.param_groups[0]["lr"] == 0.01
        checkpointer.save(TrainState(model=other, optimizer=other_optimizer), step=1001).result(30)

    target = {"model": TiedModel(seed=3).state_dict()}
    stock_load(target, checkpoint_id=run / "step-00001000", no_dist=True)
    same_bits(dict(target["model"]), dict(model.state_dict()))
    export(run / "step-00001000", tmp_path / "out")
    assert read_safetensors(tmp_path / "out")["head.weight"].equal(model.head.weight)
    assert diff(tmp_path / "stock", run / "step-00001000").equal


def test_safetensors_in_one_file_and_in_shards(tmp_path: Path) -> None:
    model, _ = trained(0)
    save_model(model, str(tmp_path / "one.safetensors"))
    export(saved(tmp_path / "source", TrainState(model=model)), tmp_path / "shards", max_shard_bytes=400)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    index = tmp_path / "shards/model.safetensors.index.json"
    for number, src in enumerate((tmp_path / "one.safetensors", tmp_path / "shards", index)):
        run = tmp_path / f"run-{number}"
        report = import_checkpoint(src, run, step=0, prefix="model.")
        assert (report.kind, report.prefix) == ("safetensors", "model.")
        assert verify(run).ok
        same_model(loaded_model(run), model)
    # Where the file does not say what is tied, one of the names is enough.
    untold = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    save_file(untold, tmp_path / "untold.safetensors")
    import_checkpoint(tmp_path / "untold.safetensors", tmp_path / "untold", step=0, prefix="model.")
    same_model(loaded_model(tmp_path / "untold"), model)


def test_every_dtype(tmp_path: Path) -> None:
    tensors = every_dtype()
    torch.save({"nested": [tensors, {"lr": 0.5}]}, tmp_path / "all.pt")
    import_checkpoint(tmp_path / "all.pt", tmp_path / "run", step=1)
    same_bits(
        tensors_of(f"{tmp_path}/run@1"), {f"nested.0.{name}": tensor for name, tensor in tensors.items()}
    )
    storable = {n: t for n, t in tensors.items() if n not in ("of.complex32", "of.complex128")}
    save_file(storable, tmp_path / "all.safetensors")
    import_checkpoint(tmp_path / "all.safetensors", tmp_path / "run", step=2, prefix="model")
    same_bits(tensors_of(f"{tmp_path}/run@2"), {f"model.{name}": tensor for name, tensor in storable.items()})


def test_torch_files(tmp_path: Path) -> None:
    """Tied, strided, nested, values of all kinds; in the form of before torch 1.6, too."""
    model, optimizer = trained(0)
    wide = torch.arange(12.0).reshape(3, 4)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": {"transposed": wide.t(), "column": wide[:, 1], "nothing": wide[:0]},
        "betas": (0.9, float("nan")),
        "size": torch.Size([3]),
        "epoch": 3,
    }
    for step, legacy in enumerate((False, True)):
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        report = import_checkpoint(tmp_path / "x.pt", tmp_path / "run", step=step)
        assert report.left_out == {"of a type that is not stored: Size": 1}
        with open_checkpoint(f"{tmp_path}/run@{step}") as checkpoint:
            assert checkpoint.read_tensor("views.transposed").equal(wide.t())
            assert checkpoint.read_tensor("views.column").equal(wide[:, 1])
            assert checkpoint.read_tensor("views.nothing").shape == (0, 4)
            assert checkpoint.aliases["model.embedding.weight"] == ("model.head.weight",)
            assert checkpoint.read_value("epoch") == 3
            assert str(checkpoint.read_value("betas")) == "(0.9, nan)"
    other, other_optimizer = trained(1)
    with Checkpointer(tmp_path / "run", config=CONFIG) as checkpointer:
        checkpointer.load(
            TrainState(model=other, optimizer=other_optimizer, rng=False), include=["model", "optimizer"]
        )
    same_model(other, model)
    assert other_optimizer.param_groups[0]["lr"] == 0.01


def test_torch_files_with_an_index(tmp_path: Path) -> None:
    """The two files of a model as transformers saved them before safetensors."""
    model = tmp_path / "model"
    model.mkdir()
    parts = {
        "pytorch_model-00001-of-00002.bin": {"a.weight": torch.arange(6.0).reshape(2, 3)},
        "pytorch_model-00002-of-00002.bin": {"b.weight": torch.arange(4), "b.bias": torch.ones(2).bfloat16()},
    }
    for name, part in parts.items():
        torch.save(part, model / name)
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    index = model / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map}))
    expected = {f"model.{name}": tensor for part in parts.values() for name, tensor in part.items()}
    for step, src in enumerate((model, index)):
        assert import_checkpoint(src, tmp_path / "run", step=step, prefix="model").kind == "torch"
        same_bits(tensors_of(f"{tmp_path}/run@{step}"), expected)
    index.write_text(
        json.dumps({"weight_map": weight_map | {"c.weight": "pytorch_model-00002-of-00002.bin"}})
    )
    with pytest.raises(CorruptCheckpoint, match=r"not in their files: c\.weight"):
        import_checkpoint(model, tmp_path / "run", step=9)
    (model / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(CorruptCheckpoint, match="a file of the model is missing"):
        import_checkpoint(model, tmp_path / "run", step=9)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"weight": torch.ones(2), "bomb": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(LoadError):
            import_checkpoint(tmp_path / name, tmp_path / "run", step=1)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    save_file({"w": torch.arange(600.0)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    run = tmp_path / "run"
    for name, data in {
        "short": good[:-1],
        "empty": b"",
        "huge": b"\xff" * 8 + good[8:],
        "moved": good.replace(b"[0,2400]", b"[0,2404]"),
        "shaped": good.replace(b"[600]", b"[601]"),
        "nested": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    }.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpoint):
            import_checkpoint(path, run, step=1)
    evil = tmp_path / "evil"
    evil.mkdir()
    for target in ("../good.safetensors", "/etc/passwd", "absent.safetensors"):
        (evil / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": target}}))
        with pytest.raises(CorruptCheckpoint):
            import_checkpoint(evil, run, step=1)
    with pytest.raises(CheckpointNotFound):
        import_checkpoint(tmp_path / "nowhere", run, step=1)
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(StateMismatch, match="holds a Tensor, not a dictionary"):
        import_checkpoint(tmp_path / "tensor.pt", run, step=1)
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "twice.pt")
    with pytest.raises(StateMismatch, match=r"several things of one name: a\.b"):
        import_checkpoint(tmp_path / "twice.pt", run, step=1)
    assert not run.exists()
    with pytest.raises(ConfigError, match="not a run"):
        import_checkpoint(tmp_path / "good.safetensors", tmp_path, step=1)


def test_nothing_is_overwritten_and_nobody_is_pushed_aside(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / "w.safetensors")
    run = tmp_path / "run"
    ref = saved(run, {"x": torch.ones(3)}, step=10)
    before = files(run / "step-00000010")
    for step in (9, 10):
        with pytest.raises(StepAlreadySaved):
            import_checkpoint(tmp_path / "w.safetensors", run, step=step)
    assert sorted(path.name for path in (run / "epochs").glob("*.json")) == [epoch_name(1)]
    with Checkpointer(run, config=CONFIG) as checkpointer:
        checkpointer.load({"x": torch.ones(3)})
        with pytest.raises(ConfigError, match="still live"):
            import_checkpoint(tmp_path / "w.safetensors", run, step=11)
    import_checkpoint(tmp_path / "w.safetensors", run, step=11)
    assert files(run / "step-00000010") == before
    assert tensors_of(f"{run}@latest").keys() == {"w"}
    assert tensors_of(ref).keys() == {"x"}


def test_a_failure_in_the_middle_leaves_no_attempt(tmp_path: Path) -> None:
    """Also not one that a later start would complete."""
    torch.save({"w": torch.ones(9 << 20)}, tmp_path / "w.pt")
    run = tmp_path / "run"

    before = set(threading.enumerate())

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(tmp_path / "w.pt", run, step=1, progress=stop)
    assert not list(run.glob("step-*"))
    import_checkpoint(tmp_path / "w.pt", run, step=1)
    assert verify(run).ok
    assert set(threading.enumerate()) <= before


def test_a_checkpoint_of_ours_moves_to_another_run(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    ref = saved(tmp_path / "a", TrainState(model=model, optimizer=optimizer, per_rank={"seed": 3}))
    report = import_checkpoint(ref, tmp_path / "b", step=10)
    assert report.unverified == ""
    assert report.left_out["of single ranks"] >= 1
    assert diff(ref, f"{tmp_path}/b@10").equal
    other, other_optimizer = trained(1)
    with Checkpointer(tmp_path / "b", config=CONFIG) as checkpointer:
        checkpointer.load(TrainState(model=other, optimizer=other_optimizer))
    same_model(other, model)
    assert other_optimizer.param_groups[0]["lr"] == 0.01


def test_from_an_object_store_to_an_object_store(tmp_path: Path) -> None:
    save_file({"w": torch.arange(600.0), "b": torch.ones(2)}, tmp_path / "w.safetensors")
    base = open_storage("memory://import")
    base.put("model.safetensors", (tmp_path / "w.safetensors").read_bytes())
    import_checkpoint("memory://import/model.safetensors", "memory://import/run", step=3)
    assert verify("memory://import/run").ok
    assert tensors_of("memory://import/run@3")["w"].equal(torch.arange(600.0))
