"""Private names of torch: one module uses them; without them, results are equal or a message says what to install."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
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
