"""The files of a model in safetensors: one, or shards of bounded size and their index, as HF loaders expect.

Pure. Called by `ops.export`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dcp_ckpt.errors import ConfigError, StateMismatch
from dcp_ckpt.format.safetensors import (
    INDEX_NAME,
    MOST_HEADER_BYTES,
    SAFETENSORS_DTYPES,
    WHOLE_NAME,
    header,
    model_index,
    payload_order,
    shard_name,
)
from dcp_ckpt.ops.exporting.files import PlannedFile, document, plain_framing
from dcp_ckpt.ops.exporting.plan import ExportPlan, ExportTensor
from dcp_ckpt.wording import shown_names

__all__ = ["safetensors_files"]

_RESERVED_NAME = "__metadata__"


def safetensors_files(
    plan: ExportPlan, *, name: str | None, max_shard_bytes: int | None
) -> list[PlannedFile]:
    """Lay out a model; the last file is the one to publish last.

    Args:
        name: of the one file; None for the names of the HF layout.
        max_shard_bytes: of the tensors in one file; one that is larger gets a file of its own. None sets no
            limit.

    Raises:
        StateMismatch: a dtype or a name that the format cannot hold.
        ConfigError: there would be several files where one was named.
    """
    _refuse_unstorable(plan.tensors)
    shards = _shards(plan.tensors, max_shard_bytes)
    if len(shards) == 1:
        return [_file(name or WHOLE_NAME, shards[0])]
    if name is not None:
        raise ConfigError(
            f"{sum(tensor.num_bytes for tensor in plan.tensors)} bytes need {len(shards)} shards of at most "
            f"{max_shard_bytes}, which one file {name!r} cannot be: give a directory, or no max_shard_bytes"
        )
    names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    files = [_file(shard, tensors) for shard, tensors in zip(names, shards, strict=True)]
    held = {tensor.name: file.name for file in files for tensor in file.tensors}
    total_bytes = sum(tensor.num_bytes for tensor in plan.tensors)
    return [*files, document(INDEX_NAME, model_index(held, total_bytes))]


def _refuse_unstorable(tensors: Sequence[ExportTensor]) -> None:
    unknown = sorted({tensor.dtype for tensor in tensors} - SAFETENSORS_DTYPES.keys())
    if unknown:
        names = [f"{tensor.name} ({tensor.dtype})" for tensor in tensors if tensor.dtype in unknown]
        raise StateMismatch(
            f"safetensors has no {' and no '.join(unknown)}: {shown_names(names)}; exclude them, or export "
            "to format torch or dcp"
        )
    if any(tensor.name == _RESERVED_NAME for tensor in tensors):
        raise StateMismatch(f"a tensor called {_RESERVED_NAME} cannot be stored in safetensors: exclude it")


def _shards(tensors: Sequence[ExportTensor], max_bytes: int | None) -> list[list[ExportTensor]]:
    """In the order of the model, so that a layer is in one shard or two."""
    shards: list[list[ExportTensor]] = [[]]
    shard_bytes = 0
    for tensor in tensors:
        if shards[-1] and max_bytes is not None and shard_bytes + tensor.num_bytes > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += tensor.num_bytes
    return shards


def _file(name: str, tensors: Sequence[ExportTensor]) -> PlannedFile:
    ordered = tuple(tensors[number] for number in payload_order([tensor.dtype for tensor in tensors]))
    aliases = {alias: tensor.name for tensor in ordered for alias, _ in tensor.aliases}
    start = header([(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered], aliases)
    if len(start) > MOST_HEADER_BYTES:
        raise StateMismatch(
            f"the header of {name} would have {len(start)} bytes, and readers accept {MOST_HEADER_BYTES}: "
            "choose a smaller max_shard_bytes"
        )
    pieces = [start, *(b"" for _ in ordered)]
    return PlannedFile(name=name, tensors=ordered, framing=lambda: plain_framing(pieces))
