"""Programs compiled before: they are found again by all that they were compiled from, and only if their files are intact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metareg.util import compiler, program_cache
from metareg.util.native import find_compiler
from metareg.util.program_cache import describe_program, find_program, keep_program
from metareg.util.torch_internals import create_loop, import_compiler, trace

INPUTS = (torch.arange(12.0).view(3, 4), torch.linspace(0, 1, 16).view(4, 4))


def multiply(x: Tensor, y: Tensor) -> list[Tensor]:
    return [(x @ y).sin() * 0.5, x.sum()]


def trace_loop(turns: float, factor: float) -> torch.fx.GraphModule:
    goes_on, body = (trace(each, INPUTS) for each in (lambda x, _: x.sum() < turns, lambda x, y: [x * factor, y + 1]))
    return create_loop(goes_on, body, 2)


@pytest.fixture(autouse=True, scope="module")
def _imported() -> Iterator[None]:
    import_compiler()
    with torch.no_grad():
        yield


def describe(function: Callable[..., list[Tensor]] = multiply, inputs: tuple[Tensor, ...] = INPUTS) -> str:
    key = describe_program(trace(function, inputs), inputs)
    assert key is not None
    return key


def test_equal_work_has_one_description() -> None:
    others = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    assert describe() == describe() == describe(inputs=others)
    assert describe_program(trace_loop(3, 2.0), INPUTS) == describe_program(trace_loop(3, 2.0), INPUTS)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, y: [(x @ y).sin() * 0.25, x.sum()], INPUTS),
        (lambda x, y: [(x @ y).cos() * 0.5, x.sum()], INPUTS),
        (lambda x, y: [x.sum(), (x @ y).sin() * 0.5], INPUTS),
        (multiply, (torch.zeros(2, 4), INPUTS[1])),
        (multiply, (INPUTS[0], INPUTS[1].t())),
        (multiply, tuple(each.double() for each in INPUTS)),
    ],
    ids=["constant", "operation", "order", "shape", "strides", "type"],
)
def test_other_work_has_another_description(function: Any, inputs: tuple[Tensor, ...]) -> None:
    assert describe(function, inputs) != describe()


def test_the_parts_of_a_loop_belong_to_its_description() -> None:
    loops = [trace_loop(3, 2.0), trace_loop(4, 2.0), trace_loop(3, 4.0)]
    assert len({describe_program(loop, INPUTS) for loop in loops}) == 3


def test_settings_belong_to_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as settings

    keys = [describe()]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(describe())
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    keys.append(describe())
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    keys.append(describe())
    torch.set_default_dtype(torch.float32)
    with settings.patch(cpp_wrapper=not settings.cpp_wrapper):
        keys.append(describe())
    monkeypatch.setattr(program_cache, "describe_processor", lambda: ["another one"])
    keys.append(describe())
    monkeypatch.setattr(torch, "__version__", "2.99")
    keys.append(describe())
    assert len(set(keys)) == len(keys)


def test_what_no_other_process_can_have_is_not_described() -> None:
    weight = torch.arange(4.0)
    assert describe_program(trace(lambda x, y: [x * weight, y + 1], INPUTS), INPUTS) is None
    meta = tuple(each.to("meta") for each in INPUTS)
    assert describe_program(trace(multiply, INPUTS), meta) is None
    with torch.enable_grad():
        assert describe_program(trace(multiply, INPUTS), INPUTS) is None


@pytest.mark.parametrize(
    "given",
    [{"force_disable_caches": True}, {"fx_graph_cache": False}, {"post_grad_custom_pre_pass": lambda graph: None}],
    ids=lambda given: next(iter(given)),
)
def test_no_program_is_kept_without_caches_and_with_passes_of_the_users(given: dict[str, Any]) -> None:
    import torch._inductor.config as settings

    graph = trace(multiply, INPUTS)
    with settings.patch(given):
        assert describe_program(graph, INPUTS) is None
    assert describe_program(graph, INPUTS) is not None


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_program_is_found_as_long_as_its_library_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graph = trace_loop(1000, 1.5)
    expected = INPUTS
    while expected[0].sum() < 1000:
        expected = expected[0] * 1.5, expected[1] + 1
    first = compiler.compile_graph(graph, INPUTS)
    monkeypatch.setattr("torch._inductor.compile", lambda *_: pytest.fail("compiled again"))
    again = compiler.compile_graph(trace_loop(1000, 1.5), INPUTS)
    for program in (first, again):
        found = program(*INPUTS)
        assert all(map(torch.equal, found, expected))
        assert not any(value.requires_grad for value in found)

    (entry,) = (tmp_path / "metareg").iterdir()
    assert find_program(entry.stem, tmp_path) is not None
    known = json.loads(entry.read_text())
    library = tmp_path / known["library"]
    content = library.read_bytes()
    library.unlink()  # this process has mapped the file into memory
    assert find_program(entry.stem, tmp_path) is None
    library.write_bytes(content[:-1])
    assert find_program(entry.stem, tmp_path) is None
    assert not library.exists(), "torch's compiler would load it"
    library.write_bytes(content)
    assert find_program(entry.stem, tmp_path) is not None
    for damaged in ("", "[]", "{}", json.dumps({**known, "function": "none"}), json.dumps({**known, "library": 3})):
        entry.write_text(damaged)
        assert find_program(entry.stem, tmp_path) is None

    # A function with more inputs than the graph has would read beyond the end of its arguments.
    keep_program("more", library, known["function"], len(INPUTS), tmp_path)
    keep_program("fewer", library, known["function"], len(INPUTS) - 1, tmp_path)
    assert find_program("more", tmp_path) is not None
    assert find_program("fewer", tmp_path) is None
