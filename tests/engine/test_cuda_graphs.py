"""Steps that a CUDA graph launches compute what the same steps compute without one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from metareg import Episodes, MetaLearner
from metareg.engine import cuda_graphs, tracing
from metareg.engine.cuda_graphs import capture, find_gpu
from metareg.registry.plugins import resolve
from metareg.registry.task_source import TaskSource
from metareg.util.torch_internals import trace

GPU = torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU from NVIDIA")


def mix(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x @ y, x.sum(0), y]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each program of a test, whether it became a CUDA graph."""
    found: list[bool] = []

    def record(
        graph: torch.fx.GraphModule, run: cuda_graphs.Run, leaves: list[Tensor], device: torch.device
    ) -> cuda_graphs.Run:
        result = capture(graph, run, leaves, device)
        found.append(result is not run)
        return result

    monkeypatch.setattr(tracing, "capture", record)
    return found


def draw(step: int, tasks: int = 4) -> Episodes:
    (batch,) = TaskSource.of("sinusoid").episodes("train", range(tasks * step, tasks * (step + 1)), 0)
    return batch


def create_learner(device: str, strategy: str = "vectorized", **options: object) -> MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    return MetaLearner(
        model, "maml", ["cml"], loss="mse", inner_lr=0.05, inner_steps=2, strategy=strategy, device=device, **options
    )


def test_on_a_cpu_nothing_is_captured() -> None:
    inputs = torch.randn(3, 3), torch.randn(3, 3)
    assert find_gpu(trace(mix, inputs), inputs) is None


@on_gpu
def test_results_are_those_of_the_function_and_outlive_the_next_call() -> None:
    first, second = ([torch.randn(5, 5, device="cuda").t() for _ in range(2)] for _ in range(2))
    graph = trace(mix, first)
    run = capture(graph, graph.forward, first, GPU)
    assert run != graph.forward
    one, other = run(*first), run(*second)
    for found, inputs in ((one, first), (other, second)):
        assert all(torch.equal(a, b) for a, b in zip(found, mix(*inputs), strict=True))


@on_gpu
@pytest.mark.parametrize("strategy", ["vectorized", "traced"])
def test_a_training_is_that_of_the_cpu(strategy: str, captured: list[bool]) -> None:
    there, here = create_learner("cuda", strategy), create_learner("cpu", "serial")
    for step in range(20):
        for learner in (there, here):
            learner.step(draw(step))
    assert captured == [True]
    for name, value in here.meta_parameters.items():
        torch.testing.assert_close(there.meta_parameters[name].cpu(), value, rtol=1e-9, atol=1e-9)


@on_gpu
def test_learners_that_take_turns_do_not_meet() -> None:
    learners = [create_learner("cuda", seed=seed) for seed in (0, 1)]
    alone = [create_learner("cpu", "serial", seed=seed) for seed in (0, 1)]
    for step in range(5):
        for learner in (*learners, *alone):
            learner.step(draw(step))
    for learner, other in zip(learners, alone, strict=True):
        for name, value in other.meta_parameters.items():
            torch.testing.assert_close(learner.meta_parameters[name].cpu(), value, rtol=1e-9, atol=1e-9)


@on_gpu
def test_another_stream_runs_without_the_cuda_graph() -> None:
    learner, alone = create_learner("cuda"), create_learner("cpu", "serial")
    stream = torch.cuda.Stream()
    for step in range(6):
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream if step % 2 else torch.cuda.default_stream()):
            learner.step(draw(step))
        torch.cuda.synchronize()
        alone.step(draw(step))
    for name, value in alone.meta_parameters.items():
        torch.testing.assert_close(learner.meta_parameters[name].cpu(), value, rtol=1e-9, atol=1e-9)


@on_gpu
def test_what_would_hold_too_much_memory_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_LARGEST_SHARE", 0.0)
    inputs = [torch.randn(2000, 2000, device="cuda") for _ in range(2)]
    graph = trace(mix, inputs)
    run = capture(graph, graph.forward, inputs, GPU)
    assert run == graph.forward
    monkeypatch.undo()
    assert capture(graph, graph.forward, inputs, GPU) != graph.forward


@on_gpu
def test_what_cannot_be_captured_runs_as_before() -> None:
    inputs = [torch.randn(5, 5, device="cuda") for _ in range(2)]
    graph = trace(mix, inputs)

    def synchronise(x: Tensor, y: Tensor) -> list[Tensor]:
        return [x * float(x.sum()), y]

    assert capture(graph, synchronise, inputs, GPU) is synchronise
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(1, device="cuda")
    run = capture(graph, graph.forward, inputs, GPU)
    assert run != graph.forward
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs), mix(*inputs), strict=True))


@on_gpu
def test_what_may_change_is_never_a_constant() -> None:
    factor, inputs = torch.tensor(2.0), [torch.ones(3, device="cuda")]
    assert find_gpu(trace(lambda x: [x * 2.0 + torch.ones(())], inputs), inputs) == GPU
    assert find_gpu(trace(lambda x: [x * factor], inputs), inputs) is None
    assert find_gpu(trace(lambda x: [x * torch.rand(())], inputs), inputs) is None
    assert find_gpu(trace(lambda x: [x + torch.rand_like(x)], inputs), inputs) is None
    assert find_gpu(trace(lambda x: [x + torch.arange(3).to(x.device)], inputs), inputs) is None


@on_gpu
def test_memory_that_graphs_hold_is_counted() -> None:
    inputs = [torch.randn(500, 500, device="cuda") for _ in range(2)]
    graph = trace(mix, inputs)
    before = cuda_graphs._held[GPU]
    for _ in range(3):
        run = capture(graph, graph.forward, inputs, GPU)
        assert run != graph.forward
        assert cuda_graphs._held[GPU] > before
        del run
    assert cuda_graphs._held[GPU] == before


@on_gpu
def test_settings_and_weights_that_change_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, 5, device="cuda")
    inputs = [torch.randn(5, 5, device="cuda")]
    graph = trace(lambda x: [x @ weight], inputs)
    run = capture(graph, graph.forward, inputs, GPU)
    assert run._is_valid()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not torch.backends.cudnn.deterministic)
    assert not run._is_valid()  # type: ignore[attr-defined]
    monkeypatch.undo()
    weight.data = weight.data + 1
    assert torch.equal(run(*inputs)[0], inputs[0] @ weight)


@on_gpu
@pytest.mark.parametrize("strategy", ["vectorized", "traced"])
def test_convolutions_with_cml_are_captured(strategy: str, captured: list[bool]) -> None:
    task = resolve("tasks", "glyphs", {"ways": 3, "shots": 1, "query": 2, "size": 28, "channels": 1})
    (batch,) = TaskSource.of(task).episodes("train", range(3), 0)
    model = resolve("models", "conv4", {"width": 8}).instance.build(task.instance.spec).double()
    there, here = (
        MetaLearner(
            copy.deepcopy(model), "maml", ["cml"], loss=task.instance.loss, inner_lr=0.1, strategy=each, device=device
        )
        for each, device in ((strategy, "cuda"), ("serial", "cpu"))
    )
    for _ in range(3):
        found, expected = there.meta_gradient(batch)[1], here.meta_gradient(batch)[1]
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-5, atol=1e-8)
    assert captured == [True]
