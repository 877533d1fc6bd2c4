"""Few-shot regression of curves from formulas, and the multilayer perceptron for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from metareg import Episodes, Field, MetaLearner, PluginConfig, Task, TaskSpec, format_count, hookimpl, task_uniform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOW, _HIGH = -5.0, 5.0


class CurveConfig(PluginConfig):
    """Options of every curve task."""

    shots: int = Field(10, ge=1, description="Support points of a task.")
    query: int = Field(10, ge=1, description="Query points of a training task.")
    eval_query: int = Field(100, ge=1, description="Query points of a validation or test task.")


class _Curves(Task):
    """Tasks that are curves y = f(x) on [−5, 5]; a subclass computes a curve from the numbers drawn for a task."""

    contract = 1
    Config = CurveConfig
    loss = "mse"
    default_model = "mlp"
    recommended: ClassVar[Mapping[str, Any]] = {
        "steps": 20_000,
        "meta_batch": 25,
        "inner_steps": 1,
        "algo.inner_lr": 0.01,
        "outer_lr": 1e-3,
        # Its default step size of 0.1 diverges here in the second training step, and with damping after about 1,500.
        "imaml": {"algo.inner_lr": 0.01, "algo.damping": 0.0},
    }
    numbers: ClassVar[int]
    """The number of uniform numbers that determine a curve."""

    def __init__(self, config: CurveConfig) -> None:
        self.config = config

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(input_shape=(1,), output_shape=(1,))

    def curve(self, u: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return y ``[tasks, points]`` of the curves given by uniform numbers `u` ``[tasks, numbers]``."""
        raise NotImplementedError

    @hookimpl
    def episodes(self, split: str, indices: Sequence[int], seed: int) -> Episodes:
        query = self.config.query if split == "train" else self.config.eval_query
        u = task_uniform(seed, split, indices, self.numbers, "curve")
        x = _LOW + (_HIGH - _LOW) * task_uniform(seed, split, indices, self.config.shots + query, "points")
        inputs, targets = (torch.from_numpy(part).float().unsqueeze(-1) for part in (x, self.curve(u, x)))
        shots = self.config.shots
        return Episodes(inputs[:, :shots], targets[:, :shots], inputs[:, shots:], targets[:, shots:])

    @hookimpl
    def figures(self, learner: MetaLearner, seed: int) -> Mapping[str, Figure]:
        """Draw four test curves: support points, truth, and the model before and after adaptation."""
        return {"fits": _draw_fits(self, learner, seed)}


class Sinusoid(_Curves):
    """Sine curves y = A sin(x − φ), the standard regression benchmark.

    Amplitude A uniform in [0.1, 5.0], phase φ uniform in [0, π], x uniform in [−5, 5].

    Reference:
        Finn, Abbeel and Levine, ICML 2017, arXiv 1703.03400, §5.1.
    """

    numbers = 2

    def curve(self, u: np.ndarray, x: np.ndarray) -> np.ndarray:
        amplitude, phase = 0.1 + 4.9 * u[:, :1], math.pi * u[:, 1:2]
        return amplitude * np.sin(x - phase)


class Harmonic(_Curves):
    """Sums of two sines, y = a₁ sin(ωx + b₁) + a₂ sin(2ωx + b₂): harder, because the frequency also changes.

    ω uniform in [0.5, 2.0], a₁ and a₂ uniform in [0, 2], b₁ and b₂ uniform in [0, 2π], x uniform in [−5, 5].

    Reference:
        Lacoste et al., Uncertainty in Multitask Transfer Learning, 2018, arXiv 1806.07528, §5.1 (there with x around a
        random centre and with noise; here on the interval of the sinusoid task and without).
    """

    # One inner step cannot infer five numbers: after 5,000 training steps, MAML's error on validation tasks is 1.12
    # with one step and 0.87 with five; predicting zero has 1.2.
    recommended: ClassVar[Mapping[str, Any]] = {
        **_Curves.recommended,
        "steps": 10_000,
        "inner_steps": 5,
        # Step sizes learned over five steps grow until training diverges. With one step, the error on validation tasks
        # after that step is 0.75 and 0.80 (two seeds).
        "metasgd": {"inner_steps": 1},
    }
    numbers = 5

    def curve(self, u: np.ndarray, x: np.ndarray) -> np.ndarray:
        omega = 0.5 + 1.5 * u[:, :1]
        first, second = 2 * u[:, 1:2], 2 * u[:, 2:3]
        shift, second_shift = 2 * math.pi * u[:, 3:4], 2 * math.pi * u[:, 4:5]
        return first * np.sin(omega * x + shift) + second * np.sin(2 * omega * x + second_shift)


class SinusoidLine(_Curves):
    """Half of the tasks are sine curves as in `Sinusoid`, half are lines y = ax + b.

    a and b uniform in [−3, 3], x uniform in [−5, 5].

    Reference:
        Finn, Xu and Levine, Probabilistic Model-Agnostic Meta-Learning, NeurIPS 2018, arXiv 1806.02817, §6.1 (there with
        normal noise on y and normal slopes; here without noise and with bounded slopes).
    """

    numbers = 5

    def curve(self, u: np.ndarray, x: np.ndarray) -> np.ndarray:
        sine = (0.1 + 4.9 * u[:, :1]) * np.sin(x - math.pi * u[:, 1:2])
        line = (6 * u[:, 2:3] - 3) * x + (6 * u[:, 3:4] - 3)
        return np.where(u[:, 4:5] < 0.5, sine, line)


class MLP:
    """A multilayer perceptron with ReLU; the last layer is the head. 1-40-40-1 on curves, as in Finn et al. (2017)."""

    contract = 1

    class Config(PluginConfig):
        hidden: list[int] = Field([40, 40], min_length=1, description="Widths of the hidden layers.")

    def __init__(self, config: Config) -> None:
        if any(width < 1 for width in config.hidden):
            raise ValueError(f"widths must be positive, got {config.hidden}")
        self.config = config

    @hookimpl
    def build(self, spec: TaskSpec) -> nn.Module:
        return MultilayerPerceptron(spec, self.config.hidden)


class MultilayerPerceptron(nn.Module):
    """``[examples, *input_shape]`` → features ``[examples, hidden[-1]]`` → ``[examples, outputs]``."""

    def __init__(self, spec: TaskSpec, hidden: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(spec.input_shape)
        for each in hidden:
            layers += [nn.Linear(width, each), nn.ReLU()]
            width = each
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, math.prod(spec.output_shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.body(x))
        return outputs


def _draw_fits(task: _Curves, learner: MetaLearner, seed: int) -> Figure:
    from matplotlib.figure import Figure  # nothing else needs it

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    x = torch.linspace(_LOW, _HIGH, 200).unsqueeze(-1)
    curves = task_uniform(seed, "test", range(4), task.numbers, "curve")
    episodes = task.episodes("test", range(4), seed)
    steps = max(1, learner.config.inner_steps)
    grid = figure.subplots(2, 2, sharex=True)
    for number, axes in enumerate(grid.flat):
        support_x, support_y = episodes.support_x[number], episodes.support_y[number]
        truth = task.curve(curves[number : number + 1], x.squeeze(-1).numpy()[None])[0]
        axes.plot(x, truth, color="0.35", lw=1.5, label="truth")
        for after, style in ((0, ":"), (steps, "-"), (10, "--")):
            if after == steps == 10:
                continue
            adapted = learner.adapt(support_x, support_y, steps=after)
            with torch.no_grad():
                fitted = adapted(x.to(learner.device)).cpu()
            label = "before" if after == 0 else f"after {format_count(after, 'step')}"
            axes.plot(x, fitted, style, lw=1.8, label=label)
        axes.plot(support_x.squeeze(-1), support_y.squeeze(-1), "k^", ms=6, label="support")
        axes.set_title(f"test task {number}", fontsize=10)
        axes.grid(alpha=0.25)
    for axes in grid[-1]:
        axes.set_xlabel("x")
    for axes in grid[:, 0]:
        axes.set_ylabel("y")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
