"""The driver in every layout: saving changes nothing, resumes are exact, any layout resumes any other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import ElasticSampler
from dcp_ckpt.errors import ConfigError
from launch.data import Windows, read_corpus
from launch.model import MODEL_SIZES
from launch.parallel import LAYOUTS
from launch.precision import WorldGradScaler
from launch.report import samples_digest
from tests.distributed.driver import (
    BATCH_SIZE,
    EVERYTHING,
    SMALL_CORPUS_BYTES,
    gradients,
    steps,
    trained,
    trained_compiled,
)

pytestmark = pytest.mark.distributed

BAND = 2e-5
"""Only the order of float32 sums differs; a share that was weighted wrongly shows in the third digit."""


def losses(directory: Path) -> list[float]:
    return [float.fromhex(loss) for _, loss, _, _ in steps(directory)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_mean_over_all_tokens(pool, layout):
    """Adam hardly notices gradients that are all too large by one factor, so losses do not show them."""
    alone = gradients()
    for accumulated in ("1", "2"):
        flags = ("--parallel", layout, "--grad-accum", accumulated)
        ranks = pool.run(gradients, 4, *flags)
        assert {name for rank in ranks for name in rank} == alone.keys()
        for rank in ranks:
            for name, gradient in rank.items():
                torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("layout", ["hsdp", "fsdp+tp", "pp"])
def test_saves_and_resumes_change_nothing(pool, tmp_path, layout):
    flags = ("--parallel", layout, *EVERYTHING)
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    pool.run(trained, 4, str(plain), SMALL_CORPUS_BYTES, "--steps", "8", "--save-strategy", "no", *flags)
    for num_steps in ("5", "8"):
        pool.run(
            trained, 4, str(saving), SMALL_CORPUS_BYTES, "--steps", num_steps, "--save-every", "2", *flags
        )
    assert steps(saving) == steps(plain)
    assert [step for step, *_ in steps(plain)] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_blocks_resume_exactly_and_keep_their_names(pool, tmp_path, layout):
    flags = ("--parallel", layout, "--dropout", "0.1")

    def start(directory: str, *more: str) -> None:
        arguments = (str(tmp_path / "cache"), str(tmp_path / directory), SMALL_CORPUS_BYTES, *flags, *more)
        pool.run(trained_compiled, 2, *arguments, timeout_seconds=500)

    start("plain", "--steps", "4", "--save-strategy", "no")
    start("saving", "--steps", "2")
    start("saving", "--steps", "4")
    assert steps(tmp_path / "saving") == steps(tmp_path / "plain")
    pool.run(trained, 2, str(tmp_path / "saving"), SMALL_CORPUS_BYTES, *flags, "--steps", "5")
    assert [step for step, *_ in steps(tmp_path / "saving")] == [1, 2, 3, 4, 5]


CHAIN: Sequence[tuple[int, str]] = (
    (4, "fsdp"),
    (4, "fsdp+tp"),
    (2, "pp"),
    (3, "ddp"),
    (4, "hsdp"),
    (4, "pp"),
    (2, "fsdp+tp"),
    (1, "fsdp"),
)


def expected_batches(num_steps: int) -> list[list[int]]:
    """The sample ids of each global batch, as one rank alone would draw them."""
    windows = Windows(read_corpus(max_bytes=SMALL_CORPUS_BYTES).train, MODEL_SIZES["tiny"].context)
    order = ElasticSampler(len(windows), BATCH_SIZE, 0, 1, seed=0, drop_last=False)
    batches = [order.last_global_batch for _ in islice(order, num_steps)]
    for epoch in range(num_steps // order.batches_per_epoch):
        first = epoch * order.batches_per_epoch
        seen = [sample for batch in batches[first : first + order.batches_per_epoch] for sample in batch]
        assert sorted(seen) == list(range(len(windows))), "every sample once"
    return batches


def test_any_layout_goes_on_where_another_was(pool, tmp_path):
    """Over two epochs of changing worlds, with the samples and losses of a run on one rank."""
    alone, chain = tmp_path / "alone", tmp_path / "chain"
    num_steps = 2 * len(CHAIN)
    trained(str(alone), SMALL_CORPUS_BYTES, "--steps", str(num_steps), "--save-strategy", "no")
    for number, (world_size, layout) in enumerate(CHAIN, start=1):
        flags = ("--parallel", layout, "--steps", str(2 * number), "--save-every", "2")
        pool.run(trained, world_size, str(chain), SMALL_CORPUS_BYTES, *flags)

    assert [step for step, *_ in steps(chain)] == list(range(1, num_steps + 1))
    digests = [samples_digest(batch) for batch in expected_batches(num_steps)]
    for directory in (alone, chain):
        assert [samples for *_, samples in steps(directory)] == digests
    assert [lr for _, _, lr, _ in steps(chain)] == [lr for _, _, lr, _ in steps(alone)]
    assert losses(chain) == pytest.approx(losses(alone), abs=BAND)


def test_accumulation_sees_the_same_samples_and_losses(pool, tmp_path):
    for number, layout in ((1, "fsdp"), (3, "fsdp"), (3, "ddp"), (3, "pp")):
        directory = tmp_path / f"{number}-{layout}"
        flags = ("--parallel", layout, "--grad-accum", str(number), "--steps", "4", "--save-strategy", "no")
        pool.run(trained, 2, str(directory), SMALL_CORPUS_BYTES, *flags)
        assert [samples for *_, samples in steps(directory)] == [
            samples for *_, samples in steps(tmp_path / "1-fsdp")
        ]
        assert losses(directory) == pytest.approx(losses(tmp_path / "1-fsdp"), abs=BAND)


@pytest.mark.parametrize("layout", ["hsdp", "fsdp+tp", "pp"])
def test_layouts_of_pairs_refuse_odd_worlds(pool, tmp_path, layout):
    for world_size in (1, 3):
        with pytest.raises(ConfigError, match=f"needs an even number of ranks, not {world_size}"):
            pool.run(trained, world_size, str(tmp_path), SMALL_CORPUS_BYTES, "--parallel", layout)
    assert not (tmp_path / "runs").exists()


def one_rank_overflows() -> tuple[float, float]:
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = WorldGradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter * (torch.inf if dist.get_rank() == 1 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return parameter.item(), scaler.get_scale()


def test_a_step_that_overflows_on_one_rank_is_left_out_on_all(pool):
    assert pool.run(one_rank_overflows, 3) == [(1.0, 2.0)] * 3
