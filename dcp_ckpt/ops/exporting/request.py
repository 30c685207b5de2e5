"""What was asked for, as one checked value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.format.dtypes import dtype_name

__all__ = ["ExportFormat", "ExportRequest", "target_dtype"]

ExportFormat = Literal["safetensors", "torch", "dcp"]

_DTYPE_NAMES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
    "fp64": "float64",
    "float64": "float64",
    "double": "float64",
}
"""What people write -> torch's name. The float8 types are left out: without scales they only lose."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """See `dcp_ckpt.export`.

    Raises:
        ConfigError: settings that make no sense, alone or together.
    """

    format: ExportFormat
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strip_prefix: str | None = None
    max_shard_bytes: int | None = None
    fuse_lora: bool = False
    lora_alpha: float | None = None

    def __post_init__(self) -> None:
        if self.format not in get_args(ExportFormat):
            raise ConfigError(f"format {self.format!r}: choose one of {', '.join(get_args(ExportFormat))}")
        if self.max_shard_bytes is not None and self.format != "safetensors":
            raise ConfigError(f"max_shard_bytes is for safetensors only; {self.format} has one file of data")
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes is {self.max_shard_bytes}; it must be at least 1")
        if self.lora_alpha is not None and not self.fuse_lora:
            raise ConfigError("lora_alpha is for fuse_lora only")
        if self.lora_alpha is not None and not math.isfinite(self.lora_alpha):
            raise ConfigError(f"lora_alpha is {self.lora_alpha}; it must be a finite number")

    @property
    def models_only(self) -> bool:
        """Whether the models alone are exported, where no glob says otherwise.

        A DCP directory is a whole training state. What dtype and fusing make of a model, its optimizer's
        state no longer fits.
        """
        return self.format != "dcp" or self.fuse_lora or self.dtype is not None


def target_dtype(dtype: object) -> str:
    """torch's name, without `torch.`, of a dtype or of what people call it.

    Raises:
        ConfigError: not one that tensors are converted to.
    """
    name = dtype_name(dtype).lower()
    if name not in _DTYPE_NAMES:
        raise ConfigError(
            f"dtype {str(dtype)!r:.40}: floating tensors are converted to bfloat16, float16, float32 or "
            "float64"
        )
    return _DTYPE_NAMES[name]
