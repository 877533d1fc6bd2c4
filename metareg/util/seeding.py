"""Random numbers that depend only on their purpose, never on earlier draws.

A run has one seed. Everything random in it (initial weights, an augmenter's noise, the tasks of a split) uses a seed
derived from the run's seed and a label, so changing one part of a run does not change the others.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np
import torch

__all__ = [
    "SeparateGenerators", "create_generator", "derive_seed", "draw_distinct", "restore_global_generators",
    "save_global_generators", "seed_global_generators", "task_uniform", "use_seed",
]  # fmt: skip

_TORCH_GENERATOR = RLock()  # all threads of a process share torch's global generator


def derive_seed(seed: int, *labels: str | int) -> int:
    """Derive a seed in [0, 2**63) for the purpose named by `labels`; the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def create_generator(seed: int, *labels: str | int) -> torch.Generator:
    """Create a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


@contextmanager
def use_seed(seed: int, *labels: str | int) -> Iterator[torch.Generator]:
    """Seed torch's global CPU generator for a block and restore it afterwards.

    The default initialisers of `torch.nn` draw from the global generator; inside the block, they depend only on the
    seed. Yields a separate generator for code that takes one. Only one thread at a time can be in the block.
    """
    with _TORCH_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *labels, "global"))
        yield create_generator(seed, *labels)


class SeparateGenerators:
    """Separate states of the global CPU generators for code that draws from them.

    Args:
        seed: the initial seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own: list[torch.Generator] = []
        self._states: Any = None
        self._outside: Any = None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Use these states while the block runs, then restore the previous ones."""
        self._outside = _save_states(self._own)
        if self._states is None:
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
            torch.default_generator.manual_seed(self._seed)
        else:
            _restore_states(self._own, self._states)
        try:
            yield
        finally:
            self._states = _save_states(self._own)
            _restore_states(self._own, self._outside)

    def add(self, generators: Sequence[torch.Generator]) -> None:
        """Seed further generators and save their states too; call it within the block."""
        self._outside[-1].extend(generator.get_state() for generator in generators)
        self._own.extend(generators)
        for generator in generators:
            generator.manual_seed(self._seed)


def _save_states(own: Sequence[torch.Generator]) -> tuple[Any, ...]:
    states = [generator.get_state() for generator in own]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), states


def _restore_states(own: Sequence[torch.Generator], states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for generator, state in zip(own, states[3], strict=True):
        generator.set_state(state)


@contextmanager
def seed_global_generators(seed: int, *labels: str | int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch for a block, and restore them afterwards.

    metareg does not draw from them, but plugins may, and then depend on the seed too. The code around the block is not
    affected.
    """
    before, on_gpus, initial = save_global_generators(), torch.cuda.is_initialized(), torch.initial_seed()
    own = derive_seed(seed, *labels, "generators")
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
    try:
        yield
    finally:
        restore_global_generators(before)
        if not on_gpus:  # like `torch.manual_seed`, which seeds GPUs when they are first used
            torch.cuda.manual_seed_all(initial)


def save_global_generators() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch, as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    return {
        "python": [version, torch.tensor(numbers), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore_global_generators(state: Mapping[str, Any]) -> None:
    """Restore the global generators from what `save_global_generators` returned."""
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def task_uniform(seed: int, split: str, indices: Sequence[int], count: int, label: str = "") -> np.ndarray:
    """Draw uniform numbers in [0, 1) for tasks, each a function of only (seed, split, task number, position, label).

    Counter-based (the SplitMix64 finaliser over a Weyl sequence: Steele, Lea and Flood, OOPSLA 2014), so the numbers of
    many tasks are drawn at once, and any task can be drawn without the previous ones.

    Args:
        seed: the run's seed.
        split: the split's name.
        indices: task numbers, non-negative.
        count: the number of numbers per task.
        label: distinguishes streams of one task.

    Returns:
        float64 array ``[len(indices), count]``.
    """
    stream = np.uint64(derive_seed(seed, "task", split, label))
    numbers = np.asarray(indices, dtype=np.uint64)
    with np.errstate(over="ignore"):
        task = _mix(numbers * np.uint64(0x9E3779B97F4A7C15) + stream)
        position = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
        bits = _mix(task[:, None] + position)
    return (bits >> np.uint64(11)) * 2.0**-53


def draw_distinct(uniform: np.ndarray, population: np.ndarray | int) -> np.ndarray:
    """Draw without replacement, in order: the first steps of the Fisher–Yates shuffle of 0 … population − 1.

    Only positions touched by the shuffle are stored, so the cost does not depend on the population.

    Args:
        uniform: numbers in [0, 1) ``[…, draws]``, one per draw.
        population: the sizes of the populations ``[…]``, at least `draws`.

    Returns:
        int64 ``[…, draws]``, distinct along the last dimension.
    """
    draws = uniform.shape[-1]
    step = np.arange(draws)
    # Step j swaps the entries at positions j and target[j] >= j, and draws the entry that is then at j.
    target = step + (uniform * (np.asarray(population)[..., None] - step)).astype(np.int64)
    drawn, moved = np.empty_like(target), np.empty_like(target)
    for j in range(draws):
        drawn[..., j] = _look_up(target[..., j], target[..., :j], moved[..., :j])
        moved[..., j] = _look_up(np.full(target.shape[:-1], j), target[..., :j], moved[..., :j])
    return drawn


def _look_up(position: np.ndarray, target: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Return the entry at a position after some swaps: from the last swap with this target, otherwise its number."""
    if not target.shape[-1]:
        return position
    hit = target == position[..., None]
    last = hit.shape[-1] - 1 - hit[..., ::-1].argmax(-1)
    return np.where(hit.any(-1), np.take_along_axis(moved, last[..., None], -1)[..., 0], position)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
