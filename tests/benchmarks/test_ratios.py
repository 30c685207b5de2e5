"""The ratios of the contract: all are there, computed from the right rows, in the right direction."""

from __future__ import annotations

import pytest

from benchmarks.ratios import (
    LABELS,
    MACHINE,
    OURS,
    PROCESS,
    STOCK_LOAD,
    STOCK_SAVE,
    TARGETS,
    THREAD,
    compute_ratios,
    passes,
)

BY_NAME = {target.name: target for target in TARGETS}
MEDIANS = {
    ("stall_sharded", OURS): 0.01,
    ("stall_sharded", THREAD): 0.1,
    ("stall_replicated", OURS): 0.01,
    ("stall_replicated", THREAD): 0.1,
    ("held", OURS): 0.12,
    ("memcpy", MACHINE): 0.1,
    ("durable", OURS): 0.5,
    ("durable", STOCK_SAVE): 1.0,
    ("direct_write", MACHINE): 0.4,
    **{
        (name, system): seconds
        for name in ("load_same", "load_8_4", "load_8_6", "load_4_8", "load_after_save", "ddp_load_time")
        for system, seconds in ((OURS, 0.2), (STOCK_LOAD, 0.5))
    },
    ("ddp_bytes_read", OURS): 10.0,
    ("ddp_bytes_read", STOCK_LOAD): 80.0,
    ("tax", OURS): 0.1,
    ("tax", THREAD): 0.4,
    ("first_save", OURS): 1.0,
    ("first_save", PROCESS): 10.0,
    ("arena", OURS): 1.01,
    ("writer_memory", OURS): 11.0,
}
EXPECTED = {
    "stall_sharded": 0.1,
    "stall_replicated": 0.1,
    "held_over_memcpy": 1.2,
    "durable": 0.5,
    "of_direct_write": 0.8,
    "load_same": 0.4,
    "load_8_4": 0.4,
    "load_8_6": 0.4,
    "load_4_8": 0.4,
    "load_after_save": 0.4,
    "ddp_bytes_read": 0.125,
    "ddp_load_time": 0.4,
    "tax": 0.25,
    "first_save": 0.1,
    "extra_memory": 1.01,
}


def test_every_ratio_is_computed_in_the_order_of_the_contract():
    ratios = compute_ratios(MEDIANS)
    assert list(ratios) == list(EXPECTED)
    assert ratios == pytest.approx(EXPECTED)
    assert {target.above[0] for target in TARGETS} <= LABELS.keys()


def test_what_was_not_measured_has_no_ratio():
    without = {key: value for key, value in MEDIANS.items() if key != ("tax", THREAD)}
    assert compute_ratios(without)["tax"] is None
    assert passes(BY_NAME["tax"], without) is None
    assert compute_ratios({**MEDIANS, ("tax", THREAD): 0.0})["tax"] is None
    assert set(compute_ratios({}).values()) == {None}


def test_bounds_are_upper_ones_but_for_the_share_of_the_disk():
    assert passes(BY_NAME["durable"], MEDIANS)
    assert not passes(BY_NAME["stall_replicated"], MEDIANS)
    assert passes(BY_NAME["of_direct_write"], MEDIANS)
    assert not passes(BY_NAME["of_direct_write"], {**MEDIANS, ("durable", OURS): 0.6})


def test_a_heavy_writer_fails_the_memory_target():
    assert passes(BY_NAME["extra_memory"], MEDIANS)
    assert not passes(BY_NAME["extra_memory"], {**MEDIANS, ("writer_memory", OURS): 17.0})
