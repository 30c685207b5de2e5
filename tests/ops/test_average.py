"""Average: the weighted mean of what is equal in name, shape and dtype, from any layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import (
    CheckpointConfig,
    Checkpointer,
    LatestN,
    TrainState,
    average,
    diff,
    open_checkpoint,
    verify,
)
from dcp_ckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    StateMismatch,
    StepAlreadySaved,
)
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.ops.exports import TiedModel, every_dtype, saved

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

CONFIG = CheckpointConfig(timeout_seconds=30, keep=LatestN(9))


def tensors_of(ref: str | Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(ref) as checkpoint:
        return {name: checkpoint.read_tensor(name) for name in checkpoint.tensors}


def trained_run(run: Path) -> list[dict[str, torch.Tensor]]:
    """A run of steps 1 to 4, and the weights of each."""
    model = TiedModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    kept = []
    with Checkpointer(run, config=CONFIG) as checkpointer:
        for step in range(1, 5):
            model(torch.arange(11)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            state = TrainState(model=model, optimizer=optimizer, extra={"step": step})
            checkpointer.save(state, step=step).result(30)
            kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return kept


def test_the_last_of_a_run_loads_into_a_training(tmp_path: Path) -> None:
    kept = trained_run(tmp_path / "a")
    report = average(tmp_path / "a", tmp_path / "b", step=0, last=3)
    assert [source.step for source in report.sources] == [2, 3, 4]
    assert [source.weight for source in report.sources] == [1 / 3] * 3
    assert report.newest == f"{tmp_path}/a/step-00000004"
    assert report.left_out["of an optimizer"] > 20
    assert verify(tmp_path / "b").ok
    model = TiedModel(seed=5)
    step = {"step": 0}
    with Checkpointer(tmp_path / "b", config=CONFIG) as checkpointer:
        checkpointer.load(TrainState(model=model, extra=step))
    assert step == {"step": 4}
    assert model.head.weight is model.embedding.weight
    target = {"model": TiedModel(seed=6).state_dict()}
    stock_load(target, checkpoint_id=tmp_path / "b/step-00000000", no_dist=True)
    for name, tensor in model.state_dict().items():
        right = sum((one[name] for one in kept[1:]), torch.zeros(())) / 3
        torch.testing.assert_close(tensor, right, rtol=1e-6, atol=1e-7)
        assert torch.equal(target["model"][name], tensor)


def test_weights_dtypes_and_the_newest(tmp_path: Path) -> None:
    """Each dtype is summed in its precision and rounded once; what has no mean is of the newest."""
    floats = [torch.linspace(-3, 3, 50, dtype=torch.float64) * (number + 1) for number in range(3)]
    states: list[dict[str, Any]] = [
        {
            "f64": values,
            "f32": values.float(),
            "bf16": values.bfloat16(),
            "f8": values.to(torch.float8_e4m3fn),
            "complex": torch.complex(values, -values).to(torch.complex64),
            "count": torch.tensor(number),
            "flag": torch.tensor(number == 1),
            "lr": number,
        }
        for number, values in enumerate(floats)
    ]
    # The newest is that of the greatest step, wherever it stands in the list.
    refs = [saved(tmp_path / str(n), states[n], step=step) for n, step in enumerate((10, 30, 20))]
    report = average(refs, tmp_path / "out", step=7, weights=[1, 2, 5])
    assert report.newest == f"{tmp_path}/1/step-00000030"
    assert (report.num_averaged, report.num_copied, report.num_values) == (5, 2, 1)
    found = tensors_of(f"{tmp_path}/out@7")
    mean = {
        name: sum((w * s[name].to(wide) for w, s in zip((1, 2, 5), states, strict=True)), torch.zeros(())) / 8
        for name, wide in {
            "f64": torch.float64, "f32": torch.float64, "bf16": torch.float32, "f8": torch.float32,
            "complex": torch.complex128,
        }.items()
    }  # fmt: skip
    torch.testing.assert_close(found["f64"], mean["f64"], rtol=1e-15, atol=0)
    torch.testing.assert_close(found["f32"].double(), mean["f32"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["complex"].to(torch.complex128), mean["complex"], rtol=1e-6, atol=1e-9)
    assert found["bf16"].equal(mean["bf16"].bfloat16())
    assert found["f8"].view(torch.uint8).equal(mean["f8"].to(torch.float8_e4m3fn).view(torch.uint8))
    assert found["count"] == 1
    assert found["flag"]
    with open_checkpoint(f"{tmp_path}/out@7") as checkpoint:
        assert checkpoint.read_value("lr") == 1
        assert checkpoint.manifest.tags == ["dcp.save", "average"]


def test_layouts_do_not_matter_and_alike_stays_as_it_is(tmp_path: Path) -> None:
    for name, ranks, dim in (("a", 3, 0), ("b", 2, 1), ("c", 1, 0)):
        write_tiny_checkpoint(open_storage(tmp_path / name), step=1, ranks=ranks, shard_dim=dim)
    refs = [f"{tmp_path}/{name}/step-00000001" for name in "abc"]
    average(refs, tmp_path / "out", step=1, include_optimizer=True)
    assert diff(refs[0], f"{tmp_path}/out@1").equal


def test_every_dtype_and_stock_sources(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    state = every_dtype()
    for name, info in DTYPES.items():  # finite ones: NaN has many bit patterns
        if "float" in name or "complex" in name:
            noise = torch.randint(1, 4, (5, 3), generator=generator)
            state[f"of.{name}"] = noise.to(getattr(torch, info.name))
    stock_save({"model": state, "optim": {"m": torch.ones(2)}}, checkpoint_id=tmp_path / "s", no_dist=True)
    report = average([tmp_path / "s", tmp_path / "s"], tmp_path / "out", step=1)
    assert report.unverified
    assert report.left_out == {"of an optimizer": 1}
    compared = diff(tmp_path / "s", f"{tmp_path}/out@1", key="model.*")
    assert compared.equal, compared.tensors
    average([tmp_path / "s"], tmp_path / "out", step=2, include_optimizer=True)
    assert diff(tmp_path / "s", f"{tmp_path}/out@2").equal


def test_one_message_says_all_that_differs(tmp_path: Path) -> None:
    a = {"x": torch.ones(2), "y": torch.ones(2), "z": torch.ones(2), "old": torch.ones(1)}
    b = {"x": torch.ones(2), "y": torch.ones(3), "z": torch.ones(2).half(), "new": torch.ones(1)}
    refs = [saved(tmp_path / "a", a, step=1), saved(tmp_path / "b", b, step=2)]
    with pytest.raises(StateMismatch) as told:
        average(refs, tmp_path / "out", step=1)
    where = f"{tmp_path}/a/step-00000001 has, unlike {tmp_path}/b/step-00000002,"
    assert told.value.message == (
        f"these checkpoints have no average: {where} no new; {where} old; {where} y as float32 of shape [2], "
        "not float32 of shape [3], z as float32 of shape [2], not float16 of shape [2]"
    )
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    refs = [saved(tmp_path / "a", {"x": torch.ones(2)}, step=1)] * 2
    out = tmp_path / "out"
    for weights in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(ConfigError, match="weights"):
            average(refs, out, step=1, weights=weights)
    with pytest.raises(ConfigError, match="last is for"):
        average(refs, out, step=1, last=1)
    with pytest.raises(CheckpointNotFound, match="not 2 valid"):
        average(tmp_path / "a", out, step=1, last=2)
    with pytest.raises(ConfigError):
        average([], out, step=1)
    with pytest.raises(StepAlreadySaved):
        average(refs, tmp_path / "a", step=1)
    data = tmp_path / "a/step-00000001/__0_0.e0001-s000001.distcp"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    with pytest.raises(CorruptCheckpoint):
        average(refs, out, step=1)
    # The run was claimed by then; no attempt stays in it.
    assert not list(out.glob("step-*"))
