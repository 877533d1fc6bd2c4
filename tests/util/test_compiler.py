"""Compiled programs: what the compiler is asked to leave out, and programs that other processes have compiled."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metareg.util import compiler
from metareg.util.native import find_compiler
from metareg.util.torch_internals import create_loop, trace

WEIGHT = torch.arange(4.0)
INPUTS = (torch.arange(12.0).view(3, 4), torch.linspace(0, 1, 16).view(4, 4))


def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [torch.func.grad(lambda x: ((x @ y).sin() * WEIGHT).sum())(x), x.t().contiguous()]


def test_compiling_without_the_private_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    with torch.no_grad():
        graph = trace(function, INPUTS)
        expected = compiler.compile_graph(graph, INPUTS)(*INPUTS)
        monkeypatch.delattr(torch._inductor, "compile")
        found = compiler.compile_graph(graph, INPUTS)(*INPUTS)
        assert all(map(torch.equal, found, expected))


def make_loop(body: Any) -> torch.fx.GraphModule:
    goes_on, turn = (trace(each, INPUTS) for each in (lambda x, y: x.sum() < 3, body))
    return create_loop(goes_on, turn, len(INPUTS))


def write(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    x.add_(1)
    return [x + 1, y * 2]


@pytest.mark.parametrize(
    ("body", "is_skipped"),
    [
        (lambda x, y: [x + 1, y * 2], True),
        (lambda x, y: [x + 1, y], False),
        (lambda x, y: [x + 1, y.view(-1)], False),
        (lambda x, y: [x + 1, y.split(1)[0]], False),
        (lambda x, y: [x + 1] * 2, False),
        (write, False),
    ],
)
def test_loops_are_not_searched_for_shared_tensors_if_all_are_new(body: Any, is_skipped: bool) -> None:
    while_loop = importlib.import_module(
        "torch._higher_order_ops.while_loop"
    )  # the package has a function of this name
    check = while_loop._check_alias_and_mutation
    with compiler._skip_checks(make_loop(body)):
        assert (while_loop._check_alias_and_mutation is not check) == is_skipped
    assert while_loop._check_alias_and_mutation is check


@pytest.mark.skipif(os.name != "posix" or find_compiler() is None, reason="needs a C++ compiler")
def test_vector_instructions_are_those_that_the_compiler_knows() -> None:
    from torch._inductor import cpu_vec_isa

    build = cpu_vec_isa.VecISA.check_build
    graph = trace(function, INPUTS)
    with compiler._skip_checks(graph):
        for flags, known in (("", True), ("-fPIC -O1", True), ("-mno-such-instructions", False)):
            instructions: Any = SimpleNamespace(build_arch_flags=lambda flags=flags: flags)
            assert cpu_vec_isa.VecISA.check_build(instructions, "") is known
    assert cpu_vec_isa.VecISA.check_build is build


def test_the_parts_of_a_program_are_built_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import codecache

    together, locks, attempts = threading.Barrier(2), [], []

    class Builder:
        def __init__(self, name: str, *, fails: bool) -> None:
            self.get_target_file_path = lambda: str(tmp_path / name)
            self.name, self.fails = name, fails

        def build(self) -> None:
            attempts.append(self.name)
            if self.name != "program" and attempts.count(self.name) == 1:
                together.wait(timeout=60)
                if self.fails:
                    raise OSError("the first attempt fails")
            Path(self.get_target_file_path()).touch()

    def build(lock: str, builders: Sequence[Builder]) -> None:
        locks.append(lock)
        for builder in builders:
            if not Path(builder.get_target_file_path()).exists():
                builder.build()

    monkeypatch.setattr(codecache, "_worker_compile_cpp", build)
    for fails in (False, True):
        builders = [Builder(name, fails=fails and name == "kernels") for name in ("calls", "kernels", "program")]
        with compiler._build_at_once():
            codecache._worker_compile_cpp("lock", builders)
            assert {path.name for path in tmp_path.iterdir()} == {"calls", "kernels", "program"}
            assert sorted(attempts) == ["calls", "kernels", *["kernels"] * fails, "program"]
            assert attempts[-1] == "program"
            attempts.clear()
            codecache._worker_compile_cpp("lock", builders)
            assert not attempts, "nothing is missing"
        for path in tmp_path.iterdir():
            path.unlink()
    assert codecache._worker_compile_cpp is build
    assert locks == ["lock"] * 4, "other processes wait for all parts"


def test_strides_are_those_of_simplified_indices() -> None:
    import sympy
    from torch._inductor import sizevars
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    x, y, size = sympy.symbols("x y size", integer=True, nonnegative=True)
    indices = [
        sympy.Integer(3), x, 40 * x + y, size * (x + 2 * y) - x, (x + 1) * (size - 1), FloorDiv(x, 16) + y,
        ModularIndexing(x, 1, 32) + 3 * x, FloorDiv(x, 5),
    ]  # fmt: skip

    def find_strides() -> list[Any]:
        sizevars.stride_at_vec_range.cache_clear()
        return [sizevars.stride_at_vec_range(index, x, 16) for index in indices]

    expected = find_strides()
    with compiler._skip_checks(trace(function, INPUTS)):
        assert find_strides() == expected
        assert sizevars.simplify_index_in_vec_range(x >= y, x, 16) == (x >= y)
    sizevars.stride_at_vec_range.cache_clear()


def test_programs_are_kept_where_only_the_user_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(variable, "elsewhere")
    compiler._choose_cache()
    assert os.environ[variable] == "elsewhere"
    (tmp_path / "file").touch()
    for home in (tmp_path / "home", tmp_path / "file" / "home"):  # the second one cannot be created
        monkeypatch.delenv(variable)
        monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, home=home, **__: str(home))
        compiler._choose_cache()
        folder = Path(os.environ[variable])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder == home / "inductor") == (home == tmp_path / "home")
    folder.rmdir()


def test_torchs_own_choice_of_a_folder_is_not_the_users(tmp_path: Path) -> None:
    """Importing the compiler sets the variable."""
    code = "import torch._dynamo; from metareg.util import compiler; print(compiler._choose_cache())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path), "HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True, cwd=tmp_path
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


COMPILED_STEPS = """
import json, sys
import torch
from metareg import MetaLearner
from metareg.registry.task_source import TaskSource

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
learner = MetaLearner(network, loss="mse", inner_lr=0.01, strategy="compiled")
for step in range(3):
    learner.step(TaskSource.of("sinusoid").episodes("train", range(4 * step, 4 * step + 4), 0))
compiles = "torch._inductor.compile_fx" in sys.modules
print(json.dumps([compiles, {name: value.tolist() for name, value in learner.meta_parameters.items()}]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    def train() -> tuple[bool, dict[str, Any]]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", COMPILED_STEPS], env=environment, capture_output=True, check=True, text=True
        )
        compiles, weights = json.loads(done.stdout)
        return compiles, weights

    (first, weights), (second, again) = train(), train()
    assert (first, second) == (True, False)
    assert again == weights
    for path in tmp_path.rglob("*"):  # a killed compiler leaves empty files
        if path.is_file():
            os.truncate(path, min(3, path.stat().st_size))
    assert train()[1] == weights
