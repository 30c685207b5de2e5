"""Export: a committed checkpoint as files that other programs read.

Owns the order: what is exported is decided, and every file's size known, before anything is written; files
get their names once all of them are whole. Called by the command line and by users' own scripts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from dcp_ckpt.format.torch_file import torch_file_framing
from dcp_ckpt.ops.checkpoint import Checkpoint, open_checkpoint
from dcp_ckpt.ops.exporting.contents import read_contents
from dcp_ckpt.ops.exporting.dcp_files import dcp_files
from dcp_ckpt.ops.exporting.files import PlannedFile
from dcp_ckpt.ops.exporting.payloads import Payloads
from dcp_ckpt.ops.exporting.place import ExportPlace, outdated_files, place_of, require_room
from dcp_ckpt.ops.exporting.plan import ExportPlan, plan_export
from dcp_ckpt.ops.exporting.request import ExportFormat, ExportRequest, target_dtype
from dcp_ckpt.ops.exporting.safetensors_files import safetensors_files
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.output import Output, open_output

if TYPE_CHECKING:
    import torch

__all__ = ["ExportProgress", "ExportReport", "export"]

_SHARD_BYTES = 5_000_000_000
"""As other savers of models have it."""

ExportProgress = Callable[[int, int], None]
"""Called with the bytes written so far and those in all."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, and where it is now.

    Args:
        path: the directory or file.
        step: None where nobody knows.
        files: their names, the one that was published last at the end.
        num_tensors, num_values, num_bytes: what is in them.
        prefix: what the names of tensors have lost.
        converted: "float32 to bfloat16" -> how many tensors.
        num_fused: weights that an adapter was added to.
        left_out: reason -> how many tensors and values.
        unverified: what could not be checked when it was read; empty for checkpoints of ours.
        notes: what else should be known.
    """

    path: str
    format: ExportFormat
    step: int | None
    files: tuple[str, ...]
    num_tensors: int
    num_values: int
    num_bytes: int
    prefix: str
    converted: Mapping[str, int]
    num_fused: int
    left_out: Mapping[str, int]
    unverified: str = ""
    notes: tuple[str, ...] = ()


def export(
    ref: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: ExportFormat = "safetensors",
    dtype: str | torch.dtype | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strip_prefix: str | None = None,
    max_shard_bytes: int | None = None,
    fuse_lora: bool = False,
    lora_alpha: float | None = None,
    force: bool = False,
    progress: ExportProgress | None = None,
) -> ExportReport:
    """Write one committed checkpoint as files for other programs. One process, without a GPU; blocks.

    Every block read is checked against its digest. Nothing half-written stays behind an error, and the files
    appear when all of them are whole and durable. Memory: the largest tensor (with its adapters), or 32 MiB
    of smaller ones, and about 64 MiB.

    Args:
        ref: as in `open_checkpoint`; also a stock DCP directory.
        out: a directory or URL; for `torch` a file, and for `safetensors` one if its name ends so.
        format: `safetensors`, in the layout of Hugging Face: `model.safetensors`, or shards and an index;
            `torch`, a file that `torch.load(weights_only=True)` reads as a dictionary of tensors; `dcp`, a
            directory for stock `dcp.load`.
        dtype: convert floating tensors to bfloat16, float16, float32 or float64.
        include: globs of whole stored names (`model.layers.*`). Without, what belongs to models; for `dcp`,
            as long as neither dtype nor fuse_lora is given, everything.
        exclude: globs of what is left out of that.
        strip_prefix: what the exported names lose; by default `model.`, or `model.<key>.` where one of
            several models is exported alone; for `dcp` nothing.
        max_shard_bytes: of the tensors in one safetensors file; by default 5 GB, or one file if `out` is.
        fuse_lora: add LoRA adapters to their weights and leave them out, so that a plain model remains.
        lora_alpha: the scale of adapters whose scale is not stored is `lora_alpha / rank`.
        force: replace an export that is there.
        progress: told how far it is; what it raises ends the export.

    Raises:
        CheckpointNotFound: there is no such checkpoint.
        StateMismatch: a glob matches nothing, the format cannot hold a dtype, adapters cannot be fused.
        CorruptCheckpoint: the checkpoint is damaged, or was deleted meanwhile.
        ConfigError: the arguments contradict each other, or `out` is a checkpoint.
        StorageExists: something is there already.
        StorageFull: there is no room; found before anything is written.
        StorageError: a read or write failed.
    """
    request = ExportRequest(
        format=format,
        dtype=None if dtype is None else target_dtype(dtype),
        include=_globs(include),
        exclude=_globs(exclude),
        strip_prefix=strip_prefix,
        max_shard_bytes=max_shard_bytes,
        fuse_lora=fuse_lora,
        lora_alpha=lora_alpha,
    )
    place = place_of(out, format)
    with open_checkpoint(ref) as checkpoint:
        source = checkpoint.source()
        contents, values = read_contents(checkpoint, source, with_values=format == "dcp")
        plan = plan_export(contents, request)
        files = _files(plan, values, request, place)
        with open_output(open_storage(place.root), replace=force) as output:
            find_outdated = partial(
                outdated_files, output.storage, place, files, source=checkpoint.url, force=force
            )
            find_outdated()  # which refuses what cannot be
            require_room(output.storage, files)
            payloads = Payloads(source, plan.tensors)
            _write(output, files, payloads, progress)
            output.publish(find_outdated)
            path = "/".join(filter(None, (output.storage.url.rstrip("/"), place.name)))
        return _report(checkpoint, plan, files, payloads, path, format)


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _files(
    plan: ExportPlan, values: Mapping[str, Any], request: ExportRequest, place: ExportPlace
) -> list[PlannedFile]:
    if request.format == "dcp":
        return dcp_files(plan, values)
    if request.format == "safetensors":
        default = _SHARD_BYTES if place.name is None else None
        return safetensors_files(plan, name=place.name, max_shard_bytes=request.max_shard_bytes or default)
    described = [(tensor.names, tensor.dtype, tensor.shape) for tensor in plan.tensors]
    return [
        PlannedFile(
            name=place.name or "",
            tensors=plan.tensors,
            framing=lambda: torch_file_framing(described),
            needs_crc=True,
        )
    ]


def _write(
    output: Output, files: Sequence[PlannedFile], payloads: Payloads, progress: ExportProgress | None
) -> None:
    """All files, one after the other, each from its beginning to its end."""
    written_bytes = 0
    total_bytes = sum(file.num_bytes for file in files)
    for file in files:
        with output.writing(file.name, size_bytes=file.num_bytes) as writer:
            offset = 0
            for data in _content(file, payloads):
                writer.write_segment(offset, data)
                offset += len(data)
                if progress is not None:
                    progress(written_bytes + offset, total_bytes)
        written_bytes += file.num_bytes


def _content(file: PlannedFile, payloads: Payloads) -> Iterator[memoryview]:
    framing = file.framing()
    yield memoryview(next(framing))
    for windows in payloads.read(file.tensors):
        crc = yield from _checked(windows) if file.needs_crc else _unchecked(windows)
        yield memoryview(framing.send(crc))


def _checked(windows: Iterator[memoryview]) -> Generator[memoryview, None, int]:
    """The same windows, and in the end the CRC-32 of all of them."""
    crc = 0
    for window in windows:
        crc = crc32(window, crc)
        yield window
    return crc


def _unchecked(windows: Iterator[memoryview]) -> Generator[memoryview, None, int]:
    yield from windows
    return 0


def _report(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    files: Sequence[PlannedFile],
    payloads: Payloads,
    path: str,
    format: ExportFormat,
) -> ExportReport:
    overflows = [
        f"{name}: finite elements that became infinite in the new dtype: {count}"
        for name, count in payloads.overflowed.items()
    ]
    return ExportReport(
        path=path,
        format=format,
        step=checkpoint.step,
        files=tuple(file.name for file in files),
        num_tensors=len(plan.tensors),
        num_values=len(plan.values),
        num_bytes=sum(file.num_bytes for file in files),
        prefix=plan.prefix,
        converted={f"{stored} to {to}": count for (stored, to), count in plan.converted.items()},
        num_fused=plan.num_fused,
        left_out=dict(sorted(Counter(plan.left_out.values()).items())),
        unverified=checkpoint.unverified,
        notes=(*plan.notes, *overflows),
    )
