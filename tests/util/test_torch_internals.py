"""Private names of torch: one module uses them; without them, results are equal or a message says what to install."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import distributed_c10d
from torch.fx.experimental import proxy_tensor
from torch.utils import _python_dispatch, _pytree

from metareg import MetaregError, UsageError
from metareg.util import tensorfile, torch_internals
from metareg.util.native import find_compiler

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("metareg", "plugins", "tasks", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(torch_internals.__file__)
]
# Names with a leading underscore on torch's objects.
PRIVATE_ATTRIBUTES = {
    name
    for thing in (nn.Linear(1, 1), torch.zeros(1), torch.ops.aten.add.Tensor, torch.fx.symbolic_trace(nn.Linear(1, 1)))
    for name in dir(thing)
    if name.startswith("_") and not name.startswith("__")
}
# A reference without metareg.
EXCEPTIONS = {("benchmarks/loops.py", name) for name in ("_modules", "_parameters", "_buffers")} | {
    ("benchmarks/device_parts/strategies.py", name) for name in ("torch._inductor.config", "_inductor")
}
TREE_NAMES = ("tree_map", "tree_leaves", "tree_flatten", "tree_unflatten")


def private_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            dotted = [f"{module}.{alias.name}" if module else alias.name for alias in node.names]
            yield from (name for name in dotted if name.startswith("torch.") and "._" in name)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            chain = ast.unparse(node)
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and (chain.startswith("torch.") or node.attr in PRIVATE_ATTRIBUTES):
                yield node.attr


def test_no_other_module_uses_a_private_name_of_torch() -> None:
    found = {(path.relative_to(ROOT).as_posix(), name) for path in FILES for name in private_names(path)}
    assert found - EXCEPTIONS == set()
    assert "_modules" in set(private_names(Path(torch_internals.__file__)))


def load_again(module: ModuleType) -> Any:
    spec = importlib.util.spec_from_file_location("again", str(module.__file__))
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def load_without(*names: tuple[Any, str], **modules: Any) -> Any:
    """Reload the module as with a torch that lacks some names and has other modules; restore everything afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in names:
            patch.delattr(owner, name)
        for name, module in modules.items():
            patch.setitem(sys.modules, f"torch.utils.{name}", module)
        return load_again(torch_internals)


def test_trees_are_those_of_the_public_module_where_the_private_one_is_gone() -> None:
    public = SimpleNamespace(**{name: getattr(_pytree, name) for name in TREE_NAMES})
    without = load_without(*((_pytree, name) for name in TREE_NAMES), pytree=public)
    tree = {"a": torch.ones(2), "b": (torch.zeros(1), [torch.ones(1)])}
    leaves, structure = without.tree_flatten(tree)
    assert leaves == torch_internals.tree_leaves(tree) == without.tree_leaves(tree)
    assert str(without.tree_map(torch.exp, tree)) == str(torch_internals.tree_map(torch.exp, tree))
    assert str(without.tree_unflatten(leaves, structure)) == str(tree)


def test_a_torch_without_trees_is_refused_in_one_sentence() -> None:
    with pytest.raises(MetaregError, match=r"tree_map.*2\.8 to"):
        load_without((_pytree, "tree_map"))


def test_the_oldest_torch_named_is_the_lower_bound() -> None:
    oldest = torch_internals._TESTED.split(" to ")[0]
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_layers_are_known_without_their_private_ancestors() -> None:
    batchnorm, dropout = nn.modules.batchnorm, nn.modules.dropout
    without = load_without((batchnorm, "_BatchNorm"), (batchnorm, "_NormBase"), (dropout, "_DropoutNd"))
    # Lazy layers become ordinary ones before metareg receives a model.
    layers = [
        layer
        for name, layer in vars(nn).items()
        if isinstance(layer, type) and issubclass(layer, nn.Module) and not name.startswith("Lazy")
    ]
    for kind in ("BATCH_NORM", "NORM_WITH_STATISTICS", "DROPOUT"):
        known = {layer for layer in layers if issubclass(layer, getattr(torch_internals, kind))}
        assert known
        assert {layer for layer in layers if issubclass(layer, getattr(without, kind))} == known


def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    return [torch.func.grad(lambda x: ((x @ y).sin() * WEIGHT).sum())(x), x.t().contiguous()]


WEIGHT = torch.arange(4.0)
INPUTS = (torch.arange(12.0).view(3, 4), torch.linspace(0, 1, 16).view(4, 4))


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gone", ["the name", "the options"])
def test_tracing_without_private_names(monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    import functorch

    assert functorch.make_fx is proxy_tensor.make_fx
    with torch.no_grad():
        expected = function(*INPUTS)
        original = proxy_tensor.make_fx
        if gone == "the name":
            monkeypatch.delattr(proxy_tensor, "make_fx")
        else:
            monkeypatch.setattr(proxy_tensor, "make_fx", lambda function: original(function))
        graph = torch_internals.trace(function, INPUTS)
        assert_equal(graph.forward(*INPUTS), expected)
        assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")


def test_no_tracer_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import functorch

    monkeypatch.delattr(proxy_tensor, "make_fx")
    monkeypatch.delattr(functorch, "make_fx")
    with pytest.raises(MetaregError, match="make_fx"):
        torch_internals.trace(function, INPUTS)


def test_compiling_without_the_private_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    with torch.no_grad():
        graph = torch_internals.trace(function, INPUTS)
        expected = torch_internals.compile_graph(graph, INPUTS)(*INPUTS)
        monkeypatch.delattr(torch._inductor, "compile")
        assert_equal(torch_internals.compile_graph(graph, INPUTS)(*INPUTS), expected)


def make_loop(body: Any) -> torch.fx.GraphModule:
    goes_on, turn = (torch_internals.trace(each, INPUTS) for each in (lambda x, y: x.sum() < 3, body))
    return torch_internals.create_loop(goes_on, turn, len(INPUTS))


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
    with torch_internals._skip_checks(make_loop(body)):
        assert (while_loop._check_alias_and_mutation is not check) == is_skipped
    assert while_loop._check_alias_and_mutation is check


@pytest.mark.skipif(os.name != "posix" or find_compiler() is None, reason="needs a C++ compiler")
def test_vector_instructions_are_those_that_the_compiler_knows() -> None:
    from torch._inductor import cpu_vec_isa

    build = cpu_vec_isa.VecISA.check_build
    graph = torch_internals.trace(function, INPUTS)
    with torch_internals._skip_checks(graph):
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
        with torch_internals._build_at_once():
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
    with torch_internals._skip_checks(torch_internals.trace(function, INPUTS)):
        assert find_strides() == expected
        assert sizevars.simplify_index_in_vec_range(x >= y, x, 16) == (x >= y)
    sizevars.stride_at_vec_range.cache_clear()


def test_programs_are_kept_where_only_the_user_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(variable, "elsewhere")
    torch_internals._choose_cache()
    assert os.environ[variable] == "elsewhere"
    (tmp_path / "file").touch()
    for home in (tmp_path / "home", tmp_path / "file" / "home"):  # the second one cannot be created
        monkeypatch.delenv(variable)
        monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, home=home, **__: str(home))
        torch_internals._choose_cache()
        folder = Path(os.environ[variable])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder == home / "inductor") == (home == tmp_path / "home")
    folder.rmdir()


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
found = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps([found, {name: value.tolist() for name, value in learner.meta_parameters.items()}]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    def train() -> tuple[int, dict[str, Any]]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", COMPILED_STEPS], env=environment, capture_output=True, check=True, text=True
        )
        found, weights = json.loads(done.stdout)
        return found, weights

    (first, weights), (second, again) = train(), train()
    assert (first, second) == (0, 1)
    assert again == weights
    for path in tmp_path.rglob("*"):  # a killed compiler leaves empty files
        if path.is_file():
            os.truncate(path, min(3, path.stat().st_size))
    assert train()[1] == weights


def test_what_writes_in_place() -> None:
    operations = torch.ops.aten
    assert torch_internals.writes_in_place(operations.add_.Tensor)
    assert not torch_internals.writes_in_place(operations.add.Tensor)
    assert not torch_internals.writes_in_place("x")
    assert not torch_internals.writes_in_place(len)


def test_an_operation_without_a_schema_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.ops.aten.add.Tensor, "_schema")
    assert torch_internals.writes_in_place(torch.ops.aten.add.Tensor)


def test_large_tensors_are_refused_without_the_private_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = load_without((_python_dispatch, "TorchDispatchMode"))
    assert without.OperationMode is torch.overrides.TorchFunctionMode
    monkeypatch.setattr(torch_internals, "OperationMode", without.OperationMode)
    module = load_again(tensorfile)
    module.write_tensors(tmp_path / "a file", {"weight": torch.zeros(2)}, {})
    with module.limit_cost(module.TensorFile(tmp_path / "a file", "learner"), bytes_at_least=1 << 20):
        nn.Linear(10, 10)
        for allocate in (lambda: nn.Linear(1 << 20, 1 << 20), lambda: torch.zeros(1 << 20, 1 << 20)):
            with pytest.raises(UsageError, match=r"a file.*1048576"):
                allocate()


def test_processes_find_each_other_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delattr(sys.modules["torch.distributed.rendezvous"], "rendezvous")
    monkeypatch.delattr(torch.distributed, "PrefixStore")
    store, rank, size = torch_internals.open_store("one", timedelta(seconds=20))
    store.set("name", "value")
    assert (store.get("name"), rank, size) == (b"value", 0, 1)
    assert isinstance(store, distributed_c10d.PrefixStore)


def test_a_shell_shares_all_but_what_is_replaced() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer, nn.ReLU())
    shell: Any = torch_internals.copy_shell(model, {"1": nn.Identity()})
    assert list(torch_internals.list_places(model).values()) == [layer, layer, model[2]]
    assert [*shell] == [layer, shell[1], model[2]]
    assert isinstance(shell[1], nn.Identity)
