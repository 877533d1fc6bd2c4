"""Programs that run without metareg: torch.export's format or ONNX, with a description of inputs and outputs."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from metareg._version import __version__
from metareg.contract.columns import Columns
from metareg.contract.named import NamedExamples
from metareg.contract.splits import TEST
from metareg.contract.tasks import Task
from metareg.engine.adaptive_program import create_adaptive_program
from metareg.errors import UsageError
from metareg.learner.learner import MetaLearner
from metareg.registry.plugins import Plugin
from metareg.registry.task_source import TaskSource
from metareg.util.devices import move_tensors
from metareg.util.files import write_bytes

__all__ = [
    "ENDINGS",
    "FACTS",
    "describe_program",
    "export_adaptation",
    "export_module",
    "export_named",
    "get_input_shape",
    "write_program",
]

log = logging.getLogger("metareg")

FACTS = "metareg.json"
"""The file in an exported program that describes its inputs and outputs; in ONNX, an entry of the metadata."""
ENDINGS = (".pt2", ".onnx")
_TOLERANCE = 1e-4
"""Tolerance of a program's outputs, relative to the largest."""


def export_module(module: nn.Module, input_shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """Export a module as a program for any number of inputs.

    Raises:
        UsageError: torch.export cannot export it.
    """
    example = torch.zeros(2, *input_shape, dtype=next(module.parameters()).dtype)
    return _export(module, example)


def export_named(module: nn.Module, named: NamedExamples, numbers: Tensor) -> torch.export.ExportedProgram:
    """Export an adapted module as a program that contains a task's examples and takes their numbers.

    Args:
        module: takes the examples' inputs.
        named: the examples.
        numbers: numbers of some examples, used to compare the program with the module.

    Raises:
        UsageError: torch.export cannot export it, or the program's outputs differ.
    """
    program = _export(named.bind(module), torch.cat([numbers, numbers])[:2])
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        outputs, expected = program.module()(numbers), module(move_tensors(named.read(numbers), "cpu", dtype))
    if not torch.allclose(outputs, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
        raise UsageError(
            f"The {type(module).__name__} computes different outputs for all {named.column}s at once than for some of "
            "them, so it cannot be exported as a program; use `metareg predict`."
        )
    return program


def _export(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    # A user's model can fail in any way, and torch.export raises many kinds of errors.
    except Exception as error:
        problem = str(error).strip().splitlines()[0]
        raise UsageError(f"torch.export cannot export the {type(module).__name__}: {problem}") from error


def export_adaptation(
    learner: MetaLearner, task: Plugin, inner_steps: int, bn_statistics: str
) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """Export a learner's adaptation as a program that takes ``support_x, support_y, query_x`` and returns predictions.

    Inputs and targets are the model's; for a task on tables, they are in the units of the tables.

    Returns:
        The program and its description.

    Raises:
        UsageError: the adaptation cannot be traced.
    """
    meta, engine = learner.plain_meta_parameters, learner.engine
    noise = next(iter(engine.draw_for_adaptation(meta, inner_steps, learner.config.seed, [()])), {})
    measure: Callable[[Tensor, Tensor], Columns | None]
    measure = getattr(task.instance, "measure_columns", None) or partial(Task.measure_columns, task.instance)
    named: NamedExamples | None = getattr(task.instance, "named_examples", None)
    table = None if named is None else _get_table(named, next(iter(meta.values())))

    def predict(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        if table is not None:
            support_x, query_x = table[support_x], table[query_x]
        columns = measure(support_x, support_y)
        if columns is None:
            return engine.predict(meta, (support_x, support_y, query_x, None), noise, inner_steps, bn_statistics)
        support_x, query_x = columns.scale_inputs(support_x), columns.scale_inputs(query_x)
        given = support_x, columns.scale_targets(support_y), query_x, None
        return columns.restore_outputs(engine.predict(meta, given, noise, inner_steps, bn_statistics))

    draw = (
        partial(_draw_examples, learner, task) if table is None else partial(_draw_numbers, len(table), learner, task)
    )
    made = create_adaptive_program(predict, draw, partial(_find_sizes, learner, task))
    for name, count in (("support", made.support), ("query", made.query)):
        if count is not None:
            log.warning("The program takes exactly %d %s examples, as many as a test task has.", count, name)
    facts = {"support_examples": made.support or "any", "query_examples": made.query or "any"}
    columns = measure(*draw(2, 1)[:2])
    return made.program, facts | ({} if columns is None else describe_columns(columns))


def _get_table(named: NamedExamples, like: Tensor) -> Tensor:
    """Return the inputs of all examples that a task holds.

    Raises:
        UsageError: an input is not a single row of a table.
    """
    if named.table is None:
        raise UsageError(
            f"An input of this model is the neighbourhood of a {named.column}, which a program that adapts cannot look "
            "up; it supports models whose input is one row of numbers, such as sgc. With --support instead of "
            "--adaptive, the program contains the whole graph."
        )
    return named.table.to(like)


def describe_program(
    learner: MetaLearner, task: Plugin, inner_steps: int, bn_statistics: str, columns: Columns | None
) -> dict[str, Any]:
    """Describe a program's inputs and outputs, as a dict for JSON."""
    named: NamedExamples | None = getattr(task.instance, "named_examples", None)
    shape = get_input_shape(task) if named is None else ()
    classifies = learner.loss is nn.functional.cross_entropy
    return {
        "metareg": __version__,
        "algorithm": learner.algorithm.name,
        "inner_steps": inner_steps,
        "bn_statistics": bn_statistics if learner.model.batch_norms else "none",
        "predictor": learner.predictor,
        "input_shape": list(shape),
        "outputs": "scores of classes, whose softmax is their probabilities" if classifies else "numbers",
        **({} if columns is None else describe_columns(columns)),
        **({} if named is None else {"numbers_of": named.column, "names": named.names and list(named.names)}),
        **({"image": _describe_images(task, shape)} if len(shape) == 3 else {}),
    }


def describe_columns(columns: Columns) -> dict[str, Any]:
    """Describe each input, target and class."""
    return {"inputs": columns.features, "targets": columns.targets, "classes": columns.classes}


def _describe_images(task: Plugin, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the size of a task's images and its values of black and white, found by reading two images."""
    channels, height, width = shape
    read = getattr(task.instance, "read_image", None) or partial(Task.read_image, task.instance)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("black", "white"):
            path = Path(folder, f"{name}.png")
            Image.new("RGB", (width, height), name).save(path)
            values[name] = read(path).flatten(1).mean(1).tolist()
    prepared = getattr(task.instance, "image_preparation", Task.image_preparation)
    own_reader = getattr(type(task.instance), "read_image", Task.read_image) is not Task.read_image
    if own_reader and prepared == Task.image_preparation:  # inherited text that describes another reader
        prepared = None
    return {"channels": channels, "height": height, "width": width, **values, "prepared": prepared}


def _draw_examples(learner: MetaLearner, task: Plugin, support: int, query: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random examples with a task's shapes."""
    like = next(iter(learner.plain_meta_parameters.values()))
    generator = torch.Generator().manual_seed(support * 1000 + query)
    shape, outputs = get_input_shape(task), task.instance.spec.output_shape
    support_x, query_x = (torch.randn(count, *shape, generator=generator).to(like) for count in (support, query))
    if learner.loss is nn.functional.cross_entropy:
        return support_x, torch.arange(support, device=like.device) % outputs[0], query_x
    return support_x, torch.randn(support, *outputs, generator=generator).to(like), query_x


def _draw_numbers(
    examples: int, learner: MetaLearner, task: Plugin, support: int, query: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the numbers of some examples that a task holds, and their targets."""
    _, support_y, _ = _draw_examples(learner, task, support, query)
    generator = torch.Generator().manual_seed(support * 1000 + query)
    numbers = torch.randint(examples, (support + query,), generator=generator).to(support_y.device)
    return numbers[:support], support_y, numbers[support:]


def _find_sizes(learner: MetaLearner, task: Plugin) -> tuple[int, int]:
    """Return the number of support and query examples of the first test task."""
    support_x, _, query_x, _ = TaskSource(task).episodes(TEST, [0], learner.config.seed)[0].parts
    return support_x.shape[1], query_x.shape[1]


def get_input_shape(task: Plugin) -> tuple[int, ...]:
    """Return the shape of one input.

    Raises:
        UsageError: the inputs are not tensors of one shape.
    """
    shape = task.instance.spec.input_shape
    if not all(isinstance(size, int) for size in shape):
        raise UsageError(f"The inputs of the {task.label} are neither vectors nor images.")
    return tuple(shape)


def write_program(program: torch.export.ExportedProgram, to: Path, facts: Mapping[str, Any]) -> None:
    """Write a program in torch.export's format, or as ONNX if the path ends in ``.onnx``.

    Raises:
        UsageError: a package is missing, or ONNX does not support one of the program's operations.
    """
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    if to.suffix == ".onnx":
        write_bytes(to, _convert_to_onnx(program, text))
        return
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: text})
    write_bytes(to, buffer.getvalue())


def _convert_to_onnx(program: torch.export.ExportedProgram, facts: str) -> bytes:
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it)
    except ImportError as error:
        raise UsageError("ONNX files need onnxscript: pip install 'metareg[onnx]'.") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's deprecation warnings about itself
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
    # The converter raises many kinds of errors, with long reports.
    except Exception as error:
        cause = error.__cause__ or error
        problem = str(cause).strip().splitlines()[0]
        raise UsageError(f"torch.onnx cannot convert this program: {problem} Export it to FILE.pt2 instead.") from error
    assert converted is not None
    converted.model.metadata_props[FACTS] = facts
    content: bytes = converted.model_proto.SerializeToString()
    return content
