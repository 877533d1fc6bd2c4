"""Graph tasks: the block path against full-graph DGL, episodes, padding, and modules on the DGL graph itself."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import metareg
from metareg import MetaLearner, PluginError, UsageError, train
from reference import Net, colearner_on_vectors, difference, meta_gradient

if sys.version_info >= (3, 12):
    pytest.skip("DGL has no wheels for this Python", allow_module_level=True)

from metareg_graph import CSBM, BlockNetwork, CiteSeer, Cora, GraphData, GraphFolder, Inputs, OnGraph, Pools, Seeds
from metareg_graph._dgl import call_opaque, import_dgl, make_softmax_twice_differentiable
from metareg_graph.figures import draw_features

conv = pytest.importorskip("dgl.nn", reason="DGL is not installed")
WAYS, SHOTS, QUERY, HIDDEN = 2, 2, 3, 5
LOSS = metareg.Metric("loss", nn.functional.cross_entropy, higher_is_better=False)
"""A metric with different values for almost all tasks, unlike accuracy."""


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a graph with 90 nodes in 6 classes, one of which is a hub, as npz."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("graph") / "small.npz"
    labels = np.arange(90) % 6
    adjacency = rng.random((90, 90)) < np.where(labels[:, None] == labels, 0.15, 0.02)
    adjacency[0] |= rng.random(90) < 0.5
    features = rng.normal(size=(90, 7)) + labels[:, None] * np.linspace(-0.5, 0.5, 7)
    save_npz(path, adjacency, features, labels)
    return path


def save_npz(path: Path, adjacency: np.ndarray, features: np.ndarray, labels: np.ndarray) -> None:
    rows, columns = adjacency.nonzero()
    pointers = np.concatenate([[0], np.bincount(rows, minlength=len(labels)).cumsum()])
    np.savez(path, adj_indptr=pointers, adj_indices=columns, features=features, labels=labels)


def task_on(path: Path, **options: Any) -> GraphFolder:
    return GraphFolder(
        GraphFolder.Config(
            data=str(path),
            **{
                "ways": WAYS,
                "shots": SHOTS,
                "query": QUERY,
                "inputs": "gcn",
                "hops": 2,
                "standardised": False,
                **options,
            },
        )
    )


class Convolutions(nn.Module):
    """The GCN's layers from DGL."""

    def __init__(self, features: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.first, self.second = conv.GraphConv(features, hidden), conv.GraphConv(hidden, hidden)

    def forward(self, graph: Any, x: Tensor) -> Tensor:
        return self.second(graph, self.first(graph, x).relu()).relu()


def network(task: Any, inputs: str = "gcn", hidden: int = HIDDEN) -> BlockNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BlockNetwork(inputs, task.spec, hidden, task.config.hops).to(torch.get_default_dtype())
        nn.init.normal_(model.body.layers[0].bias, std=0.1)
    return model


def full_graph(data: GraphData) -> Net:
    """The GCN on the whole graph with `dgl.nn.GraphConv`, with the block path's parameter names; x are node numbers."""
    graph = import_dgl().add_self_loop(data.graph)
    modules = [conv.GraphConv(1, 1, weight=False, bias=False) for _ in range(2)]

    def body(p: Any, nodes: Tensor) -> Tensor:
        hidden = data.features
        for number, module in enumerate(modules):
            weight, bias = p[f"body.layers.{number}.weight"], p[f"body.layers.{number}.bias"]
            hidden = torch.relu(module(graph, hidden @ weight.T) + bias)
        return hidden[nodes]

    def head(p: Any, features: Tensor) -> Tensor:
        return features @ p["head.weight"].T + p["head.bias"]

    return Net(body, head, colearner_on_vectors, nn.functional.cross_entropy)


def on_nodes(task: Any, indices: range, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the tasks with node numbers as inputs."""
    episodes = type(task)(task.config.model_copy(update={"inputs": "nodes"})).episodes("train", indices, seed)
    return [
        (one.support_x["nodes"][row], one.support_y[row], one.query_x["nodes"][row], one.query_y[row])
        for one in episodes
        for row in range(len(one))
    ]


# ------------------------------------------------------------------------------------------------------ meta-gradients


@pytest.mark.parametrize("augment", [[], ["cml"]], ids=["alone", "cml"])
@pytest.mark.parametrize("algo", ["maml", "anil", "boil", "metasgd"])
def test_meta_gradient_equals_full_graph_dgl(folder: Path, algo: str, augment: list[str]) -> None:
    task = task_on(folder)
    learner = MetaLearner(network(task), algo, augment, inner_steps=3, inner_lr=0.2, strategy="vectorized")
    loss, grads = learner.meta_gradient(task.episodes("train", range(4), 0))
    expected_loss, expected = meta_gradient(
        full_graph(task.data), learner.meta_parameters, on_nodes(task, range(4)),
        algo=algo, inner_lr=0.2, inner_steps=3, gamma=0.2 if augment else None,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    assert difference(grads, expected) < 1e-6


def test_meta_gradient_equals_full_graph_dgl_on_cora(data_folder: Path) -> None:
    path = str(data_folder / "graphs" / "cora.npz")
    task = Cora(Cora.Config(data=path, inputs="gcn", shots=1, query=4, standardised=False))
    learner = MetaLearner(network(task), "maml", ["cml"], inner_steps=2, inner_lr=0.5, strategy="vectorized")
    _, grads = learner.meta_gradient(task.episodes("train", range(3), 0))
    _, expected = meta_gradient(
        full_graph(task.data), learner.meta_parameters, on_nodes(task, range(3)),
        algo="maml", inner_lr=0.5, inner_steps=2, gamma=0.2,
    )  # fmt: skip
    assert difference(grads, expected) < 1e-6


def test_scores_on_cora_are_in_the_order_of_the_tasks(data_folder: Path) -> None:
    task = Cora(Cora.Config(data=str(data_folder / "graphs" / "cora.npz"), inputs="gcn"))
    learner = MetaLearner(network(task), "maml", inner_steps=1, inner_lr=0.5, strategy="vectorized", metric=LOSS)
    assert len(task.episodes("test", range(100), 0)) > 1
    scores = learner.evaluate(task, 100, inner_steps=[1]).scores
    for number in range(0, 100, 9):
        (one,) = task.episodes("test", [number], 0)
        support, labels, query, targets = one.unstack(0)
        loss = nn.functional.cross_entropy(learner.adapt(support, labels)(query), targets)
        assert scores[number, 0].item() == pytest.approx(loss.item())


@pytest.mark.parametrize("algo", ["maml", "anil", "boil", "metasgd"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_module_on_the_graph_gives_the_gradient_of_the_blocks(folder: Path, algo: str, memory: str) -> None:
    task, whole = task_on(folder), task_on(folder, inputs="nodes")
    blocks = network(task)
    module = OnGraph(Convolutions(7), nn.Linear(HIDDEN, WAYS))
    names = {"body.layers.0": "body.module.first", "body.layers.1": "body.module.second", "head": "head"}

    def renamed(name: str) -> str:
        return next(name.replace(old, new) for old, new in names.items() if old in name)

    with torch.no_grad():
        for name, value in blocks.named_parameters():
            transposed = value.T if name.startswith("body") and value.dim() == 2 else value
            module.get_parameter(renamed(name)).copy_(transposed)
    options: dict[str, Any] = {"inner_steps": 2, "inner_lr": 0.2}
    _, fast = MetaLearner(blocks, algo, **options).meta_gradient(task.episodes("train", range(2), 0))
    _, slow = MetaLearner(module, algo, strategy="serial", memory=memory, **options).meta_gradient(
        whole.episodes("train", range(2), 0)
    )
    for name, value in fast.items():
        other = slow[renamed(name)]
        other = other.T if "body" in name and other.dim() == 2 else other
        torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-12)


def layers_of_dgl(model: BlockNetwork, data: GraphData) -> Tensor:
    """Compute the features of all nodes with the layers of `dgl.nn` on the whole graph, with a model's weights."""
    body, graph, x = model.body, data.graph, data.features
    if body.inputs == "sgc":
        layer = conv.SGConv(x.shape[1], HIDDEN, k=body.depth)
        layer.fc.load_state_dict(body.layers[0].state_dict())
        return layer(import_dgl().add_self_loop(graph), x).relu()
    for linear in body.layers:
        if body.inputs == "gcn":
            propagated = conv.GraphConv(1, 1, weight=False, bias=False)(import_dgl().add_self_loop(graph), x)
            x = linear(propagated).relu()
            continue
        width = linear.in_features // 2
        layer = conv.SAGEConv(width, HIDDEN, "mean")
        with torch.no_grad():
            layer.fc_self.weight.copy_(linear.weight[:, :width])
            layer.fc_neigh.weight.copy_(linear.weight[:, width:])
            layer.fc_self.bias.copy_(linear.bias)
        x = layer(graph, x).relu()
    return x


def assert_features_are_those_of_dgl(task: Any, inputs: str, tasks: int) -> None:
    """Compare the features of the blocks of some tasks, drawn one by one."""
    model = network(task, inputs)
    expected = layers_of_dgl(model, task.data)
    for number, (support, _, query, _) in enumerate(on_nodes(task, range(tasks))):
        (stack,) = task.episodes("train", [number], 0)
        for one, nodes in zip(stack.unstack(0)[::2], (support, query), strict=True):
            torch.testing.assert_close(model.body(one), expected[nodes])


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a sparse graph as npz: a layer's neighbourhoods are often no larger than those of the previous layer."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("graph") / "sparse.npz"
    labels = np.arange(300) % 6
    save_npz(path, np.triu(rng.random((300, 300)) < 0.006), rng.normal(size=(300, 7)), labels)
    return path


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
@pytest.mark.parametrize("inputs", ["gcn", "sgc", "mean"])
def test_models_of_any_depth_are_those_of_dgl(folder: Path, sparse: Path, inputs: str, hops: int) -> None:
    for path in (folder, sparse):
        assert_features_are_those_of_dgl(task_on(path, inputs=inputs, hops=hops), inputs, 30)


@pytest.mark.parametrize("hops", [3, 4])
@pytest.mark.parametrize("inputs", ["gcn", "mean"])
@pytest.mark.parametrize("kind", [CiteSeer, Cora])
def test_deep_models_train_on_published_graphs(data_folder: Path, kind: Any, inputs: str, hops: int) -> None:
    task = kind(kind.Config(data=str(data_folder / "graphs"), inputs=inputs, hops=hops))
    learner = MetaLearner(network(task, inputs), "maml", strategy="serial")
    numbers = range(18, 22)  # includes a task whose deeper layer needs no more nodes
    together, one_by_one = (
        [learner.meta_gradient(batch)[0] for batch in batches]
        for batches in ([task.episodes("train", numbers, 0)], [task.episodes("train", [n], 0) for n in numbers])
    )
    torch.testing.assert_close(together[0], torch.stack(one_by_one).mean())


@pytest.mark.parametrize("strategy", ["vectorized", "serial"])
@pytest.mark.parametrize("inputs", ["gcn", "sgc", "mean"])
def test_strategies_agree(folder: Path, inputs: str, strategy: str) -> None:
    task = task_on(folder, inputs=inputs)
    episodes = task.episodes("train", range(3), 0)
    grads = [
        MetaLearner(network(task, inputs), "maml", ["cml"], inner_steps=2, inner_lr=0.3, strategy=each).meta_gradient(
            episodes
        )[1]
        for each in ("serial", strategy)
    ]
    assert difference(grads[1], grads[0]) < 1e-10


# -------------------------------------------------------------------------------------------------- modules on the graph


@pytest.mark.parametrize("layer", ["GraphConv", "SAGEConv", "GATConv", "DotGatConv", "GINConv"])
def test_second_derivatives_of_dgl_layers(layer: str) -> None:
    """Through `opaque` in torch.func, against ordinary autograd on the same layer and finite differences."""
    torch.manual_seed(0)
    graph = import_dgl().add_self_loop(import_dgl().rand_graph(20, 60))
    x = torch.randn(20, 4)
    module = {
        "GraphConv": lambda: conv.GraphConv(4, 3),
        "SAGEConv": lambda: conv.SAGEConv(4, 3, "pool"),
        "GATConv": lambda: conv.GATConv(4, 3, 2),
        "DotGatConv": lambda: conv.DotGatConv(4, 3, 2),
        "GINConv": lambda: conv.GINConv(nn.Linear(4, 3), "max"),
    }[layer]().double()  # some of DGL's parameters are float32 whatever the default type
    names, values = zip(*((name, value.detach()) for name, value in module.named_parameters()), strict=True)

    def run(*values: Tensor) -> Tensor:
        with make_softmax_twice_differentiable():
            return functional_call(module, dict(zip(names, values, strict=True)), (graph, x))

    def objective(values: tuple[Tensor, ...]) -> Tensor:
        def loss(values: tuple[Tensor, ...]) -> Tensor:
            return call_opaque(run, *values).tanh().square().sum()

        grads = torch.func.grad(loss)(values)
        return loss(tuple(value - 0.003 * grad for value, grad in zip(values, grads, strict=True)))

    gradient = torch.func.grad(objective)(values)
    direction = tuple(torch.randn_like(value) for value in values)
    along = sum((one * other).sum() for one, other in zip(gradient, direction, strict=True))
    step = 1e-6
    ends = [
        objective(tuple(value + sign * step * way for value, way in zip(values, direction, strict=True)))
        for sign in (1, -1)
    ]
    assert along.item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=1e-5)


def test_module_on_the_graph_trains_and_runs_serially(folder: Path) -> None:
    task = task_on(folder, inputs="nodes")
    assert not task.stackable
    model = OnGraph(Convolutions(7), nn.Linear(HIDDEN, WAYS))
    learner = MetaLearner(model, "maml", ["cml"], inner_lr=0.5, outer_lr=0.05)
    batch = task.episodes("train", range(3), 0)
    assert learner.choose_strategy(3, 10, task.stackable)[0] == "serial"
    losses = [learner.step(batch).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert learner.evaluate(task, 2, inner_steps=(1,)).tasks == 2
    with pytest.raises(UsageError, match="serial"):
        MetaLearner(model, "maml", inner_lr=0.2, strategy="vectorized").step(task.episodes("train", range(2), 0))


def test_wrong_inputs_are_told(folder: Path) -> None:
    task = task_on(folder, inputs="sgc")
    for model in (network(task_on(folder)), OnGraph(Convolutions(7), nn.Linear(HIDDEN, WAYS))):
        with pytest.raises(UsageError, match=r"needs tasks with inputs='(gcn|nodes)'"):
            MetaLearner(model, "maml").step(task.episodes("train", range(2), 0))


# ------------------------------------------------------------------------------------------------------------- episodes


def test_tasks_are_functions_of_seed_split_and_number(folder: Path) -> None:
    task = task_on(folder)

    def nodes(indices: Any, split: str = "train", seed: int = 0) -> np.ndarray:
        return task._pool(split, seed).draw(split, indices, seed).query

    np.testing.assert_array_equal(nodes(range(8))[5], nodes([5])[0])
    assert not np.array_equal(nodes([5]), nodes([6]))
    assert not np.array_equal(nodes(range(8)), nodes(range(8), seed=1))


def test_episodes_have_different_nodes_of_disjoint_classes(folder: Path) -> None:
    task = task_on(folder)
    labels = task.data.labels.numpy()
    classes = {}
    for split in ("train", "validation", "test"):
        seeds = task._pool(split, 3).draw(split, range(200), 3)
        both = np.concatenate([seeds.support, seeds.query], 1)
        assert all(len(set(row)) == len(row) for row in both)
        of_support = labels[seeds.support].reshape(200, WAYS, SHOTS)
        of_query = labels[seeds.query].reshape(200, WAYS, QUERY)
        assert (of_support == of_support[:, :, :1]).all()
        assert (of_query == of_support[:, :, :1]).all()
        assert (of_support[:, 0, 0] != of_support[:, 1, 0]).all()
        classes[split] = set(labels[both].ravel())
    assert set.union(*classes.values()) == set(range(6))
    assert sum(len(each) for each in classes.values()) == 6


def test_nodes_are_drawn_uniformly() -> None:
    pools = Pools([{0: np.arange(6), 1: np.arange(6, 12)}], "here", 2, 1, 2)
    seeds = pools.draw("train", range(6000), 0)
    for drawn, share in ((seeds.support, 1 / 12), (seeds.query, 1 / 12)):
        counts = Counter(drawn.ravel().tolist())
        assert all(count == pytest.approx(share * drawn.size, rel=0.15) for count in counts.values())
        assert len(counts) == 12


def test_padding_changes_nothing_and_less_than_doubles_the_rows(folder: Path) -> None:
    task = task_on(folder)
    inputs = task._inputs
    model = network(task)
    rows = padded = 0
    for first in range(0, 160, 8):
        stacks = task.episodes("train", range(first, first + 8), 0)
        assert sum(len(stack) for stack in stacks) == 8
        for stack in stacks:
            for x in (stack.support_x, stack.query_x):
                used = x["blocks"][0].abs().sum(1) > 0
                rows, padded = rows + int(used.sum()), padded + used.numel()
    assert padded <= 2 * rows
    (stack, *_) = task.episodes("train", range(8), 0)
    x = stack.unstack(0)[2]
    unpadded = x["blocks"][0].abs().sum(0) > 0
    tight = {"x": x["x"][unpadded], "blocks": [x["blocks"][0][:, unpadded]]}
    torch.testing.assert_close(model.body(x), model.body(tight), rtol=1e-14, atol=1e-14)
    assert inputs.table.shape == (90, 7)


def test_a_hub_gets_a_stack_of_its_own() -> None:
    star = torch.zeros(200, dtype=torch.int64), torch.arange(1, 201)
    data = GraphData.from_edges(*star, torch.randn(220, 2), torch.zeros(220, dtype=torch.int64))
    seeds = Seeds(np.array([[0, 1], [2, 3], [201, 202], [203, 204]]), np.arange(205, 213).reshape(4, 2))
    targets = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
    stacks = Inputs(data, "gcn", 2).episodes(seeds, targets, lambda count, label: np.zeros((4, count)))
    assert sorted(len(stack) for stack in stacks) == [1, 3]
    assert {stack.support_x["x"].shape[1] >= 201 for stack in stacks if len(stack) == 1} == {True}


def test_fanout_bounds_neighbours_and_keeps_sums_right_on_average(folder: Path) -> None:
    full, thinned = task_on(folder), task_on(folder, fanout=3)
    hub = np.zeros((1, 1), dtype=np.int64)
    targets = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)

    def propagated(task: Any, number: int) -> Tensor:
        (one,) = task._inputs.episodes(
            Seeds(hub, hub), targets, lambda count, label: metareg.task_uniform(0, "train", [number], count, label)
        )
        block = one.support_x["blocks"][0][0]
        assert task is full or int((block != 0).sum()) == 4
        return block @ one.support_x["x"][0]

    mean = torch.stack([propagated(thinned, number) for number in range(800)]).mean(0)
    torch.testing.assert_close(mean, propagated(full, 0), rtol=0.1, atol=0.1)
    assert torch.equal(propagated(thinned, 7), propagated(thinned, 7))


def test_csbm_graphs_are_new_and_as_asked(folder: Path) -> None:  # noqa: ARG001
    task = CSBM(CSBM.Config(nodes=60, degree=5.0, homophily=0.9))
    data = task._generate_graphs("test", range(40), 0)
    source, destination = data.graph.edges()
    assert (data.members[source] == data.members[destination]).all()
    assert data.graph.num_edges() / data.graph.num_nodes() == pytest.approx(5.0, rel=0.1)
    within = (data.labels[source] == data.labels[destination]).double().mean().item()
    assert within == pytest.approx(0.9, abs=0.02)
    one, two = (task._generate_graphs(split, [0], 0).features for split in ("train", "test"))
    assert not torch.allclose(one, two)
    batch, alone = task.episodes("test", range(6), 0), task.episodes("test", [4], 0)
    torch.testing.assert_close(
        network(task).body(batch[0].unstack(4)[2]),
        network(task).body(alone[0].unstack(0)[2]),
    )


def test_csbm_is_learned_and_drawn(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    with pictures.drawn():
        run = metareg.train(
            "maml", "cml", "csbm", out=tmp_path / "run", steps=40, meta_batch=4, eval_tasks=10, test_tasks=20, device="cpu",
        )  # fmt: skip
    assert run.evaluation is not None
    assert run.evaluation.mean(5) > 0.75
    assert {"confusion.png", "features.png", "learning-curve.png"} <= {path.name for path in run.plots}
    figure = draw_features(run.learner, run.source.plugin.instance._select_pictured(0)[:2])
    assert all("principal component (" in axes.get_xlabel() for axes in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "class 0", "class 1", "support nodes", "predicted wrongly",
    ]  # fmt: skip
    again = metareg.Run.load(run.path).evaluate(20, (5,))
    assert again.mean(5) == pytest.approx(run.evaluation.mean(5))


@pytest.mark.parametrize(("model", "inputs"), [("sgc", "sgc"), ("graphsage", "mean"), ("gcn", "gcn")])
def test_a_model_says_what_its_task_prepares(model: str, inputs: str) -> None:
    from metareg.runs.options import assemble

    selection = assemble({"task": "csbm", "model": model}, {"layers": 3})
    assert selection.config.task.config["inputs"] == inputs
    assert selection.config.task.config["hops"] == 3
    assert selection.task.instance.config.hops == 3


# ---------------------------------------------------------------------------------------------------------- without DGL


def test_without_dgl_the_module_imports_and_graph_tasks_say_what_to_install(data_folder: Path) -> None:
    code = (
        "import sys, metareg_graph\n"
        "assert 'dgl' not in sys.modules\n"
        "sys.modules['dgl'] = None\n"
        "import metareg\n"
        "for name in ('csbm', 'cora'):\n"
        "    try: metareg.train('maml', task=name, steps=1)\n"
        "    except metareg.PluginError as error: print(name, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"METAREG_DATA": str(data_folder), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    for name, line in zip(("csbm", "cora"), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{name} Graph tasks need DGL, which is not installed")
        assert "metareg[graph]" in line


def test_a_newer_python_is_told_that_there_are_no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dgl", None)
    monkeypatch.setattr("metareg_graph._dgl.sys.version_info", (3, 13))
    with pytest.raises(PluginError, match=r"no wheels for Python 3.13: use Python 3.11"):
        import_dgl()


@pytest.mark.parametrize("inputs", ["gcn", "sgc", "mean"])
def test_standardised_rows_are_centred_in_each_graph_and_of_one_length(inputs: str) -> None:
    task = CSBM(CSBM.Config(nodes=30, standardised=False))
    data = task._generate_graphs("test", range(3), 0)
    raw, standardised = (Inputs(data, inputs, 2, standardised=each).table for each in (False, True))
    for number in range(3):
        rows = raw[data.members == number]
        expected = nn.functional.normalize(rows - rows.mean(0), dim=1) * Inputs.LENGTH
        torch.testing.assert_close(standardised[data.members == number], expected)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_skip_shows_the_head_the_propagated_inputs(folder: Path, hops: int) -> None:
    tasks = {inputs: task_on(folder, inputs=inputs, hops=hops) for inputs in ("gcn", "sgc")}
    x, smoothed = (task.episodes("test", [0], 0)[0].unstack(0)[2] for task in tasks.values())
    model = BlockNetwork("gcn", tasks["gcn"].spec, HIDDEN, hops, skip=True)
    features = model.to(torch.get_default_dtype()).body(x)
    assert features.shape[1] == model.head.in_features
    torch.testing.assert_close(features[:, HIDDEN:], smoothed)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["maml", "anil", "boil", "metasgd"])
def test_every_algorithm_learns_by_the_defaults_of_generated_graphs(tmp_path: Path, algo: str) -> None:
    def accuracy(**options: Any) -> float:
        run = train(algo, task="csbm", out=tmp_path / str(options), test_inner_steps=[5], threads=1, **options)
        assert run.evaluation is not None
        return run.evaluation.mean(5)

    trained, hardly = accuracy(), accuracy(steps=1, outer_lr=1e-9)
    assert trained > 0.93  # the nearest mean of propagated features has 0.924
    assert trained > hardly + 0.003
