"""Drawing without replacement, for many tasks at once."""

from __future__ import annotations

import numpy as np

__all__ = ["draw_distinct"]


def draw_distinct(uniform: np.ndarray, population: np.ndarray | int) -> np.ndarray:
    """Ordered draws without replacement: the first steps of Fisher and Yates' shuffle of 0 … population − 1.

    Only the positions that the shuffle has touched are kept, so that the cost does not depend on the population.

    Args:
        uniform: numbers in [0, 1) ``[…, draws]``, one a draw.
        population: how many there are to draw from ``[…]``, at least `draws`.

    Returns:
        int64 ``[…, draws]``, distinct along the last dimension.
    """
    draws = uniform.shape[-1]
    step = np.arange(draws)
    # Step j swaps the entries at the positions j and target[j] >= j, and draws what then stands at j.
    target = step + (uniform * (np.asarray(population)[..., None] - step)).astype(np.int64)
    drawn, moved = np.empty_like(target), np.empty_like(target)
    for j in range(draws):
        drawn[..., j] = _look_up(target[..., j], target[..., :j], moved[..., :j])
        moved[..., j] = _look_up(np.full(target.shape[:-1], j), target[..., :j], moved[..., :j])
    return drawn


def _look_up(position: np.ndarray, target: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """What stands at a position after some swaps: what the last one with this target put there, else its number."""
    if not target.shape[-1]:
        return position
    hit = target == position[..., None]
    last = hit.shape[-1] - 1 - hit[..., ::-1].argmax(-1)
    return np.where(hit.any(-1), np.take_along_axis(moved, last[..., None], -1)[..., 0], position)
