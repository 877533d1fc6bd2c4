"""Whole training steps: after some steps of `fit`, the parameters equal those of a plain loop with `torch.optim.Adam`.

The loop is in `reference` and its networks are in `networks`; neither uses the engine. Tasks, initial parameters and
dropgrad's noise come from the plugins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from metareg import Episodes, MetaLearner, TaskSpec
from metareg.util.native import find_compiler
from metareg.util.seeding import create_generator
from metareg_dropgrad import DropGrad
from metareg_graph import CSBM, GCN, SGC, Cora, GraphSAGE
from metareg_image.glyphs import Glyphs
from metareg_image.models import Conv4, ResNet12
from metareg_image.omniglot import OmniglotSmall
from metareg_regression import MLP, Sinusoid
from networks import SHIPPED, without_effect
from reference import Task, Tensors, difference, train

STEPS, TASKS, INNER_STEPS, SEED = 3, 3, 2, 6
OUTER_LR, GAMMA, RATE = 0.01, 0.7, 0.3
TOLERANCE = 1e-6


class UnequalSinusoids:
    """Every third task has more support points, so that a batch of three forms two stacks."""

    loss = "mse"
    spec = TaskSpec((1,), (1,))

    def episodes(self, split: str, indices: Sequence[int], seed: int) -> list[Episodes]:
        sizes = [Sinusoid(Sinusoid.Config(shots=5 if index % 3 == 1 else 3, query=4)) for index in indices]
        return Episodes.group(
            [tasks_of(each.episodes(split, [index], seed))[0] for each, index in zip(sizes, indices, strict=True)]
        )


@dataclass(frozen=True)
class Setting:
    """A task with a model; the inner step size is a power of two, which is exact in every precision."""

    task: Callable[[], Any]
    model: Any
    net: str
    inner_lr: float
    factors: tuple[Any, ...] = ()
    """Properties that can affect a step: the model, pixels and channels of images, unequal sizes."""
    needs: tuple[str, ...] = ()
    """``"data"``, ``"dgl"``."""


def images(kind: Any, size: int, channels: int) -> Callable[[], Any]:
    return lambda: kind(kind.Config(ways=3, query=2, size=size, channels=channels))


def nodes(kind: Any, inputs: str) -> Callable[[], Any]:
    return lambda: kind(kind.Config(query=3, inputs=inputs))


CONV4, RESNET12 = Conv4(Conv4.Config(width=8)), ResNet12(ResNet12.Config(widths=[4, 4, 6, 8]))
SMALL_MLP = MLP(MLP.Config(hidden=[6, 5]))
GRAPH, DATA = ("dgl",), ("dgl", "data")
SETTINGS = {
    "sinusoid": Setting(
        lambda: Sinusoid(Sinusoid.Config(shots=5, query=4)), SMALL_MLP, "mlp", 2**-4, ("sinusoid", "mlp", "equal")
    ),
    "unequal": Setting(UnequalSinusoids, SMALL_MLP, "mlp", 2**-4, ("sinusoid", "mlp", "unequal")),
    "csbm": Setting(nodes(CSBM, "gcn"), GCN(GCN.Config(hidden=6)), "gcn", 2**-2, ("csbm", "gcn"), GRAPH),
    "cora-gcn": Setting(nodes(Cora, "gcn"), GCN(GCN.Config(hidden=6)), "gcn", 2**-1, ("cora", "gcn"), DATA),
    "cora-sgc": Setting(nodes(Cora, "sgc"), SGC(SGC.Config(hidden=6)), "sgc", 2**-1, ("cora", "sgc"), DATA),
    "cora-graphsage": Setting(
        nodes(Cora, "mean"), GraphSAGE(GraphSAGE.Config(hidden=6)), "graphsage", 2**-1, ("cora", "graphsage"), DATA
    ),
    "glyphs": Setting(images(Glyphs, 20, 1), CONV4, "conv4", 2**-6, ("glyphs", "conv4", 20, 1)),
    "glyphs-colour": Setting(images(Glyphs, 32, 3), CONV4, "conv4", 2**-6, ("glyphs", "conv4", 32, 3)),
    "glyphs-resnet12": Setting(images(Glyphs, 32, 1), RESNET12, "resnet12", 2**-6, ("glyphs", "resnet12", 32, 1)),
    "omniglot": Setting(images(OmniglotSmall, 28, 1), CONV4, "conv4", 2**-6, ("omniglot", "conv4", 28, 1), ("data",)),
    "omniglot-84": Setting(
        images(OmniglotSmall, 84, 3), CONV4, "conv4", 2**-6, ("omniglot", "conv4", 84, 3), ("data",)
    ),
}


class Case(NamedTuple):
    """A value of each factor."""

    setting: str
    algo: str
    augment: str
    strategy: str
    memory: str
    chunk: int | None
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self if value is not None)


CASES = [
    Case(*values)
    for values in product(
        SETTINGS,
        ("anil", "maml", "boil", "metasgd"),
        ("none", "cml", "dropgrad"),
        ("serial", "traced", "vectorized", "compiled"),
        ("store", "recompute"),
        (None, 1),
        (torch.float32, torch.float64),
    )
]


COMPILED = [
    Case("unequal", "metasgd", "dropgrad", "compiled", "store", None, torch.float32),
    Case("csbm", "maml", "cml", "compiled", "recompute", 1, torch.float64),
]
"""Compiled cases of the default run: every value of all factors except the algorithm, the model and the task.

Each takes 20 to 40 seconds. They compile the traced graph, which the other cases compare. Compiling a convolutional
model takes one to three minutes, and "auto" never does so on a CPU.
"""


def pairs(case: Case) -> set[Any]:
    """Return the pairs of values of two factors in a case, including those of its setting."""
    of_setting = [(f"setting {number}", value) for number, value in enumerate(SETTINGS[case.setting].factors)]
    return set(combinations([*of_setting, *list(zip(case._fields, case, strict=True))[1:]], 2))


def pairs_of(cases: Iterable[Case]) -> set[Any]:
    """Return the pairs of some cases."""
    return {pair for case in cases for pair in pairs(case)}


TAKE_LONG = ("resnet12", 84)
"""A model and image size that the default run combines with every strategy, but not with every value of each factor."""


def wanted_pairs(cases: Iterable[Case]) -> set[Any]:
    """Return the pairs of some cases that the default run must contain."""

    def is_wanted(pair: Any) -> bool:
        names, values = zip(*pair, strict=True)
        return "strategy" in names or not any(value in TAKE_LONG for value in values)

    return {pair for pair in pairs_of(cases) if is_wanted(pair)}


def covering(cases: Sequence[Case], wanted: Iterable[Any]) -> list[Case]:
    """Choose cases that contain all wanted pairs: repeatedly, the first case with the most missing pairs."""
    missing, chosen = set(wanted), []
    of_case = {case: pairs(case) & missing for case in cases}
    while missing:
        chosen.append(max(cases, key=lambda case: len(of_case[case] & missing)))
        missing -= of_case[chosen[-1]]
    return chosen


def chosen_cases() -> list[Case]:
    """Return `COMPILED`, and further cases that contain all `wanted_pairs`."""
    others = [case for case in CASES if case.strategy != "compiled"]
    return COMPILED + covering(others, wanted_pairs(others) - pairs_of(COMPILED))


DEFAULT = chosen_cases()


def tasks_of(episodes: Episodes | list[Episodes], dtype: torch.dtype | None = None) -> list[Task]:
    """Return the tasks of one or several stacks one by one, in order."""
    stacks = [episodes] if isinstance(episodes, Episodes) else episodes
    return [stack.to("cpu", dtype).unstack(number) for stack in stacks for number in range(len(stack))]


def batches_of(task: Any) -> list[Any]:
    """Draw the batches of the training steps."""
    return [task.episodes("train", range(TASKS * step, TASKS * (step + 1)), SEED) for step in range(STEPS)]


def learner_of(case: Case, task: Any) -> MetaLearner:
    setting = SETTINGS[case.setting]
    augment = {"none": [], "cml": [("cml", {"gamma": GAMMA})], "dropgrad": [("dropgrad", {"rate": RATE})]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = setting.model.build(spec=task.spec).to(case.dtype)
    return MetaLearner(
        model, case.algo, augment[case.augment], loss=task.loss, inner_lr=setting.inner_lr, inner_steps=INNER_STEPS,
        outer_lr=OUTER_LR, seed=SEED, strategy=case.strategy, memory=case.memory, chunk=case.chunk,
    )  # fmt: skip


def drop(step: int, task: int, inner_step: int, grads: Tensors) -> Tensors:
    """Apply dropgrad to a task's gradients in an inner step, with the plugin's own random numbers."""
    generator = create_generator(SEED, "noise", "task", "dropgrad", step, task)
    shapes = {name: tuple(value.shape) for name, value in grads.items()}
    noise = DropGrad(DropGrad.Config(rate=RATE)).draw_noise(shapes, generator, INNER_STEPS)[inner_step]
    return {name: torch.where(noise[name], value / (1 - RATE), 0) for name, value in grads.items()}


@cache
def expected(name: str, algo: str, augment: str) -> tuple[Tensors, Tensors]:
    """Return the meta-parameters before and after the plain loop in float64, shared by all ways to run the case."""
    setting = SETTINGS[name]
    task = setting.task()
    learner = learner_of(Case(name, algo, augment, "serial", "store", None, torch.float64), task)
    batches = [tasks_of(batch, torch.float64) for batch in batches_of(task)]
    learner.initialize(batches[0][0][0])
    after = train(
        SHIPPED[setting.net], learner.meta_parameters, batches, algo=algo, inner_lr=setting.inner_lr,
        inner_steps=INNER_STEPS, outer_lr=OUTER_LR, gamma=GAMMA if augment == "cml" else None,
        change=drop if augment == "dropgrad" else None,
    )  # fmt: skip
    return learner.meta_parameters, after


def way(start: Tensors, end: Tensors) -> Tensor:
    """Return the changes of all entries ``[entries]``."""
    return torch.cat([(end[name] - start[name]).double().flatten() for name in end])


def check(learner: MetaLearner, case: Case) -> None:
    """Compare with the plain loop: in float64 up to rounding, in float32 relative to the distance that parameters moved.

    Rounding in float32 can switch ReLU units and maxima of pooling, which rotates a batch's gradient by some percent, as a
    change of all parameters by 1e-7 does in float64; Adam amplifies it. The relative differences of such trainings were up
    to 0.44; if entries use each other's gradients, they are 1.16 or more.
    """
    net = SETTINGS[case.setting].net
    before, after = (
        {name: value for name, value in each.items() if not without_effect(net, name)} for each in expected(*case[:3])
    )
    found = {name: learner.meta_parameters[name] for name in after}
    assert way(before, found).abs().gt(0.1 * OUTER_LR).double().mean() > 0.5
    if case.dtype == torch.float64:
        assert difference(found, after) < TOLERANCE
    else:
        assert way(after, found).norm() < 0.8 * way(before, after).norm()
    assert learner.steps_done == STEPS


@pytest.fixture
def task_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], Any]:
    """Create the task of a case; skip the test if its data, DGL or the compiler is missing."""

    def of(case: Case) -> Any:
        setting = SETTINGS[case.setting]
        if case.strategy == "compiled" and find_compiler() is None:
            pytest.skip("no C++ compiler")
        if "dgl" in setting.needs:
            pytest.importorskip("dgl", reason="DGL is not installed")
        if "data" in setting.needs:
            monkeypatch.setenv("METAREG_DATA", str(request.getfixturevalue("data_folder")))
        return setting.task()

    return of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `test_fit_equals_a_plain_loop`; the default run does not collect the 4,200 cases that it leaves out."""
    if "case" in metafunc.fixturenames:
        default = set(DEFAULT)
        cases = DEFAULT if metafunc.config.option.markexpr == "not slow" else CASES
        marks = {case: () if case in default else pytest.mark.slow for case in cases}
        metafunc.parametrize("case", [pytest.param(case, id=case.id, marks=marks[case]) for case in cases])


def test_fit_equals_a_plain_loop(case: Case, task_of: Callable[[Case], Any]) -> None:
    task = task_of(case)
    learner = learner_of(case, task)
    learner.fit(task, STEPS, meta_batch=TASKS)
    check(learner, case)


def test_every_pair_of_values_is_in_the_default_suite() -> None:
    kept = [case for case in CASES if case.strategy != "compiled"]
    assert pairs_of(DEFAULT) >= wanted_pairs(kept)
    for values in zip(*(case[2:] for case in COMPILED), strict=True):  # except none, which changes nothing
        assert len({*values}) == 2 or values == ("compiled", "compiled")
    assert {case.setting for case in DEFAULT} == {*SETTINGS}


GLYPHS = Case("glyphs", "maml", "cml", "traced", "store", None, torch.float32)


@pytest.mark.parametrize("method", ["step", "take_step"])
def test_steps_one_by_one_equal_a_plain_loop(method: str) -> None:
    task = SETTINGS["glyphs"].task()
    learner = learner_of(GLYPHS, task)
    for batch in batches_of(task):
        getattr(learner, method)(batch)
    check(learner, GLYPHS)


def test_training_goes_on_from_a_state_with_the_same_bits() -> None:
    task = SETTINGS["glyphs"].task()
    learner = learner_of(GLYPHS, task).fit(task, STEPS - 1, meta_batch=TASKS)
    state = copy.deepcopy(learner.state())
    resumed = learner_of(GLYPHS, task)
    resumed.initialize(tasks_of(batches_of(task)[0])[0][0])
    resumed.load_state(state)
    for each in (learner, resumed):
        each.fit(task, 1, meta_batch=TASKS)
        check(each, GLYPHS)
    assert all(value.equal(resumed.meta_parameters[name]) for name, value in learner.meta_parameters.items())
