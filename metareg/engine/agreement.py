"""Comparison of tensors that were computed in two ways, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compare"]

# Relative to the norm. Second derivatives amplify rounding; these values separate it from wrong derivatives and frozen
# values.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 0.05}
_TOLERANCE = 0.3
"""For types with 8 or 11 bits of precision."""
_CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""For the same operations on a CPU, or operations that a compiler has fused."""


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], precision: torch.dtype | None = None, *, close: bool = False
) -> str | None:
    """Describe how the tensors differ; None if they agree.

    Args:
        found: tensors of any shapes; those that hold no floating-point numbers are ignored.
        expected: the same number of tensors.
        precision: the type in which they were computed, if it differs from their own.
        close: whether the same operations computed them, so that on a CPU only the order of sums can differ.
    """
    pairs = [
        (one.detach().flatten(), other.detach().flatten())
        for one, other in zip(found, expected, strict=True)
        if other.is_floating_point()
    ]
    if not pairs:
        return None
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    if not torch.equal(one.isfinite(), other.isfinite()):
        return "they are not finite where the others are"
    one, other = (side.nan_to_num(0.0, 0.0, 0.0) for side in (one, other))
    tolerances = _CLOSE if close and other.device.type == "cpu" else _TOLERANCES
    tolerance = tolerances.get(precision or other.dtype, _TOLERANCE)
    difference, norm = (one - other).norm().item(), other.norm().item()
    if difference <= tolerance * norm + torch.finfo(other.dtype).eps:
        return None
    return f"they differ by {100 * difference / norm:.2g} %" if norm else "they are not zero where the others are"
