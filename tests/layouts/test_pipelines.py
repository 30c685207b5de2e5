"""Pipelined training resumes exactly, and on any other cut of the model."""

from __future__ import annotations

import pytest

from tests.layouts import pipelines

pytestmark = pytest.mark.distributed

CUTS: dict[str, tuple[int, dict[str, int]]] = {
    "two stages": (2, {}),
    "three stages": (3, {}),
    "two stages, sharded": (4, {"num_shards": 2}),
    "interleaved": (2, {"num_chunks": 2}),
}


def merged(results: list[dict[str, str]]) -> dict[str, str]:
    """What all stages have; ranks of one stage have the same."""
    found: dict[str, str] = {}
    for result in results:
        assert all(found.setdefault(name, value) == value for name, value in result.items())
    return found


@pytest.mark.parametrize("cut", CUTS)
def test_a_pipelined_run_goes_on_bit_for_bit_and_loads_into_other_cuts(pool, tmp_path, cut):
    world, settings = CUTS[cut]
    trained = pool.run(pipelines.train, world, str(tmp_path), settings)
    saved = merged([at_save for at_save, _ in trained])
    assert sum("/exp_avg_sq" in name for name in saved) == 2 * pipelines.NUM_LAYERS + 2
    assert pool.run(pipelines.resume, world, str(tmp_path), settings, 2) == trained
    assert pool.run(pipelines.load_whole, 1, str(tmp_path)) == [saved]
    cuts = [*CUTS.values()]
    for other_world, other in (cuts[cuts.index(CUTS[cut]) - 1], cuts[cuts.index(CUTS[cut]) - 2]):
        resumed = pool.run(pipelines.resume, other_world, str(tmp_path), other, 0)
        assert merged([loaded for loaded, _ in resumed]) == saved
