"""Training steps of MAML, ANIL and Meta-SGD as they are written in JAX: `vmap`, `jit`, `optax.adam`, and one `lax.scan` over
steps, so that no Python runs between two of them.

XLA gets one thread, as torch does in the benchmarks. It reads that when JAX is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

if TYPE_CHECKING:
    import torch

Arrays = dict[str, Array]
Tasks = tuple[Array, Array, Array, Array]
Forward = Callable[[Mapping[str, Array], Array], Array]
Loss = Callable[[Array, Array], Array]


def mlp(params: Mapping[str, Array], x: Array) -> Array:
    """`loops.mlp`, with torch's names and shapes of parameters."""
    for layer in ("0", "2"):
        x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
    return x @ params["4.weight"].T + params["4.bias"]


def conv4(params: Mapping[str, Array], x: Array) -> Array:
    """`loops.Conv4` of images ``[examples, channels, height, width]``."""
    for number in range(0, 16, 4):
        kernel, bias, scale, shift = (
            params[f"body.{layer}"]
            for layer in (f"{number}.weight", f"{number}.bias", f"{number + 1}.weight", f"{number + 1}.bias")
        )
        x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME") + bias[:, None, None]
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        x = (x - mean) * lax.rsqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
        x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return x.reshape(len(x), -1) @ params["head.weight"].T + params["head.bias"]


def mse(outputs: Array, targets: Array) -> Array:
    """The mean squared error."""
    return jnp.square(outputs - targets).mean()


def cross_entropy(outputs: Array, targets: Array) -> Array:
    """The mean cross-entropy of class numbers."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def draw_sinusoids(key: Array, tasks: int, shots: int, dtype: Any) -> Tasks:
    """Tasks of the distribution of the sinusoid plugin, as many support as query points."""
    for_amplitude, for_phase, for_points = jax.random.split(key, 3)
    amplitude = jax.random.uniform(for_amplitude, (tasks, 1, 1), dtype, 0.1, 5.0)
    phase = jax.random.uniform(for_phase, (tasks, 1, 1), dtype, 0.0, jnp.pi)
    x = jax.random.uniform(for_points, (tasks, 2 * shots, 1), dtype, -5.0, 5.0)
    y = amplitude * jnp.sin(x - phase)
    return x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]


class JaxTraining:
    """Training of a model from given meta-parameters.

    Args:
        meta: meta-parameters by name; learned step sizes are those of the names ``STEP_SIZES + parameter``.
        forward: the model's outputs.
        loss: the mean over a task's examples.
        inner_lr: step size of the inner loop, where it is not learned.
        inner_steps: adaptation steps.
        adapts: the beginnings of the names of the parameters that the inner loop adapts.
        at_once: map the tasks of a batch by `jax.vmap`; by `lax.map`, one after the other, otherwise.
        outer_lr: step size of Adam.
    """

    STEP_SIZES = "metasgd.step_size."

    def __init__(
        self,
        meta: Mapping[str, torch.Tensor | np.ndarray],
        forward: Forward,
        loss: Loss,
        *,
        inner_lr: float,
        inner_steps: int,
        adapts: Collection[str] = ("",),
        at_once: bool = True,
        outer_lr: float = 1e-3,
    ) -> None:
        self.meta: Arrays = {name: to_jax(value) for name, value in meta.items()}
        self._forward, self._loss = forward, loss
        self._inner_lr, self._inner_steps, self._at_once = inner_lr, inner_steps, at_once
        model = [name for name in meta if not name.startswith(self.STEP_SIZES)]
        self._adapted = [name for name in model if name.startswith(tuple(adapts))]
        self._optimizer = optax.adam(outer_lr)
        self._state = self._optimizer.init(self.meta)
        self._scan = jax.jit(self._train, donate_argnums=(0, 1))
        self._scan_drawing = jax.jit(self._draw_and_train, static_argnames=("steps", "draw"), donate_argnums=(0, 1))

    def gradient(self, tasks: Tasks) -> dict[str, torch.Tensor]:
        """The mean meta-gradient by name."""
        grads = jax.jit(jax.grad(self._batch_loss))(self.meta, tasks)
        return {name: to_torch(value) for name, value in grads.items()}

    def train(self, batches: Tasks) -> float:
        """Steps on given tasks ``[steps, tasks, …]``; returns the last loss."""
        self.meta, self._state, loss = self._scan(self.meta, self._state, batches)
        return float(loss)

    def draw_and_train(self, steps: int, draw: Callable[[Array], Tasks], seed: int = 0) -> float:
        """Steps on tasks that the program draws itself; returns the last loss."""
        key = jax.random.key(seed)
        self.meta, self._state, loss = self._scan_drawing(self.meta, self._state, key, steps=steps, draw=draw)
        return float(loss)

    def _task_loss(self, meta: Arrays, support_x: Array, support_y: Array, query_x: Array, query_y: Array) -> Array:
        def support_loss(adapted: Arrays) -> Array:
            return self._loss(self._forward({**meta, **adapted}, support_x), support_y)

        adapted = {name: meta[name] for name in self._adapted}
        for _ in range(self._inner_steps):
            grads = jax.grad(support_loss)(adapted)
            adapted = {
                name: value - meta.get(self.STEP_SIZES + name, self._inner_lr) * grads[name]
                for name, value in adapted.items()
            }
        return self._loss(self._forward({**meta, **adapted}, query_x), query_y)

    def _batch_loss(self, meta: Arrays, tasks: Tasks) -> Array:
        if self._at_once:
            return jax.vmap(partial(self._task_loss, meta))(*tasks).mean()
        return lax.map(lambda task: self._task_loss(meta, *task), tasks).mean()

    def _step(self, meta: Arrays, state: Any, tasks: Tasks) -> tuple[Arrays, Any, Array]:
        loss, grads = jax.value_and_grad(self._batch_loss)(meta, tasks)
        updates, state = self._optimizer.update(grads, state)
        return optax.apply_updates(meta, updates), state, loss

    def _train(self, meta: Arrays, state: Any, batches: Tasks) -> tuple[Arrays, Any, Array]:
        def step(carry: tuple[Arrays, Any], tasks: Tasks) -> tuple[tuple[Arrays, Any], Array]:
            meta, state, loss = self._step(*carry, tasks)
            return (meta, state), loss

        (meta, state), losses = lax.scan(step, (meta, state), batches)
        return meta, state, losses[-1]

    def _draw_and_train(
        self, meta: Arrays, state: Any, key: Array, steps: int, draw: Callable[[Array], Tasks]
    ) -> tuple[Arrays, Any, Array]:
        def step(carry: tuple[Arrays, Any], key: Array) -> tuple[tuple[Arrays, Any], Array]:
            meta, state, loss = self._step(*carry, draw(key))
            return (meta, state), loss

        (meta, state), losses = lax.scan(step, (meta, state), jax.random.split(key, steps))
        return meta, state, losses[-1]


def to_jax(value: torch.Tensor | np.ndarray) -> Array:
    """A copy; class numbers in 32 bits, JAX's own."""
    array = value if isinstance(value, np.ndarray) else value.detach().numpy()
    return jnp.array(array.astype(np.int32) if array.dtype == np.int64 else array)


def to_torch(value: Array) -> torch.Tensor:
    """A copy."""
    import torch

    return torch.from_numpy(np.array(value))
