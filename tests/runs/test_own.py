"""Runs on users' own objects: tasks and modules that no package installs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import metareg
import metareg_regression
from metareg import Episodes, MetaLearner, Run, TaskSpec, UsageError, derive_seed, hookimpl
from processes import environment

SMALL: dict[str, Any] = {
    "steps": 12, "meta_batch": 2, "log_every": 3, "eval_every": 6, "eval_tasks": 3, "test_tasks": 4,
    "test_inner_steps": [1], "strategy": "serial", "checkpoint_every": 4, "keep_checkpoints": 100, "inner_lr": 0.1,
}  # fmt: skip
RESULT = ("metrics.jsonl", "results.json", "checkpoints/final.safetensors", "config.yaml")


def draw(split: str, index: int, seed: int, classes: int = 0) -> tuple[Tensor, ...]:
    """Draw a line through the origin with 5 support and 7 query points, or classes in the plane."""
    generator = torch.Generator().manual_seed(derive_seed(seed, split, index))
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, max(1, classes), generator=generator, dtype=torch.float64)
    y = x @ weight
    if classes:
        y = torch.arange(12) % classes
        x = x + 3 * weight[:, y].T
    return x[:5], y[:5], x[5:], y[5:]


class Lines:
    def episodes(self, split: str, indices: Any, seed: int) -> Any:
        return Episodes.group([draw(split, index, seed) for index in indices])


class LastOfRecurrent(nn.Module):
    """A recurrent layer over the inputs of an example, which vmap does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(1, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[..., None])[0][:, -1]


def draw_anew(split: str, indices: Any) -> Episodes:
    x = torch.rand(len(indices), 4, 2, dtype=torch.float64) + len(split)
    return Episodes(x, x[..., :1], x, x[..., :1])


class LineSet(Dataset[tuple[Tensor, ...]]):
    """Numbered tasks of a split, stacked like by a DataLoader."""

    def __init__(self, split: str, tasks: int) -> None:
        self.tasks = [draw(split, index, 0) for index in range(tasks)]

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.tasks[index]


def create_loaders(**options: Any) -> dict[str, DataLoader[Any]]:
    """Nine training tasks in a new order in each pass, in batches of another size than the training's."""
    return {
        "Train": DataLoader(LineSet("train", 9), batch_size=4, shuffle=True, **options),
        "val": DataLoader(LineSet("validation", 5), batch_size=5),
        "test": DataLoader(LineSet("test", 6), batch_size=1),
    }


def take_lines(split: str, indices: Any, seed: int) -> Any:
    return Lines().episodes(split, indices, seed)


def yield_lines(split: str) -> Iterator[Any]:
    """Yield an endless stream of arrays from the global generators."""
    while True:
        x = np.random.normal(size=(3, 9, 2))
        y = (x * torch.randn(3, 1, 2).numpy()).sum(2, keepdims=True) + len(split)
        yield {"support_x": x[:, :4], "support_y": y[:, :4], "query_x": x[:, 4:], "query_y": y[:, 4:]}


SOURCES: dict[str, Callable[[], Any]] = {
    "object": Lines,
    "function": lambda: take_lines,
    "loaders": create_loaders,
    "loaders with a generator": lambda: create_loaders(generator=torch.Generator()),
    "stream": lambda: yield_lines,
    "lists": lambda: {
        split: [Lines().episodes(split, range(3), 0), Lines().episodes(split, range(3, 9), 0)]
        for split in ("train", "validation", "test")
    },
}


def create_net(outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def train_by_hand(net: nn.Module, batches: list[Any], rate: float = 0.1) -> dict[str, Tensor]:
    """Train with a reference loop of MAML: one inner step, Adam with 0.001 as outer optimiser."""
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(params.values(), 1e-3)
    for batch in batches:
        losses = []
        for support_x, support_y, query_x, query_y in batch:
            loss = nn.functional.mse_loss(torch.func.functional_call(net, params, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moved = {name: p - rate * g for (name, p), g in zip(params.items(), grads, strict=True)}
            losses.append(nn.functional.mse_loss(torch.func.functional_call(net, moved, (query_x,)), query_y))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


# ------------------------------------------------------------------------------------------------------- the same result


@pytest.mark.parametrize("form", SOURCES)
def test_run_ends_with_the_bits_of_fit_whether_it_was_stopped_or_not(form: str, tmp_path: Path) -> None:
    net, source = create_net(), SOURCES[form]
    before = {name: p.clone() for name, p in net.named_parameters()}
    run = metareg.train("maml", "cml", source(), model=net, out=tmp_path / "run", **SMALL)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())

    learner = MetaLearner(net, "maml", ["cml"], loss="mse", inner_lr=0.1, strategy="serial")
    learner.fit(source(), SMALL["steps"], meta_batch=2)
    assert learner.meta_parameters.keys() == run.learner.meta_parameters.keys()
    for name, value in learner.meta_parameters.items():
        assert torch.equal(value, run.learner.meta_parameters[name]), name

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run", stopped)
    for name in ("results.json", "checkpoints/final.safetensors"):
        (stopped / name).unlink()
    for file in (stopped / "checkpoints").glob("step-*"):
        if int(file.stem.removeprefix("step-")) > 4:
            file.unlink()
    torch.rand(7), np.random.rand(7)
    metareg.resume(stopped, task=source(), model=create_net())
    for name in RESULT:
        assert (stopped / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_run_equals_a_loop_written_out(tmp_path: Path) -> None:
    run = metareg.train(task=create_loaders(), model=create_net(), out=tmp_path / "run", **SMALL)
    tasks = run.source.episodes("train", range(24), 0)[0]
    batches = [[tasks.unstack(2 * step + place) for place in range(2)] for step in range(12)]
    known = [float(task[0].sum()) for task in (draw("train", index, 0) for index in range(9))]
    drawn = [known.index(float(task[0].sum())) for batch in batches for task in batch]
    assert sorted(drawn[:9]) == sorted(drawn[9:18]) == list(range(9))  # whole passes
    assert drawn[:9] != drawn[9:18] != list(range(9))  # each in its own order
    by_hand = train_by_hand(create_net(), batches)
    for name, value in by_hand.items():
        torch.testing.assert_close(run.learner.meta_parameters[name], value, rtol=0, atol=1e-6)


def test_what_own_objects_are_is_inferred_and_written_down(tmp_path: Path) -> None:
    def two_classes(split: str, indices: Any, seed: int) -> list[Episodes]:
        return Episodes.group([draw(split, index, seed, classes=2) for index in indices])

    run = metareg.train(task=two_classes, model=create_net(2), out=tmp_path / "run", **SMALL)
    assert run.config.task.model_dump() == {
        "name": "two_classes",
        "config": {"loss": "cross_entropy", "metric": "accuracy", "input_shape": (2,), "output_shape": (2,)},
        "program": True,
    } or run.config.task.config["input_shape"] == [2]
    assert run.evaluation is not None
    assert run.evaluation.metric == "accuracy"
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert text.count("program: true") == 2
    # Without a module, the labels determine the number of classes; an explicit number takes precedence.
    kept = metareg.train(task=two_classes, model="mlp", metric="auroc", out=tmp_path / "mlp", steps=2, **_few())
    assert kept.source.plugin.instance.spec == TaskSpec((2,), (2,))
    assert kept.evaluation is not None
    assert kept.evaluation.metric == "auroc"
    assert metareg.resume(tmp_path / "mlp", task=two_classes, steps=3).config.task.config["metric"] == "auroc"
    wide = metareg.train(
        task=two_classes, model="mlp", spec=TaskSpec((2,), (5,)), out=tmp_path / "wide", steps=2, **_few()
    )
    assert wide.learner.adapt(*two_classes("test", [0], 0)[0].unstack(0)[:2]).head.out_features == 5


def _few() -> dict[str, Any]:
    return {name: value for name, value in SMALL.items() if name != "steps"}


def test_own_loss_and_head_come_back_with_the_objects(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).pow(4).mean()

    given = {"task": Lines(), "model": Net(), "loss": quartic}
    run = metareg.train("anil", head="last", out=tmp_path / "run", **given, **SMALL)
    assert torch.equal(
        run.learner.adapt(*draw("test", 0, 0)[:2]).first.weight, run.learner.meta_parameters["first.weight"]
    )
    loaded = Run.load(tmp_path / "run", **given)
    assert run.evaluation is not None
    again = loaded.evaluate(4, [1])
    assert again.scores.tolist() == run.evaluation.scores.tolist()
    metareg.resume(tmp_path / "run", steps=13, **given)
    for missing, problem in (("loss", "loss"), ("model", "model=")):
        with pytest.raises(UsageError, match=problem):
            Run.load(tmp_path / "run", **{name: value for name, value in given.items() if name != missing})
    with pytest.raises(UsageError, match=r"loss.*quartic"):
        metareg.resume(tmp_path / "run", steps=14, task=Lines(), model=Net())


def test_classes_of_a_program_resume_with_the_options_that_they_had(tmp_path: Path) -> None:
    class Sign:
        class Config(metareg.PluginConfig):
            inner_lr: float = 0.01

        def __init__(self, config: Config) -> None:
            self.config = config

        @hookimpl
        def inner_update(self, params: Any, grads: Any) -> Any:
            return {name: p - self.config.inner_lr * grads[name].sign() for name, p in params.items()}

    run = metareg.train(Sign, task="sinusoid", out=tmp_path / "run", **SMALL)
    assert run.config.algo.program
    assert not run.config.task.program
    with pytest.raises(UsageError, match=r"algo 'sign' from a program.*metareg.resume\(.*algo=…\)"):
        metareg.resume(tmp_path / "run", steps=13)
    assert metareg.resume(tmp_path / "run", algo=Sign, steps=13).config.algo.config == {"inner_lr": 0.1}
    assert Run.load(tmp_path / "run", algo=Sign).learner.algorithm.config.inner_lr == 0.1


def test_class_that_a_package_installs_goes_by_its_name(tmp_path: Path) -> None:
    from metareg_maml import MAML
    from metareg_regression import Sinusoid

    metareg.train(MAML, task=Sinusoid(Sinusoid.Config(shots=3)), out=tmp_path / "run", **SMALL)
    assert "program" not in (tmp_path / "run" / "config.yaml").read_text()
    assert metareg.resume(tmp_path / "run", steps=13).config.task.config["shots"] == 3


# ---------------------------------------------------------------------------------------------------- going on elsewhere


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on lines; tests must not change it."""
    path = tmp_path_factory.mktemp("own") / "run"
    metareg.train(task=Lines(), model=create_net(), out=path, **SMALL)
    return path


def test_commands_say_how_to_go_on_in_python(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = subprocess.run(
        [sys.executable, "-m", "metareg", "resume", str(finished), "--steps", "50"],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert result.returncode == 2
    assert f"metareg.resume('{finished}', task=…, model=…)" in result.stderr
    with pytest.raises(UsageError, match=r"metareg\.Run\.load\('.*', task=…, model=…\)"):
        Run.load(finished)  # like eval, predict and export
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def other_lines(split: str, indices: Any, seed: int) -> Any:
    """A model that equals the run's only in training mode."""
    return Lines().episodes(split if split == "train" else "validation", indices, seed)


class Scaled(nn.Module):
    """Multiplies features by a number that training does not change."""

    def __init__(self, scale: float, power: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale**self.power


class Frozen(nn.Module):
    """A module that training does not change."""

    def __init__(self, scale: float, power: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(2, 4).double(), Scaled(scale, power))
        self.head = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_other_objects_are_refused_and_new_weights_of_the_same_are_not(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "results.json").read_bytes()
    for model in (
        nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1)).double(),
        nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double(),
    ):
        with pytest.raises(UsageError, match="module of class Sequential differs from the one that the run"):
            metareg.resume(run, steps=13, task=Lines(), model=model)
    with pytest.raises(UsageError, match=r"first test task is different. Pass the tasks .* with task=…"):
        metareg.resume(run, steps=13, task=_rename(other_lines, "lines"), model=create_net())
    with pytest.raises(UsageError, match="continue in Python"):
        metareg.resume(run, steps=13, task=Lines())
    assert (run / "results.json").read_bytes() == before
    fresh = create_net()
    for p in fresh.parameters():
        nn.init.normal_(p)
    metareg.resume(run, steps=13, task=Lines(), model=fresh)
    whole = metareg.train(task=Lines(), model=create_net(), out=tmp_path / "whole", **SMALL | {"steps": 13})
    assert json.loads((run / "results.json").read_text()) == json.loads((whole.path / "results.json").read_text())


def _rename(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = name
    return function


def test_a_module_is_known_by_what_training_leaves_as_it_is(tmp_path: Path) -> None:
    metareg.train(task=Lines(), model=Frozen(2.0), out=tmp_path / "run", **SMALL)
    for other in (Frozen(3.0), Frozen(2.0, power=2)):
        with pytest.raises(UsageError, match="module of class Frozen differs from the one that the run"):
            metareg.resume(tmp_path / "run", steps=13, task=Lines(), model=other)


def test_predict_takes_arrays_and_frames(finished: Path) -> None:
    run = Run.load(finished, task=Lines())  # a module made only of torch.nn layers is loaded from the file
    support_x, support_y, query_x, _ = (part.numpy() for part in draw("test", 0, 0))
    expected = run.learner.adapt(support_x, support_y)(torch.from_numpy(query_x)).detach()
    assert torch.equal(run.predict((support_x, support_y), query_x), expected)

    class Frame(dict[str, np.ndarray]):
        """The common interface of pandas and similar libraries."""

        columns = property(list)

    class Column(np.ndarray):
        def to_numpy(self) -> np.ndarray:
            return np.asarray(self)

    columns = {
        name: column.view(Column) for name, column in zip("abt", [*support_x.T.copy(), support_y[:, 0]], strict=True)
    }
    query = {name: column.view(Column) for name, column in zip("ab", query_x.T.copy(), strict=True)}
    header, *rows = run.predict(Frame(columns), Frame(query)).splitlines()
    assert header == "a,b,t"
    # Tables contain float32, like those that readers return.
    assert [float(row.split(",")[2]) for row in rows] == pytest.approx(expected[:, 0].tolist(), abs=1e-6)
    with pytest.raises(UsageError, match=r"support examples are a list; predict takes paths or frames"):
        run.predict([support_x], query_x)


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (lambda: LineSet("train", 4), "'lineset' is none of these"),
        (lambda: lambda indices: Lines().episodes("train", indices, 0), "same for training, validation and test"),
        (lambda: DataLoader(LineSet("train", 4), batch_size=2), "same for training, validation and test"),
        (lambda: yield_lines("train"), "can be iterated only once"),
        (lambda: {"train": [], "validation": [], "test": []}, "yields no train tasks"),
        (lambda: {"train": create_loaders()["Train"], "test": create_loaders()["test"]}, "has no 'validation'"),
        (lambda: {"trian": []}, "keys train, validation and test, once each; this one has trian"),
        (lambda: {**create_loaders(), "validation": []}, "once each"),
        (lambda: {**create_loaders(), "test": create_loaders()["val"]}, None),
        (lambda: {**create_loaders(), "test": DataLoader(LineSet("test", 3), batch_size=2)}, "has 3 test tasks"),
        (lambda: {**create_loaders(), "Train": DataLoader(TensorDataset(torch.zeros(4, 2)), 2)}, "got a list of 1"),
        (lambda: lambda split, index: None, "takes 'index'"),
        (lambda: 5, "'int' is none of these"),
        (lambda: draw_anew, "a different task each time"),
    ],
)
def test_tasks_that_cannot_be_used_get_one_sentence(task: Callable[[], Any], says: str | None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if says is None:
        metareg.train(task=task(), model=create_net(), out=out, **SMALL)
        return
    with pytest.raises(UsageError, match=says):
        metareg.train(task=task(), model=create_net(), out=out, **SMALL)
    assert not out.exists() or says == "has 3 test tasks"


def test_an_installed_task_that_draws_anew_each_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Anew(metareg_regression.Sinusoid):
        calls = 0

        @hookimpl
        def episodes(self, split: str, indices: Any, seed: int) -> Any:
            Anew.calls += 1
            return super().episodes(split, [index + 1000 * Anew.calls for index in indices], seed)

    monkeypatch.setattr(metareg_regression, "Sinusoid", Anew)
    with pytest.raises(UsageError, match="'sinusoid' returns a different task each time"):
        metareg.train(task="sinusoid", out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_tasks_that_differ_each_time_are_refused(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)  # which metareg cannot seed

    def lines(split: str) -> Iterator[Any]:
        while split:
            x = generator.normal(size=(2, 8, 2))
            yield x[:, :4], x[:, :4, :1], x[:, 4:], x[:, 4:, :1]

    with pytest.raises(UsageError, match="yields different train tasks on each pass"):
        metareg.train(task=lines, model=create_net(), out=tmp_path / "run", **SMALL)


def test_facts_of_objects_are_refused_beside_plugins(tmp_path: Path) -> None:
    spec = TaskSpec((1,), (1,))
    for facts, says in (({"spec": spec}, "spec=…"), ({"head": "last"}, "head=…"), ({"loss": "mae"}, "'loss'")):
        with pytest.raises(UsageError, match=says):
            metareg.train(task="sinusoid", out=tmp_path / "run", **facts, **SMALL)
    with pytest.raises(UsageError, match="an object from a program"):
        metareg.train(config={"task": {"name": "lines", "program": True}}, out=tmp_path / "run")


def test_loaders_are_taken_where_tasks_are() -> None:
    loader = create_loaders()["Train"]
    net = create_net()
    learner, other = (MetaLearner(net, loss="mse", inner_lr=0.1, strategy="serial") for _ in range(2))
    for batch in loader:
        learner.step(batch)
        other.step(Episodes(*batch))
    for name, value in learner.meta_parameters.items():
        assert torch.equal(value, other.meta_parameters[name])
    tasks = LineSet("test", 6)
    expected = [nn.functional.mse_loss(learner.adapt(*task[:2])(task[2]), task[3]).item() for task in tasks.tasks]
    test = create_loaders()["test"]
    assert learner.evaluate(test, 6, inner_steps=[1]).scores[:, 0].tolist() == pytest.approx(expected)
    with pytest.raises(UsageError, match="has 6 test tasks, but at least"):
        learner.evaluate(test, 7)
    with pytest.raises(UsageError, match="same for training, validation and test"):
        learner.fit(loader, 2, eval_every=1)


def test_the_environment_names_the_strategy_that_the_first_steps_have_led_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SMALL | {"strategy": "auto", "meta_batch": 25}
    model = nn.Sequential(LastOfRecurrent(), nn.Linear(4, 1)).double()
    path = tmp_path / "run"
    metareg.train("maml", task=Lines(), model=model, out=path, **settings)
    described = json.loads((path / "environment.json").read_text())
    assert described["strategy"] == "traced"
    caplog.clear()
    metareg.resume(path, steps=15, task=Lines(), model=model)
    assert json.loads((path / "environment.json").read_text()) == described
    assert "different environment" not in caplog.text
