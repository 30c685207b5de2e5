"""What is measured, which ratios of it are asked for, and the numbers to reach.

Pure: names and arithmetic, no torch, no effects. Used by the phases for the names and by the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "ALL_LABELS",
    "ALL_TARGETS",
    "DIGEST_TARGETS",
    "FSSPEC_LOAD",
    "FSSPEC_SAVE",
    "FULL",
    "INCREMENTAL_TARGETS",
    "LABELS",
    "LOAD_TARGETS",
    "MACHINE",
    "MEMORY_KINDS",
    "MEMORY_LABELS",
    "MEMORY_TARGETS",
    "METADATA",
    "OURS",
    "PLAN_CACHED",
    "PROCESS",
    "RANKED_LABELS",
    "S3_LABELS",
    "S3_TARGETS",
    "SAFETENSORS",
    "SCALE_LABELS",
    "SCALE_TARGETS",
    "SCALE_UNITS",
    "SHARED",
    "SNAPSHOT",
    "STOCK_KEY",
    "STOCK_LOAD",
    "STOCK_SAVE",
    "SUCCESSOR",
    "TARGETS",
    "TAX_TARGETS",
    "THREAD",
    "TORCH_SAVE",
    "UNDIGESTED",
    "UNITS",
    "WITHOUT",
    "Target",
    "compute_ratios",
    "passes",
]

OURS = "dcp_ckpt"
STOCK_SAVE = "dcp.save"
STOCK_LOAD = "dcp.load"
THREAD = "dcp.async_save thread"
PROCESS = "dcp.async_save process"
SHARED = "dcp.async_save process+shm"
SUCCESSOR = "torch_checkpointing"
PLAN_CACHED = "dcp.async_save thread+plan cache"
SNAPSHOT = "torchsnapshot"
TORCH_SAVE = "torch.save"
SAFETENSORS = "safetensors"
FSSPEC_SAVE = "FsspecWriter"
FSSPEC_LOAD = "FsspecReader"
MACHINE = "machine"
METADATA = ".metadata"
STOCK_KEY = "dcp.load of one key"
FULL = "full save"
WITHOUT = "no checkpoints"
UNDIGESTED = "without digests"

MEMORY_KINDS = ("sharded", "replicated", "S3")
"""Of a state: what `memory.py` weighs."""

LABELS = {
    "memcpy": "copy of the state, memory warm",
    "direct_write": "direct write + fsync of as many bytes",
    "buffered_write": "buffered write + fsync of as many bytes",
    "direct_read": "direct read of as many bytes",
    "cached_read": "read of as many bytes, page cache warm",
    "step": "forward and backward",
    "step_replicated": "forward and backward, replicated state",
    "stall_sharded": "stall: save() + wait at the fence",
    "stall_replicated": "stall, replicated state",
    "held": "held: until the tensors are free; overlap off",
    "durable": "save until durable; overlap off",
    "load_same": "load, same ranks, page cache warm",
    "load_8_4": "load on half the ranks, page cache warm",
    "load_8_6": "load on three quarters of the ranks, page cache warm",
    "load_4_8": "load of half the ranks on all, page cache warm",
    "load_after_save": "load right after a save, page cache as it left it",
    "ddp_load_time": "load of replicated state, page cache warm",
    "ddp_bytes_read": "bytes read for it (rchar, all ranks)",
    "ddp_bytes_reported": "bytes read for it (LoadReport, all ranks)",
    "tax": "tax of one save over K training steps",
    "first_save": "first save of a fresh process until durable",
    "first_save_blocked": "first save of a fresh process holds the trainer",
    "arena": "staging memory over the bytes of the state",
    "writer_memory": "PSS of a writer process without staging memory",
}
"""Metric of `save_latency.py` -> what it is, for people; with the page cache where it matters."""

RANKED_LABELS = {
    "reshard_bytes": "bytes read by a load on half the ranks over those it fills",
    "durable_digests": "save until durable, with and without digests",
    "load_digests": "load, with and without a check of the digests, page cache warm",
    **{
        f"{what}_{change}": f"{shown}, {which}"
        for change, which in (
            ("changed_1", "1 % changed"),
            ("changed_all", "all changed"),
            ("changed_none", "nothing changed"),
        )
        for what, shown in (
            ("stall", "stall"),
            ("durable", "save until durable"),
            ("written", "bytes written"),
        )
    },
}
"""As `LABELS`, of `load_reshard.py`, `digests.py` and `incremental.py`."""

S3_LABELS = {
    "s3_save": "S3: save until durable",
    "s3_load": "S3: load",
    "s3_save_requests": "S3: requests of a save beyond the parts, over objects",
    "s3_save_lookups": "S3: LIST, HEAD and COPY requests of a save",
    "s3_save_total_requests": "S3: all requests of a save",
    "s3_load_requests": "S3: all requests of a load",
    "s3_load_lookups": "S3: LIST, HEAD and COPY requests of a load",
    "s3_load_bytes": "S3: bytes of the ranges asked for by a load, over the state",
    "s3_writer_memory": "S3: greatest PSS of a writer process without staging memory",
}

MEMORY_LABELS = {
    f"memory_{phase}_{kind}": f"{what}, {kind}"
    for kind in MEMORY_KINDS
    for phase, what in (
        ("training", "PSS of the ranks before there are checkpoints"),
        ("idle", "more PSS, nothing saved yet"),
        ("saving", "more PSS at most, during saves"),
        ("kept", "more PSS between saves"),
        ("loading", "more PSS at most than right before it, during loads"),
        ("writer", "PSS of a writer process without staging memory at most"),
        ("save_over_allowed", "that of saves over what is allowed"),
        ("load_over_allowed", "that of loads over what is allowed"),
    )
}

ALL_LABELS = {**LABELS, **RANKED_LABELS, **S3_LABELS, **MEMORY_LABELS}

UNITS = {
    "ddp_bytes_read": "bytes",
    "ddp_bytes_reported": "bytes",
    "arena": "x",
    "writer_memory": "MiB",
    "reshard_bytes": "x",
    **{f"written_changed_{change}": "bytes" for change in ("1", "all", "none")},
    "s3_save_requests": "x",
    "s3_save_lookups": "requests",
    "s3_save_total_requests": "requests",
    "s3_load_requests": "requests",
    "s3_load_lookups": "requests",
    "s3_load_bytes": "x",
    "s3_writer_memory": "MiB",
    **{metric: "x" if "over_allowed" in metric else "MiB" for metric in MEMORY_LABELS},
}
"""Metrics that are not seconds."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One ratio and what it should be.

    Args:
        name: its key in the JSON.
        above, below: metric and system of the numerator and of the denominator; without the second, the
            first is a ratio already.
        needed, aim: bounds of the ratio.
        higher_is_better: the bounds are lower ones.
        also: metrics of this project with upper bounds of their own, which are part of the target.
    """

    name: str
    above: tuple[str, str]
    below: tuple[str, str] | None
    needed: float
    aim: float | None
    higher_is_better: bool = False
    also: tuple[tuple[str, float], ...] = ()


def _same(name: str, system: str, needed: float, aim: float) -> Target:
    """Ours over theirs in the metric that the ratio is named after."""
    return Target(name=name, above=(name, OURS), below=(name, system), needed=needed, aim=aim)


TARGETS = (
    _same("stall_sharded", THREAD, 0.20, 0.02),
    _same("stall_replicated", THREAD, 0.05, 0.02),
    Target(
        name="held_over_memcpy",
        above=("held", OURS),
        below=("memcpy", MACHINE),
        needed=1.5,
        aim=1.1,
    ),
    _same("durable", STOCK_SAVE, 0.70, 0.55),
    Target(
        name="of_direct_write",
        above=("direct_write", MACHINE),
        below=("durable", OURS),
        needed=0.75,
        aim=0.92,
        higher_is_better=True,
    ),
    _same("load_same", STOCK_LOAD, 0.50, 0.30),
    _same("load_8_4", STOCK_LOAD, 0.45, 0.25),
    _same("load_8_6", STOCK_LOAD, 0.45, 0.25),
    _same("load_4_8", STOCK_LOAD, 0.45, 0.25),
    _same("load_after_save", STOCK_LOAD, 1.0, 0.6),
    _same("ddp_bytes_read", STOCK_LOAD, 0.15, 0.126),
    _same("ddp_load_time", STOCK_LOAD, 0.8, 0.6),
    _same("tax", THREAD, 0.5, 0.25),
    _same("first_save", PROCESS, 0.3, 0.1),
    Target(
        name="extra_memory",
        above=("arena", OURS),
        below=None,
        needed=1.02,
        aim=None,
        also=(("writer_memory", 16.0),),
    ),
)
"""The ratios of the contract, in its order."""

S3_TARGETS = (
    _same("s3_save", FSSPEC_SAVE, 0.30, 0.12),
    _same("s3_load", FSSPEC_LOAD, 0.30, 0.10),
    Target(
        name="s3_save_requests",
        above=("s3_save_requests", OURS),
        below=None,
        needed=3.0,
        aim=2.0,
        also=(("s3_save_lookups", 0.0),),
    ),
)
"""The ratios of `s3.py`; the bound on a writer's memory is for 8 of them, and is in `MEMORY_TARGETS`."""

LOAD_TARGETS = (
    *(
        target
        for target in TARGETS
        if target.name.startswith(("load_", "ddp_")) and target.name != "load_after_save"
    ),
    Target(name="reshard_bytes", above=("reshard_bytes", OURS), below=None, needed=1.05, aim=1.02),
)
"""The ratios of `load_reshard.py`."""

DIGEST_TARGETS = (
    Target(
        name="digests",
        above=("durable_digests", OURS),
        below=("durable_digests", UNDIGESTED),
        needed=1.10,
        aim=1.04,
    ),
)
"""The ratio of `digests.py`."""

TAX_TARGETS = tuple(target for target in TARGETS if target.name == "tax")
"""The ratio of `training_tax.py`."""

INCREMENTAL_TARGETS = (
    Target(
        name="incremental_bytes",
        above=("written_changed_1", OURS),
        below=("written_changed_1", FULL),
        needed=0.05,
        aim=0.012,
    ),
    Target(
        name="incremental_durable",
        above=("durable_changed_1", OURS),
        below=("durable_changed_1", FULL),
        needed=0.25,
        aim=0.12,
    ),
)
"""The ratios of `incremental.py`."""

SCALE_LABELS = {
    "planning_1k": "planning of a steady save, 1024 ranks: one rank and rank 0",
    "planning_4k": "planning of a steady save, 4096 ranks: one rank and rank 0",
    "planning_16k": "planning of a steady save, 16384 ranks: one rank and rank 0",
    "planning_rank_16k": "of it, what each rank does",
    "planning_first_16k": "plan of the first save on each rank, 16384 ranks",
    "resume_bytes_16k": "what a rank reads to find its bytes, saved by 16384 ranks",
    "resume_planning_16k": "reading, checking and searching that",
    "list_10000": "list 10,000 checkpoints, cold process",
    "list_api_10000": "list 10,000 checkpoints, warm process",
    "cli_help": "dcp-ckpt --help",
    "cli_list": "dcp-ckpt list, 3 checkpoints",
    "one_tensor": "open a checkpoint of 20,000 chunks and read one tensor",
    "one_tensor_bytes": "bytes read for it (rchar)",
    "bus_to_host": "copy from the GPU to pinned memory",
    "bus_to_gpu": "copy from pinned memory to the GPU",
    "gpu_held": "save() of state on a GPU holds the training, overlap off",
    "gpu_load": "load to a GPU, page cache warm",
}
"""As `LABELS`, of the benchmarks of scale."""

SCALE_UNITS = {"resume_bytes_16k": "bytes", "one_tensor_bytes": "bytes"}

SCALE_TARGETS = (
    _same("planning_1k", METADATA, 1 / 100, 1 / 1000),
    _same("planning_4k", METADATA, 1 / 100, 1 / 1000),
    _same("planning_16k", METADATA, 1 / 100, 1 / 1000),
    _same("resume_bytes_16k", METADATA, 1 / 50, 1 / 500),
    _same("list_10000", METADATA, 1 / 50, 1 / 500),
    Target(name="cli_help", above=("cli_help", OURS), below=None, needed=0.150, aim=None),
    Target(name="cli_list", above=("cli_list", OURS), below=None, needed=0.150, aim=None),
    Target(
        name="one_tensor",
        above=("one_tensor", OURS),
        below=("one_tensor", STOCK_KEY),
        needed=1 / 50,
        aim=1 / 300,
        also=(("one_tensor", 0.010),),
    ),
    _same("gpu_held", THREAD, 0.05, 0.005),
    _same("gpu_load", STOCK_LOAD, 0.40, 0.20),
)
"""The ratios of `planning_scale`, `catalog_scale`, `random_access` and `gpu`; each gives its own ones."""

MEMORY_TARGETS = tuple(
    Target(name=name, above=(name, OURS), below=None, needed=needed, aim=None)
    for name, needed in (
        ("memory_save_over_allowed_sharded", 1.0),
        ("memory_save_over_allowed_replicated", 1.0),
        ("memory_load_over_allowed_sharded", 1.0),
        ("memory_load_over_allowed_replicated", 1.0),
        ("memory_load_over_allowed_S3", 1.0),
        ("memory_writer_sharded", 16.0),
        ("memory_writer_S3", 40.0),
    )
)
"""The ratios of `memory.py`."""

ALL_TARGETS = {
    target.name: target
    for targets in (
        TARGETS,
        LOAD_TARGETS,
        DIGEST_TARGETS,
        INCREMENTAL_TARGETS,
        S3_TARGETS,
        MEMORY_TARGETS,
        SCALE_TARGETS,
    )
    for target in targets
}
"""By name, whatever script gives it."""


def compute_ratios(
    medians: Mapping[tuple[str, str], float], targets: Sequence[Target] = TARGETS
) -> dict[str, float | None]:
    """All ratios; None where a side was not measured or the lower one is 0."""
    return {target.name: _ratio(target, medians) for target in targets}


def passes(target: Target, medians: Mapping[tuple[str, str], float]) -> bool | None:
    """Whether the needed bound is met; None when there is no ratio."""
    ratio = _ratio(target, medians)
    if ratio is None:
        return None
    met = ratio >= target.needed if target.higher_is_better else ratio <= target.needed
    return met and all(medians.get((metric, OURS), bound) <= bound for metric, bound in target.also)


def _ratio(target: Target, medians: Mapping[tuple[str, str], float]) -> float | None:
    above = medians.get(target.above)
    if target.below is None or above is None:
        return above
    below = medians.get(target.below)
    return above / below if below else None
