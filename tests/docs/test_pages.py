"""Run the commands and listings of every page as written, from top to bottom.

Trainings, tests, searches and baselines are cut to what `CUT`, `cut` and `Page` give them; CONTRIBUTING.md says so to the
reader. A page assumes that its reader has a run, a table or a folder of images: `PREPARE` makes them. `NOT_RUN` lists the
commands that are not run, with the reasons. test_plugins.py runs the tutorials for plugins, which install packages.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import metareg
from comparisons import InThisProcess
from metareg import Episodes, MetaLearner
from metareg.cli.app import run as run_command
from metareg.comparison.config import ComparisonConfig
from metareg.comparison.plan import Plan, check_plan
from metareg.comparison.recipe import Recipe
from metareg.contract.config import validate

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("hooks.md", "options.md")
TUTORIALS = [path for path in (DOCS / "plugins").glob("*.md") if path.stem != "index"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.M | re.S)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if path.name not in GENERATED and path not in TUTORIALS),
]

NOT_RUN = {
    r"^(python3 -m venv|pip|\S*/pip) ": "installs",
    r"^source \S+/activate$": "changes the shell",
    r"^(ruff|lint-imports|mypy|nox|\S*python -m pytest)\b": "checks of the project itself, sessions of their own",
    r"^python (benchmarks|docs)/": "takes minutes or writes into the project",
    r"^metareg data \S+ --download": "fetches data",
    r"^metareg doctor": "imports every plugin in a process of its own; tests/cli/test_cli.py runs it",
    r"^metareg reproduce [^-]": "takes minutes to days; tests/comparison/test_reproduce.py runs recipes",
    r"--launcher ray": "needs a cluster; tests/comparison/test_ray.py starts one",
    r"--task (cub|font-folder)\b": "needs data that cannot be fetched here",
    r"--model (torchvision|timm)": "needs pretrained weights; tests/tasks/test_pretrained.py and test_timm.py have some",
    r"--observe (mlflow|wandb)": "needs a package of its own; tests/plugins/test_observers.py runs it",
    r"--support photos/": "needs a run on images; how-to/images.md has one",
    r"^metareg export RUN --to model\.pt2$": "needs a run that is not on tables; tests/runs/test_exports.py exports one",
}
"""Patterns of commands that are not run, and the reasons."""

DATA = {"omniglot-small": "omniglot", "cora": "graphs", "citeseer": "graphs"}
"""Tasks that read data, and its folder in METAREG_DATA; without it, their commands are skipped."""

TRAINING = ("steps", "test_tasks", "eval_tasks", "eval_every", "meta_batch", "strategy", "threads", "lr_warmup_steps")
CUT = [
    "--steps", "4", "--set", "eval_every=2", "--set", "test_tasks=4", "--set", "eval_tasks=4", "--set", "meta_batch=2",
    "--strategy", "serial",
]  # fmt: skip


class Page:
    """A page, with a folder in which its blocks run in order."""

    def __init__(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source, self.folder = source, folder
        self.name = source.relative_to(DOCS).as_posix() if source.is_relative_to(DOCS) else source.name
        self.blocks = BLOCK.findall(source.read_text(encoding="utf-8"))
        self.namespace: dict[str, Any] = {}
        monkeypatch.chdir(folder)
        monkeypatch.setattr("metareg.comparison.runner.LocalPool", lambda *_: InThisProcess())
        monkeypatch.setattr("metareg.runs.baselines._STEPS", (1, 2))
        for name in ("train", "resume", "compare"):
            monkeypatch.setattr(metareg, name, _cut_call(getattr(metareg, name)))

    def prepare(self) -> None:
        """Create what the page assumes, and the files of its YAML listings."""
        if self.name in PREPARE:
            PREPARE[self.name](self)
        for name, text in zip(FILES.get(self.name, ()), self.listings("yaml"), strict=True):
            (self.folder / name).write_text(text, encoding="utf-8")

    def listings(self, language: str) -> list[str]:
        return [text for each, text in self.blocks if each == language]

    def carry_out(self) -> None:
        for language, text in self.blocks:
            if language == "sh":
                for line in split_commands(text.replace("…", ELLIPSES.get(self.name, ""))):
                    self.run(line)
            elif language == "python":
                self.execute(text)
            else:
                assert language in ("yaml", "text"), f"{self.name} has a block of {language}, which nothing runs"

    def run(self, line: str) -> None:
        """Run a shell command: one of metareg, or one in `NOT_RUN`, which is skipped."""
        if any(re.search(pattern, line) for pattern in NOT_RUN) or _lacks_something(line):
            return
        words = shlex.split(line.replace("SEED", "0"))
        output = words[words.index(">") + 1 :] if ">" in words else []
        words = words[: words.index(">")] if output else words
        if words[0] == "torchrun":  # one process instead of several
            words = ["metareg", *words[words.index("metareg") + 1 :]]
        assert words[0] == "metareg", (
            f"{self.name}: {line}: nothing runs this; a command of metareg, or an entry of NOT_RUN?"
        )
        arguments = cut(words[1:])
        if arguments[0] == "train" and "--out" in arguments and "--resume" not in arguments:
            shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
        code = run_command(arguments)
        assert code == 0, f"{self.name}: `{line}` ended with {code}"

    def execute(self, text: str) -> None:
        """Execute a Python listing in the namespace of the previous ones."""
        cut_text = re.sub(r"\b(steps|tasks)=\d{2,}", r"\1=4", text)
        exec(compile(cut_text, self.name, "exec"), self.namespace)


def split_commands(text: str) -> Iterator[str]:
    """Yield the commands of a block, without comments and with continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&;")
        words.whitespace_split, words.commenters = True, "#"
        command: list[str] = []
        for word in words:
            if word == "&&":
                yield shlex.join(command).removeprefix(".venv/bin/")
                command = []
            else:
                command.append(word)
        if command:
            yield shlex.join(command).replace("'>'", ">").removeprefix(".venv/bin/")


def cut(arguments: list[str]) -> list[str]:
    """Return a command's arguments with small numbers of steps, tasks, seeds and trials."""
    command = arguments[0]
    if command in ("train", "compare"):
        arguments = _without(arguments, TRAINING)
        changes = [] if "--archive" in arguments else list(CUT)
        if command == "compare":
            arguments, seeds = _without(arguments, ("seeds",)), "--seeds" in arguments
            changes += ["--seeds", "1"] if seeds else []
            if "--search" in arguments:
                arguments = [*_without(arguments, ("search",)), "--search", "2"]
        return [*arguments, *changes]
    if command == "resume":
        return [*_without(arguments, ("steps",)), *(["--steps", "6"] if "--steps" in arguments else [])]
    if command in ("eval", "analyse"):
        return [*_without(arguments, ("tasks",)), "--tasks", "4"]
    return arguments


def _without(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """Return the arguments without the flags and the ``--set`` of some options."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--") and argument[2:].replace("-", "_") in names:
            next(rest)
        elif argument == "--set":
            value = next(rest)
            kept += [] if value.partition("=")[0] in names else ["--set", value]
        else:
            kept.append(argument)
    return kept


def _cut_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `train`, `resume` or `compare` with few steps and test tasks, whatever a listing says."""
    small: dict[str, Any] = {"steps": 6}
    if function.__name__ != "resume":
        small = {"steps": 4, "test_tasks": 4, "eval_tasks": 4, "strategy": "serial"}
    small |= {"seeds": 1} if function.__name__ == "compare" else {}
    return lambda *arguments, **options: function(*arguments, **options | small)


def _lacks_something(line: str) -> bool:
    folders = [folder for task, folder in DATA.items() if re.search(rf"(--task|show) {task}\b", line)]
    if line.endswith(".onnx") and importlib.util.find_spec("onnxscript") is None:
        return True
    return any(not (metareg.data_folder() / folder).is_dir() for folder in folders)


def write_tables(_: Page) -> None:
    """Create RUN, a run on tables, with tables to predict; sensors/ and tables/ contain those of the tasks."""
    assert run_command(["data", "table-folder", "--example", "new"]) == 0
    for name in ("sensors", "tables", "DIR"):
        shutil.copytree("new/sensors", name)
    shutil.copy("new/new-support.csv", "mine.csv")
    shutil.copy("new/new-query.csv", "new.csv")
    write_sites("mine.csv", "new.csv")
    train(["--task", "table-folder", "--data", "tables", "--set", "target=y"], "RUN")


def write_numbers(_: Page) -> None:
    """Create RUN, a run on sinusoids, with tables to predict."""
    Path("mine.csv").write_text("x,y\n-1,0.5\n0,1.5\n2,-1\n")
    Path("new.csv").write_text("x\n0.25\n-3\n")
    write_sites("mine.csv", "new.csv")
    train([], "RUN")


def write_sites(support: str, query: str) -> None:
    for site in ("north", "south"):
        Path("sites", site).mkdir(parents=True)
        shutil.copy(support, Path("sites", site, "support.csv"))
        shutil.copy(query, Path("sites", site, "query.csv"))


def write_deployment(page: Page) -> None:
    """Create RUN on sinusoids, runs/papers on a graph, and an image to prepare."""
    import numpy
    from PIL import ImageOps

    write_numbers(page)
    write_graph(page)
    train(["--task", "graph-folder", "--data", "papers"], "runs/papers")
    Image.new("RGB", (40, 30)).save("image.png")
    page.namespace |= {"Image": Image, "ImageOps": ImageOps, "numpy": numpy, "torch": torch}
    page.namespace |= {"path": "image.png", "width": 32, "height": 32}


def write_graph(page: Page) -> None:
    """Create papers/ and my-graph/, a graph of 6 classes in CSV files; known.csv and new.csv name some of its nodes."""
    pytest.importorskip("dgl")
    generator = np.random.default_rng(0)
    labels = np.arange(240) % 6
    features = np.eye(6)[labels] + 0.1 * generator.normal(size=(240, 6))
    Path("papers").mkdir()
    rows = [
        f"p{i},c{label},{','.join(f'{v:.3f}' for v in row)}"
        for i, (label, row) in enumerate(zip(labels, features, strict=True))
    ]
    Path("papers/nodes.csv").write_text("\n".join(["id,label,a,b,c,d,e,f", *rows]) + "\n")
    edges = [f"p{a},p{b}" for a, b in generator.integers(0, 240, (900, 2)) if a != b]
    Path("papers/edges.csv").write_text("\n".join(["source,target", *dict.fromkeys(edges)]) + "\n")
    shutil.copytree("papers", "my-graph")
    Path("known.csv").write_text("node,label\n" + "".join(f"p{i},c{labels[i]}\n" for i in (4, 5, 10, 11, 16, 17)))
    Path("new.csv").write_text("node\np22\np23\n")
    if page.name == "tasks/graphs.md" and (data := metareg.data_folder() / "graphs" / "cora.npz").is_file():
        Path("FOLDER").mkdir()
        shutil.copy(data, "FOLDER/cora.npz")


def write_photos(_: Page) -> None:
    """Create photos/ with 20 classes of 24 images, including those of split.yaml; support/ and unsorted/ for predictions."""
    generator = np.random.default_rng(0)
    named = ["birds/robin", "birds/wren", "cats/tabby", "cats/tiger", "dogs/beagle", "dogs/boxer"]
    for name in [*named, *(f"others/{number}" for number in range(14))]:
        folder = Path("photos", name)
        folder.mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for number in range(24):
            pixels = np.clip(colour + generator.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    for name in named[:3]:
        shutil.copytree(Path("photos", name), Path("support", name))
    shutil.copytree(Path("photos", named[0]), "unsorted")


def write_comparison(_: Page) -> None:
    """Create DIR, a finished comparison."""
    options = ["--steps", "4", "--set", "test_tasks=4", "--set", "eval_tasks=4", "--set", "meta_batch=2"]
    assert run_command(["compare", "--augment", "none,cml", "--seeds", "1", *options, "--out", "DIR"]) == 0


def write_objects(page: Page) -> None:
    """Define the objects of the reader's own program: batches of tasks, a module, a learner."""

    def batches(seed: int) -> list[Episodes]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(6, 4, 20, 1, generator=generator) * 10 - 5
        y = torch.rand(6, 4, 1, 1, generator=generator) * x.sin()
        return [Episodes(a[:, :10], b[:, :10], a[:, 10:], b[:, 10:]) for a, b in zip(x, y, strict=True)]

    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    loaders = {name: batches(seed) for seed, name in enumerate(("loader", "loader2", "loader3"))}
    page.namespace |= loaders | {"val_loader": loaders["loader2"], "test_loader": loaders["loader3"], "net": net}
    page.namespace |= {"learner": MetaLearner(net, algo="maml", loss="mse"), "task_source": draw_lines}
    page.namespace |= {"support_x": torch.rand(5, 1), "support_y": torch.rand(5, 1), "query_x": torch.rand(3, 1)}
    page.namespace |= {"metareg": metareg, "Field": metareg.Field, "PluginConfig": metareg.PluginConfig}


def draw_lines(split: str, indices: list[int], seed: int) -> Episodes:
    """Draw an endless supply of tasks: straight lines through zero."""
    drawn = torch.from_numpy(2 * metareg.task_uniform(seed, split, indices, 9) - 1).float()
    x = drawn[:, :8, None]
    y = drawn[:, 8:, None] * x
    return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


def train(arguments: list[str], out: str) -> None:
    assert run_command(cut(["train", *arguments, "--out", out])) == 0


def prepare_readme(page: Page) -> None:
    write_objects(page)
    assert run_command(["data", "table-folder", "--example", "new"]) == 0
    shutil.copytree("new/sensors", "sensors")
    Path("mine.csv").write_text("x,y\n-1,0.5\n0,1.5\n2,-1\n")
    Path("new.csv").write_text("x\n0.25\n-3\n")


def prepare_runs(page: Page) -> None:
    write_objects(page)
    write_tables(page)


PREPARE: dict[str, Callable[[Page], None]] = {
    "README.md": prepare_readme,
    "api.md": write_objects,
    "comparisons.md": write_comparison,
    "deployment.md": write_deployment,
    "getting-started.md": write_objects,
    "how-to/graph.md": write_graph,
    "how-to/images.md": write_photos,
    "plugins/index.md": write_objects,
    "runs.md": prepare_runs,
    "tasks/graphs.md": write_graph,
    "tasks/images.md": write_photos,
}

ELLIPSES = {"runs.md": "--task table-folder --set data=tables --set target=y"}
"""The replacement of … in the commands of a page; empty for other pages."""

FILES = {
    "comparisons.md": ["boil.yaml", "variants.yaml", "tuned.yaml", "planned.yaml"],
    "getting-started.md": ["my.yaml"],
    "reproduce.md": ["mine.yaml"],
    "tasks/images.md": ["split.yaml"],
}
"""The names of the files in a page's YAML listings, in order."""


@pytest.fixture
def carry_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    def carry_out(source: Path) -> None:
        page = Page(source, tmp_path, monkeypatch)
        page.prepare()
        page.carry_out()

    return carry_out


def test_readme(carry_out: Callable[[Path], None]) -> None:
    carry_out(ROOT / "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("source", PAGES[1:], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(source: Path, carry_out: Callable[[Path], None]) -> None:
    carry_out(source)


def test_every_row_of_a_table_is_one_line() -> None:
    for path in (*DOCS.rglob("*.md"), *ROOT.glob("*.md")):
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
        broken = [line for line in text.splitlines() if line.startswith("|") and not line.endswith("|")]
        assert not broken, f"{path}: {broken}"


def test_files_of_listings_are_what_they_are_for(tmp_path: Path) -> None:
    """Listings that no command of their page runs in full: large comparisons, and a recipe."""
    for listing in BLOCK.findall((DOCS / "comparisons.md").read_text(encoding="utf-8")):
        if listing[0] == "yaml":
            check_plan(Plan(tmp_path, validate(ComparisonConfig, yaml.safe_load(listing[1]), "comparisons.md")))
    (recipe,) = [text for kind, text in BLOCK.findall((DOCS / "reproduce.md").read_text("utf-8")) if kind == "yaml"]
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    comparison = Recipe.read(tmp_path / "mine.yaml").to_comparison()
    check_plan(Plan(tmp_path, validate(ComparisonConfig, comparison, "reproduce.md")))


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    text = [block for path in PAGES for kind, block in BLOCK.findall(path.read_text("utf-8")) if kind == "sh"]
    lines = [line for block in text for line in split_commands(block)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)] == []
