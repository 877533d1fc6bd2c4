"""Reference training loops of MAML and ANIL without metareg, which the benchmarks compare it with.

Every class trains its own copy of a model with one way of computing the meta-gradient and has the same two methods:
`gradient` for the check that all compute the same, and `step` for the clock. Tasks come stacked, as ``(support_x,
support_y, query_x, query_y)`` with a leading task dimension.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.optim.adam import adam

from metareg.engine.products import simplify_products
from metareg.engine.step_loop import divide, join
from metareg.engine.tracing import remove_idle_operations
from metareg.util.compiler import compile_graph
from metareg.util.torch_internals import create_loop, trace

Tasks = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def mlp(hidden: int = 40) -> nn.Module:
    """The regression network of the MAML paper, 1-40-40-1."""
    return nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, BatchNorm on the batch at hand, ReLU and 2×2 max-pooling; then one linear layer.

    Args:
        channels: of every block.
        size: height and width of the square images.
        image_channels: 1 or 3.
        ways: classes.
    """

    def __init__(self, channels: int, size: int, image_channels: int = 1, ways: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(4):
            layers += [
                nn.Conv2d(channels if block else image_channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels, track_running_stats=False),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * (size // 16) ** 2, ways)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class Reference(ABC):
    """One way of training a model by MAML.

    Args:
        model: is copied.
        loss: ``loss(outputs, targets) -> scalar``, the mean over a task's examples.
        inner_lr: step size of the inner loop.
        inner_steps: adaptation steps.
        outer_lr: step size of Adam.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, inner_lr: float, inner_steps: int = 1, outer_lr: float = 1e-3
    ) -> None:
        self.model = copy.deepcopy(model)
        self.loss = loss
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=outer_lr, fused=True)

    @abstractmethod
    def backward(self, tasks: Tasks) -> float:
        """Store the mean meta-gradient in the parameters' ``.grad``, which must be None, and return the mean loss."""

    def gradient(self, tasks: Tasks) -> dict[str, Tensor]:
        """The mean meta-gradient by parameter name."""
        self.optimizer.zero_grad()
        self.backward(tasks)
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, tasks: Tasks) -> float:
        """One training step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.backward(tasks)
        self.optimizer.step()
        return loss


class ClonedModules(Reference):
    """The loop of learn2learn: each task adapts a clone of the module, whose parameters stay on the autograd graph."""

    def backward(self, tasks: Tasks) -> float:
        total = torch.zeros(())
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            learner = _differentiable_clone(self.model)
            for _ in range(self.inner_steps):
                error = self.loss(learner(support_x), support_y)
                grads = torch.autograd.grad(error, list(learner.parameters()), create_graph=True)
                _replace_parameters(learner, lambda p, g: p - self.inner_lr * g, iter(grads))
            total = total + self.loss(learner(query_x), query_y)
        mean = total / len(tasks[0])
        mean.backward()
        return mean.item()


class FunctionalLoop(Reference):
    """A loop over tasks with `torch.func.functional_call` and `torch.autograd.grad`, without copies of the module.

    Args:
        adapts: the beginnings of the names of the parameters that the inner loop adapts; ``("head.",)`` makes it ANIL,
            computed as MAML computes it: the whole network in every inner step.
    """

    def __init__(self, *args: Any, adapts: Collection[str] = ("",), **options: Any) -> None:
        super().__init__(*args, **options)
        self.params = dict(self.model.named_parameters())
        self.adapted = [name for name in self.params if name.startswith(tuple(adapts))]

    def backward(self, tasks: Tasks) -> float:
        total = torch.zeros(())
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            params = self.params
            for _ in range(self.inner_steps):
                error = self.loss(functional_call(self.model, params, (support_x,)), support_y)
                grads = torch.autograd.grad(error, [params[name] for name in self.adapted], create_graph=True)
                params = params | {
                    name: params[name] - self.inner_lr * g for name, g in zip(self.adapted, grads, strict=True)
                }
            total = total + self.loss(functional_call(self.model, params, (query_x,)), query_y)
        mean = total / len(tasks[0])
        mean.backward()
        return mean.item()


class Higher(Reference):
    """A loop over tasks with the package `higher`, like its own MAML example."""

    def backward(self, tasks: Tasks) -> float:
        import higher

        total = 0.0
        inner = torch.optim.SGD(self.model.parameters(), lr=self.inner_lr)
        for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
            with higher.innerloop_ctx(self.model, inner, copy_initial_weights=False) as (learner, optimizer):
                for _ in range(self.inner_steps):
                    optimizer.step(self.loss(learner(support_x), support_y))
                error = self.loss(learner(query_x), query_y) / len(tasks[0])
                error.backward()
            total += error.item()
        return total


class ParallelMetalearn(Reference):
    """The package `parallel-metalearn` (`metalearn`): its MAML with its vmap backend, all tasks in one chunk.

    Its step includes the optimizer, so `step` calls the package's own.
    """

    def __init__(self, model: nn.Sequential, *args: Any, tasks: int, **options: Any) -> None:
        from metalearn.algorithms import MAML
        from metalearn.inner_optimizers import InnerSGD
        from metalearn.loss.base import BaseLoss
        from metalearn.model_wrappers import MAML_Model

        super().__init__(model, *args, **options)

        class WithoutKeywords(nn.Module):
            """A model that accepts the keywords which the package passes to every part."""

            def __init__(self, part: nn.Module) -> None:
                super().__init__()
                self.part = part

            def forward(self, x: Tensor, **_: Any) -> Tensor:
                outputs: Tensor = self.part(x)
                return outputs

        class OutputLoss(BaseLoss):  # type: ignore[misc]
            """A loss of the outputs, with the metric that the package requires."""

            def __init__(self, loss: Loss) -> None:
                super().__init__()
                self.loss = loss

            def forward(self, out_dict: Any, targets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
                loss = self.loss(out_dict["logits"], targets)
                return loss, loss.detach()

        assert isinstance(self.model, nn.Sequential)
        wrapped = MAML_Model(backbone=WithoutKeywords(self.model[:-1]), head=WithoutKeywords(self.model[-1]))
        inner = InnerSGD(wrapped.get_fast_weights(), inner_lr=self.inner_lr, learn_lr=False, first_order=False)
        self.algorithm = MAML(
            model=wrapped, optimizer=self.optimizer, inner_optimizer=inner, support_loss_fn=OutputLoss(self.loss),
            inner_steps=self.inner_steps, chunk_size=tasks, backend="vmap", device=torch.device("cpu"),
        )  # fmt: skip

    def backward(self, tasks: Tasks) -> float:
        """Take the package's whole step; ``.grad`` then holds the gradient from before its update."""
        return self.step(tasks)

    def step(self, tasks: Tasks) -> float:
        loss, _ = self.algorithm.step(iter([tasks]), training=True)
        return float(loss)


class TracedByHand(Reference):
    """metareg's technique by hand: `torch.func`, traced once, simplified, optionally compiled, and Adam
    as a function.

    It has no plugins, checks or options: one graph for one set of shapes.

    Args:
        compiled: hand the graph to the compiler.
    """

    def __init__(self, *args: Any, compiled: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params = dict(self.model.named_parameters())
        self.compiled = compiled
        self.graph: Callable[..., list[Tensor]] | None = None
        self.function: Callable[..., list[Tensor]]
        self.moments = [[torch.zeros_like(p) for p in self.params.values()] for _ in range(2)]
        self.steps = [torch.zeros(()) for _ in self.params]

    def backward(self, tasks: Tasks) -> float:
        with torch.no_grad():
            if self.graph is None:
                self.graph = self._trace(tasks)
            *grads, loss = self.graph(*self.params.values(), *tasks)
        for p, g in zip(self.params.values(), grads, strict=True):
            p.grad = g
        return loss.item()

    def _trace(self, tasks: Tasks) -> Callable[..., list[Tensor]]:
        names = list(self.params)

        def support_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.loss(functional_call(self.model, params, (x,)), y)

        def task_loss(params: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            for _ in range(self.inner_steps):
                grads = grad(support_loss)(params, sx, sy)
                params = {name: params[name] - self.inner_lr * grads[name] for name in names}
            return support_loss(params, qx, qy)

        def meta_gradient(*leaves: Tensor) -> list[Tensor]:
            params = dict(zip(names, leaves, strict=False))
            grads, losses = vmap(grad_and_value(task_loss), in_dims=(None, 0, 0, 0, 0))(params, *leaves[len(names) :])
            return [*(value.mean(0) for value in grads.values()), losses.mean()]

        leaves = [*self.params.values(), *tasks]
        graph = remove_idle_operations(trace(meta_gradient, leaves))
        self.function = meta_gradient
        if not self.compiled:
            return graph.forward
        simplify_products(graph)
        return compile_graph(graph, leaves)

    def step(self, tasks: Tasks) -> float:
        with torch.no_grad():
            if self.graph is None:
                self.graph = self._trace(tasks)
            *grads, loss = self.graph(*self.params.values(), *tasks)
            adam(
                list(self.params.values()), grads, *self.moments, [], self.steps, fused=True, amsgrad=False, beta1=0.9,
                beta2=0.999, lr=1e-3, weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip
        return loss.item()


class LoopByHand(TracedByHand):
    """The compiled steps of a block in one program, by hand: all parameters and both of Adam's moments are vectors."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, compiled=True, **options)
        vector = join(value.detach() for value in self.params.values())
        self.vectors = [vector, torch.zeros_like(vector), torch.zeros_like(vector)]
        self.done = 0
        self.loop: Callable[..., list[Tensor]] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters after the steps taken."""
        return divide(self.vectors[0], self.params)

    def take_steps(self, batches: Tasks) -> Tensor:
        """Take a step with each batch ``[steps, tasks, …]``; returns the losses before them ``[steps]``."""
        count = len(batches[0])
        factors = torch.tensor(
            [
                (1e-3 / (1 - 0.9**step), math.sqrt(1 - 0.999**step))
                for step in range(self.done + 1, self.done + count + 1)
            ]
        )
        with torch.no_grad():
            inputs = [torch.tensor(0), *self.vectors, torch.zeros(count), torch.tensor(count), factors, *batches]
            if self.graph is None:
                support_x, support_y, query_x, query_y = (part[0] for part in batches)
                self.graph = self._trace((support_x, support_y, query_x, query_y))
            if self.loop is None:
                self.loop = self._compile_loop(inputs)
            _, *self.vectors, losses = self.loop(*inputs)
        self.done += count
        return losses

    def _compile_loop(self, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        def take_step(number: Tensor, *leaves: Tensor) -> list[Tensor]:
            vector, averages, squares, losses, _, *given = leaves
            (size, root), *tasks = (torch.index_select(each, 0, number.view(1)).squeeze(0) for each in given)
            *grads, loss = self.function(*divide(vector, self.params).values(), *tasks)
            gradient = join(grads)
            averages = averages.lerp(gradient, 0.1)
            squares = 0.999 * squares + 0.001 * gradient * gradient
            vector = vector - size * averages / (squares.sqrt() / root + 1e-8)
            return [number + 1, vector, averages, squares, losses.index_copy(0, number.view(1), loss.view(1))]

        def goes_on(number: Tensor, *leaves: Tensor) -> Tensor:
            return number < leaves[4]

        body = remove_idle_operations(trace(take_step, inputs))
        simplify_products(body)
        return compile_graph(create_loop(trace(goes_on, inputs), body, 5), inputs)


def _differentiable_clone(module: nn.Module) -> nn.Module:
    """A module of the same structure whose parameters are clones of the original's, on the autograd graph."""
    clone = copy.copy(module)
    clone._parameters = {name: None if p is None else p.clone() for name, p in module._parameters.items()}  # type: ignore[misc]
    clone._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    clone._modules = {name: None if m is None else _differentiable_clone(m) for name, m in module._modules.items()}
    return clone


def _replace_parameters(module: nn.Module, update: Callable[[Tensor, Tensor], Tensor], grads: Any) -> None:
    """Replace the parameters, in the order of `module.parameters()`."""
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = update(p, next(grads))  # type: ignore[assignment]
    for child in module._modules.values():
        if child is not None:
            _replace_parameters(child, update, grads)
