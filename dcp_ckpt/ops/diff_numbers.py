"""How far two tensors of one shape are apart, summed up window by window. Imports torch when it counts.

Called by `ops.diff`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DifferenceCounter", "TensorNumbers"]

_SLICE_ELEMENTS = 1 << 18
"""Numbers are compared in double precision, which takes up to 16 times the memory of the elements."""


@dataclass(frozen=True, kw_only=True)
class TensorNumbers:
    """What changed from A to B.

    Args:
        num_elements: of the tensor.
        num_different: elements whose numbers differ; two NaNs do not.
        max_abs: the largest |b - a| of elements that are finite in both; None where there are none, or
            where it is beyond double precision.
        mean_abs: the mean of these; likewise.
        relative: the norm of b - a over the norm of a, of the same elements; None also where a is zero.
        num_nan_a, num_nan_b, num_inf_a, num_inf_b: elements that are NaN, and that are infinite.
    """

    num_elements: int
    num_different: int
    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    num_nan_a: int
    num_nan_b: int
    num_inf_a: int
    num_inf_b: int


class DifferenceCounter:
    """Takes the windows of one pair of tensors; of complex numbers magnitudes are meant."""

    def __init__(self) -> None:
        self.is_equal = True
        """Whether dtype and all bits are equal so far."""
        self._num_elements = 0
        self._num_different = 0
        self._num_finite = 0
        self._max = 0.0
        self._sum = 0.0
        self._squares = 0.0
        self._squares_a = 0.0
        self._nan = [0, 0]
        self._inf = [0, 0]

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Count one window: contiguous tensors of one shape, on the CPU."""
        import torch

        self._num_elements += a.numel()
        is_equal = a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        self.is_equal = self.is_equal and is_equal
        for start in range(0, a.numel(), _SLICE_ELEMENTS):
            part = slice(start, start + _SLICE_ELEMENTS)
            self._add_slice(a.view(-1)[part], b.view(-1)[part])

    def numbers(self) -> TensorNumbers:
        """Of all that was counted."""
        norm_a, norm = math.sqrt(self._squares_a), math.sqrt(self._squares)
        any_finite = self._num_finite > 0
        return TensorNumbers(
            num_elements=self._num_elements,
            num_different=self._num_different,
            max_abs=_number(self._max) if any_finite else None,
            mean_abs=_number(self._sum / self._num_finite) if any_finite else None,
            relative=_number(norm / norm_a) if norm_a and math.isfinite(norm_a) else None,
            num_nan_a=self._nan[0],
            num_nan_b=self._nan[1],
            num_inf_a=self._inf[0],
            num_inf_b=self._inf[1],
        )

    def _add_slice(self, a: torch.Tensor, b: torch.Tensor) -> None:
        wide = [_wide(part) for part in (a, b)]
        for which, part in enumerate(wide):
            self._nan[which] += int(part.isnan().sum())
            self._inf[which] += int((part.isinf() & ~part.isnan()).sum())
        # Integers beyond 53 bits are told apart as they are, and then measured as doubles.
        same = (a == b) if a.dtype == b.dtype and not _fits_double(a) else (wide[0] == wide[1])
        both_nan = wide[0].isnan() & wide[1].isnan()
        self._num_different += int((~(same | both_nan)).sum())
        finite = wide[0].isfinite() & wide[1].isfinite()
        first, second = wide[0][finite], wide[1][finite]
        if first.numel():
            change = (second - first).abs()
            self._num_finite += first.numel()
            self._max = max(self._max, float(change.max()))
            self._sum += float(change.sum())
            self._squares += float(change.square().sum())
            self._squares_a += float(first.abs().square().sum())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(-1).view(torch.uint8)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _fits_double(tensor: torch.Tensor) -> bool:
    """Whether doubles hold it exactly; for some of these dtypes the CPU has no comparison."""
    return tensor.is_floating_point() or tensor.is_complex()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
