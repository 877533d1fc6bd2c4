"""The list of all functions that read files: tests give `READERS` damaged files; `OWN` need no such test.

`find_functions` finds them in the source, so that a test fails if a new one is not in the list.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from metareg import MetaLearner, Run, TaskSpec, load_image, read_name_lists, read_split_file, read_table
from metareg.comparison import tuning
from metareg.comparison.archive import add_archived_runs, unpack_archive, write_archive
from metareg.comparison.plan import Plan
from metareg.comparison.pool import read_failure
from metareg.comparison.recipe import Recipe, list_recipes
from metareg.comparison.results import read_results
from metareg.comparison.runner import read_progress
from metareg.runs import environment
from metareg.runs.checkpoints import Checkpoints
from metareg.runs.options import parse_assignments
from metareg.runs.run import has_stopped_early, read_config, read_evaluations, read_planned_steps
from metareg.util.files import LinesFile
from metareg.util.yaml_files import read_yaml
from metareg_graph.data import load as load_graph
from metareg_image import backbones
from metareg_image.characters import read_groups
from metareg_image.font_files import read_faces
from metareg_image.letters import has_ink, load_font
from metareg_image.matlab import read_boxes, read_class_names
from metareg_image.omniglot import _read_characters
from metareg_image.store import DamagedStoreError, _read_index

__all__ = ["OWN", "READERS", "Reader", "find_functions"]

ROOT = Path(__file__).parents[2]
_OPENERS = {
    "ParquetFile", "ZipFile", "fromfile", "genfromtxt", "load_graphs", "loadmat", "loads", "loadtxt", "memmap", "open",
    "parse_json", "parse_yaml", "read_bytes", "read_json", "read_text", "read_yaml", "safe_open",
}  # fmt: skip
_LOADERS = {"json", "np", "pickle", "torch", "yaml"}
"""Modules with a function `load` that reads a file."""


@dataclass(frozen=True)
class Reader:
    """One way to read a file.

    Args:
        group: the row of the summary table that counts it.
        name: the name of the file to damage, relative to a folder.
        write: writes a valid file with that name, and the files that belong to it, into a folder.
        read: reads the file, given its path; it may raise only a `MetaregError`.
        functions: the functions involved that open files or parse text, as ``module:name``.
    """

    group: str
    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]
    functions: tuple[str, ...]


def find_functions() -> Iterator[str]:
    """Find the functions of the package, its plugins and tasks that open a file for reading or parse text."""
    for base in (ROOT, ROOT / "plugins", ROOT / "tasks"):
        for file in sorted((base / "metareg" if base == ROOT else base).rglob("*.py")):
            module = ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            yield from (f"{module}:{name}" for name in _find_callers(ast.parse(file.read_text("utf-8")), ()))


def _find_callers(node: ast.AST, names: tuple[str, ...]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inner = (*names, child.name) if named else names
        if isinstance(child, ast.Call) and _opens(child):
            yield ".".join(names)
        yield from _find_callers(child, inner)


def _opens(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "load":
        return isinstance(function, ast.Attribute) and getattr(function.value, "id", "") in _LOADERS
    writes = any(isinstance(each, ast.Constant) and str(each.value)[:1] in "wax" and each.value for each in call.args)
    return name in _OPENERS and not (name == "open" and writes)


# ----------------------------------------------------------------------------------------------------------- good files


def _text(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return write


def _both(*writers: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for each in writers:
            each(folder)

    return write


def _arrays(name: str, **arrays: Any) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / name, **arrays)


def _image(name: str, mode: str) -> Callable[[Path], None]:
    return lambda folder: Image.radial_gradient("L").resize((9, 7)).convert(mode).save(folder / name)


def _packed(name: str, table: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(table.encode()))

    return write


def _weights(ending: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path, weights = folder / f"weights.{ending}", {"layer.weight": torch.ones(2, 3), "layer.bias": torch.zeros(2)}
        if ending == "pth":
            torch.save(weights, path)
        else:
            save_file(weights, path)

    return write


def _learner(folder: Path) -> None:
    learner = MetaLearner("mlp", loss="mse", spec=TaskSpec((1,), (1,)), model_options={"hidden": [3]})
    learner.save(folder / "learner.safetensors")


def _checkpoint(folder: Path) -> None:
    Checkpoints(folder, 3).save(7, {"step": 7, "nested": {"list": [1.5, "x"]}, "pair": (1, None)})


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1.0, 2.0, None], "b": ["x", "y", None]}), folder / "table.parquet")


def _matlab(folder: Path) -> None:
    from scipy.io import savemat

    kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    rows = np.array([(1, 2, 3, 4, 1, "00001.jpg"), (2, 3, 4, 5, 2, "00002.jpg")], dtype=kind)
    savemat(folder / "boxes.mat", {"annotations": rows})
    savemat(folder / "names.mat", {"class_names": np.array(["one", "two"], dtype=object)})


def _font(folder: Path) -> None:
    import matplotlib

    shutil.copy(Path(matplotlib.get_data_path(), "fonts", "ttf", "cmr10.ttf"), folder / "font.ttf")


def _read_font(path: Path) -> object:
    load_font.cache_clear()
    return [has_ink("A", face) for face in read_faces([path])[0]]


def _zip(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("1", (5, 5)).save(picture, "png")
    with zipfile.ZipFile(folder / "images_background_small1.zip", "w") as archive:
        archive.writestr("small/Greek/character01/0001.png", picture.getvalue())


def _archive(folder: Path) -> None:
    _COMPARED(folder)
    write_archive(folder, folder / "results.tar.xz")


def _read_archive(path: Path) -> object:
    with unpack_archive(path) as folder:
        add_archived_runs(folder, path.parent)
        return read_results(folder)


def _dgl(folder: Path) -> None:
    import dgl
    import torch

    graph = dgl.graph((torch.tensor([0, 1]), torch.tensor([1, 2])), num_nodes=3)
    graph.ndata.update(feat=torch.ones(3, 2), label=torch.tensor([0, 1, 1]))
    dgl.save_graphs(str(folder / "graph.bin"), [graph])


_SCORES = {"steps": [{"inner_steps": k, "mean": 0.5, "ci95": 0.1, "tasks": 2, "scores": [0.4, 0.6]} for k in (0, 1)]}
_RESULTS = {"metric": "mse", "higher_is_better": False, "bn_statistics": "none", "split": "test", "trained_steps": 4,
            "weights": {"select": "last", "step": 4}, **_SCORES}  # fmt: skip
_ENVIRONMENT = {"config": {"steps": 4},
    "metareg": "1", "torch": "2", "gpus": [], "libraries": {"numpy": "2"}, "first_task": [0.5, None],
                "plugins": [{"kind": "tasks", "name": "t", "distribution": "d", "version": "1"}],
                "resumed": [{"step": 2, "changed": {"torch": "3"}}]}  # fmt: skip
_MEANS = [{"inner_steps": 1, "mean": 0.5}]
_ANALYSIS = {"layers": [{"name": "head", "relative": _MEANS}], "adapting": {"all": _MEANS}, "train": _MEANS,
             "angles": [{"degrees": {"mean": 9.5}}]}  # fmt: skip
_METRICS = "".join(
    json.dumps({"step": k, "split": split, "mse": 0.5, "ci95": 0.1, "inner_steps": 1}) + "\n"
    for k in (1, 2) for split in ("train", "validation")
)  # fmt: skip
_TIMING = "".join(json.dumps({"step": k, "steps_per_second": 9.5, "peak_bytes": None}) + "\n" for k in (1, 2))
_ANALYSIS = {"layers": [{"name": "head", "relative": [{"mean": 0.5}]}], "adapting": {"all": [{"mean": 0.5}]},
             "train": [{"mean": 0.5}], "angles": [{"degrees": {"mean": 80.0}}]}  # fmt: skip
_RUN = "runs/sinusoid/maml/seed-0"
_COMPARISON = yaml.safe_dump({
    "algo": ["maml"], "tasks": ["sinusoid"], "seeds": [0], "options": {"steps": 4},
    "tune": {"space": {"inner_lr": [0.1, 0.2]}},
})  # fmt: skip
_CONFIG = yaml.safe_dump({"algo": {"name": "maml", "config": {"inner_lr": 0.1}}, "augment": ["cml"], "steps": 4})
_CHOSEN = "tuning/sinusoid/maml/chosen.json"
_COMPARED = _both(
    _text("comparison.yaml", _COMPARISON), _text(f"{_RUN}/results.json", json.dumps(_RESULTS)),
    _text(f"{_RUN}/config.yaml", _CONFIG), _text(f"{_RUN}/metrics.jsonl", _METRICS),
    _text(f"{_RUN}/timing.jsonl", _TIMING), _text(f"{_RUN}/analysis.json", json.dumps(_ANALYSIS)),
    _text(f"{_RUN}/environment.json", json.dumps(_ENVIRONMENT)),
    _text(_CHOSEN, json.dumps({"options": {"inner_lr": 0.1}, "trials": [{"score": 0.5}, {"score": None}]})),
)  # fmt: skip
_NODES = "id,label,a,b\n" + "".join(f"n{k},{k % 2},{k}.5,0\n" for k in range(6))
_SPLIT = {"train": ["a", "b"], "validation": ["c"], "test": ["1"]}
_TABLE = "x,y,kind\n" + "".join(f"{k}.5,{k},{'ab'[k % 2]}\n" for k in range(4))


def _read_weights(path: Path) -> object:
    return backbones._read(path, "Download them")


def _read_comparison(path: Path) -> object:
    return read_results(next(each for each in path.parents if (each / "comparison.yaml").is_file()))


def _in_folder(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: read(path.parent)


def _read_environment(path: Path) -> object:
    return (
        environment._read_described(path),
        environment._read_environments(path),
        environment.read_first_config(path.parent),
    )


def _read_cached(path: Path) -> object:
    try:
        return _read_index(path)
    except DamagedStoreError:
        return None


def _cached(folder: Path) -> None:
    import hashlib

    text = json.dumps({"shape": [1, 2, 2, 1], "splits": {"train": [["a", 1, 0]], "validation": [], "test": []}})
    (folder / "index.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


_CSR = {"adj_indptr": [0, 1, 2, 3], "adj_indices": [1, 2, 0], "labels": [0, 1, 1]}
_SPARSE = {"attr_indptr": [0, 1, 2, 2], "attr_indices": [0, 1], "attr_data": [1.0, 2.0], "attr_shape": [3, 2]}

READERS = (
    Reader("configurations", "config.yaml", _text("config.yaml", _CONFIG), _in_folder(read_config), (
        "metareg.runs.run:read_config", "metareg.util.yaml_files:read_yaml", "metareg.util.yaml_files:parse_yaml",
        "metareg.runs.training:_read_base", "metareg.comparison.runner:_build_plan")),
    Reader("configurations", "free.yaml", _text("free.yaml", _CONFIG), read_yaml, ()),
    Reader("configurations", "set.txt", _text("set.txt", "inner_lr=0.1"),
           lambda path: parse_assignments([path.read_text("utf-8", "replace")]),
           ("metareg.runs.options:parse_assignments", "metareg.comparison.space:split_assignments")),
    Reader("configurations", "comparison.yaml", _text("comparison.yaml", _COMPARISON), _in_folder(Plan.read),
           ("metareg.comparison.plan:Plan.read", "metareg.util.files:read_text")),
    Reader("configurations", "recipe.yaml", _text("recipe.yaml", yaml.safe_dump(
        list_recipes()[0].model_dump(mode="json", exclude={"name"}))), Recipe.read,
        ("metareg.comparison.recipe:Recipe.read",)),
    Reader("configurations", "split.yaml", _text("split.yaml", yaml.safe_dump(_SPLIT)),
           lambda path: read_split_file(path, ["a", "b", "c", "1"], "class"),
           ("metareg.contract.split_files:read_name_lists", "metareg.contract.split_files:_parse_json")),
    Reader("configurations", "split.json", _text("split.json", json.dumps(_SPLIT)), read_name_lists, ()),
    Reader("reports", f"{_RUN}/results.json", _COMPARED, _read_comparison, (
        "metareg.comparison.results:_TaskReader._read_test", "metareg.comparison.results:_read_steps",
        "metareg.util.files:read_json", "metareg.util.files:parse_json", "metareg.comparison.results:_read_lines")),
    Reader("reports", f"{_RUN}/environment.json", _COMPARED, _read_comparison,
           ("metareg.comparison.results:_TaskReader._note_environment",)),
    Reader("reports", f"{_RUN}/metrics.jsonl", _COMPARED, _read_comparison,
           ("metareg.comparison.results:_TaskReader._read_curve",)),
    Reader("reports", f"{_RUN}/timing.jsonl", _COMPARED, _read_comparison,
           ("metareg.comparison.results:_TaskReader._read_cost",)),
    Reader("reports", f"{_RUN}/analysis.json", _both(_COMPARED, _text(f"{_RUN}/analysis.json", json.dumps(_ANALYSIS))),
           _read_comparison, ("metareg.comparison.results:_TaskReader.read_arm",)),
    Reader("reports", _CHOSEN, _COMPARED, _read_comparison, ("metareg.comparison.results:_read_chosen",)),
    Reader("reports", "error.txt", _text("error.txt", "UsageError: no\n"), _in_folder(read_failure),
           ("metareg.comparison.pool:read_failure",)),
    Reader("reports", "timing.jsonl", _text("timing.jsonl", _TIMING),
           lambda path: read_progress(SimpleNamespace(path=path.parent)), ("metareg.comparison.runner:read_progress",)),
    Reader("reports", "trial.json", _text("trial.json", json.dumps({"options": {"a": 1}, "error": None})),
           tuning._read_trial, ("metareg.comparison.tuning:_read_key",)),
    Reader("reports", "results.json", _text("results.json", json.dumps(_RESULTS)),
           lambda path: (read_evaluations(path.parent), read_planned_steps(path.parent, SimpleNamespace(steps=4)),
                         has_stopped_early(path.parent)),
           ("metareg.runs.run:read_evaluations", "metareg.runs.run:read_planned_steps",
            "metareg.runs.run:has_stopped_early")),
    Reader("reports", "environment.json", _text("environment.json", json.dumps(_ENVIRONMENT)), _read_environment,
           ("metareg.runs.environment:_read_environments", "metareg.runs.environment:_read_described",
            "metareg.runs.environment:read_first_config")),
    Reader("reports", "metrics.jsonl", _text("metrics.jsonl", _METRICS),
           lambda path: Run.metrics(SimpleNamespace(path=path.parent)), ("metareg.runs.run:Run.metrics",)),
    Reader("reports", "lines.jsonl", _text("lines.jsonl", _METRICS),
           lambda path: LinesFile(path).cut({"bytes": 9, "sha256": ""}, 9),
           ("metareg.util.files:LinesFile.cut", "metareg.util.files:TimedLinesFile.cut", "metareg.util.files:_legible")),
    Reader("reports", "baselines.json", _text("baselines.json", json.dumps(
        [{"name": "x", "rate": 0.1, **_RESULTS}])),
        lambda path: Run.evaluate_baselines(SimpleNamespace(path=path.parent, config=SimpleNamespace(model=None))),
        ("metareg.runs.run:Run.evaluate_baselines",)),
    Reader("containers", "learner.safetensors", _learner, MetaLearner.load,
           ("metareg.util.tensorfile:TensorFile.__init__", "metareg.util.tensorfile:TensorFile.read")),
    Reader("containers", "step-000000007.safetensors", _checkpoint, lambda path: Checkpoints(path.parent, 3).load(7), ()),
    *(Reader("containers", f"weights.{ending}", _weights(ending), _read_weights, ("metareg_image.backbones:_read",))
      for ending in ("safetensors", "pth")),
    Reader("containers", "index.json", _cached, _read_cached, ("metareg_image.store:_read_index",)),
    Reader("tables", "table.csv", _text("table.csv", _TABLE), read_table, ("metareg.util.tables:_decode",)),
    Reader("tables", "table.parquet", _parquet, read_table, ("metareg.util.tables:_read_parquet",)),
    Reader("tables", "groups.csv", _text("groups.csv", "character,group\nA,1\nU+4E00,2\n"), read_groups,
           ("metareg_image.characters:read_groups",)),
    Reader("tables", "unihan.txt", _text("unihan.txt", "U+4E00\tkRSUnicode\t1.0\nU+4E01\tkRSUnicode\t1'.1\n"), read_groups,
           ()),
    Reader("images", "font.ttf", _font, _read_font, ("metareg_image.font_files:_read_collection",)),
    Reader("archives", "results.tar.xz", _archive, _read_archive, (
        "metareg.comparison.archive:unpack_archive", "metareg.comparison.archive:_decompress",
        "metareg.comparison.archive:_widen_scores", "metareg.comparison.archive:_read_options")),
    Reader("archives", "table.npz", _arrays("table.npz", x=[1.5, 2], y=[[1, 2], [3, 4]], z=["a", "b"]), read_table,
           ("metareg.util.arrays:open_arrays",)),
    Reader("archives", "images_background_small1.zip", _zip, _read_characters, ("metareg_image.omniglot:_read_characters",)),
    *(Reader("images", f"picture.{ending}", _image(f"picture.{ending}", mode), lambda path: load_image(path, 3),
             ("metareg.util.images:load_image",))
      for ending, mode in (("png", "LA"), ("jpg", "RGB"), ("gif", "P"), ("tiff", "I;16"), ("bmp", "1"), ("webp", "RGBA"),
                           ("tga", "RGB"), ("ppm", "L"), ("ico", "RGBA"))),
    Reader("graphs", "graph.npz", _arrays("graph.npz", **_CSR, **_SPARSE), load_graph, ()),
    Reader("graphs", "dense.npz", _arrays("dense.npz", **_CSR, features=[[1.0], [2], [3]], train_mask=[1, 0, 1]),
           load_graph, ()),
    Reader("graphs", "nodes.csv", _both(_text("nodes.csv", _NODES), _text("edges.csv", "source,target\nn0,n1\n")),
           _in_folder(load_graph), ()),
    Reader("graphs", "edges.csv", _both(_text("nodes.csv", _NODES), _text("edges.csv", "source,target\nn0,n1\n")),
           _in_folder(load_graph), ()),
    Reader("graphs", "splits.json", _both(
        _text("nodes.csv", _NODES), _text("edges.csv", "source,target\nn0,n1\n"),
        _text("splits.json", json.dumps({"nodes": {"train": ["n0"], "test": ["n1"]}}))),
        _in_folder(load_graph), ("metareg_graph.data:_read_splits",)),
    *(Reader("graphs", f"raw/{name}.csv.gz", _both(
        _packed("raw/edge.csv.gz", "0,1\n1,2\n"), _packed("raw/node-feat.csv.gz", "1.5,2\n2,3\n0,1\n"),
        _packed("raw/node-label.csv.gz", "0\n1\n1\n")), lambda path: load_graph(path.parent.parent),
        ("metareg_graph.data:_read_table",)) for name in ("edge", "node-feat", "node-label")),
)  # fmt: skip
"""Readers that are tested in this process."""

CHILDREN = (
    Reader("graphs", "graph.bin", _dgl, load_graph, ("metareg_graph.data:_read_dgl", "metareg_graph.dgl_files:read_graphs")),
    Reader("archives", "boxes.mat", _matlab, read_boxes, ("metareg_image.matlab:read_boxes",)),
    Reader("archives", "names.mat", _matlab, read_class_names, ("metareg_image.matlab:read_class_names",)),
)  # fmt: skip
"""Readers that can crash, and run in separate processes."""

OWN = {
    "metareg.runs.environment:settle_strategy": "reads by _read_environments, which is tried",
    "metareg.runs.run:Run._repr_html_": "the bytes of a picture, which are passed on",
    "metareg_mlflow:MLflow.on_run_start": "the run's id, which this observer wrote",
    "metareg_wandb:WandB.on_run_start": "the run's id, which this observer wrote",
    "metareg.cli.scaffold:_render_files": "templates of the package",
    "metareg.registry.costs:find_cost": "a file of the package",
    "metareg_image.splits:read_splits": "files of the package",
    "metareg.comparison.pool:_Worker._listen": "answers of a process that this one started",
    "metareg.comparison.pool:_serve.read": "questions of the process that started this one",
    "metareg.util.child_process:_take": "what a child process wrote, read as a stranger's: the texts alone are taken",
    "metareg.util.child_process:_limit": "/proc",
    "metareg.util.native:_describe_build": "metareg's own source",
    "metareg.util.native:describe_processor": "/proc",
    "metareg.util.program_cache:find_program": "the compiler's cache, by digest",
    "metareg.util.program_cache:keep_program": "what the compiler has just written",
    "metareg.util.devices:peak_memory": "/proc",
    "metareg.util.files:LinesFile.mark": "only flushes it",
    "metareg.util.files:replace_file": "only flushes it",
    "metareg.util.files:open_to_append": "only writes",
    "metareg.util.files:sync_folder": "only flushes a folder",
    "metareg.util.files:lock_folder": "the owner of a lock, for a message; anything else in it is ignored",
    "metareg.cli.terminal:_Stream._give_up": "the null device",
    "metareg.cli.terminal:_occupy": "the null device",
    "metareg.registry.inspection:_Child._receive": "answers of a process that this one started",
    "metareg.registry.inspection:_main": "questions of the process that started this one",
    "metareg.registry.plugins:_holds_this_package": "what an installer wrote of this package",
    "metareg.comparison.archive:_prepare": "copies it",
    "metareg.comparison.archive:_shorten_locations": "configurations, and takes what is damaged as it is",
    "metareg.comparison.archive:_narrow_scores": "as _widen_scores, and takes what is damaged as it is",
    "metareg.comparison.archive:write_archive": "files that it puts together as they are",
    "metareg_jsonl:JSONLines.on_run_start": "only writes",
    "metareg_image.fonts:_read_quietly": "bytes of a file, for a checksum",
    "metareg_image.store:ImageStore._open": "bytes of a known number, with checksums",
    "metareg_image.standard:Aircraft.images": "torchvision's; TorchvisionTask.classes explains whatever is wrong",
    "metareg.comparison.reproduction:_check_judged": "one text of a JSON object, if it is one",
    "metareg.testing.stages:_list_exported_names": "a file that the check wrote",
}
"""Functions that read no untrusted file, and why."""
