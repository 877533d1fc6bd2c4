"""The private names of torch that metareg needs, what each is for, and a fallback for versions without it.

Any version of torch can rename or remove them. All other modules import them from here.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import os
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metareg.errors import MetaregError
from metareg.util.imports import pause_collector
from metareg.util.native import create_cache_folder

__all__ = [
    "BATCH_NORM", "DROPOUT", "MODULE_INTERNALS", "NORM_WITH_STATISTICS", "TO_COPY", "UNSAFE_VIEW", "OperationMode",
    "compile_graph", "copy_shell", "copy_tensors", "count_writes", "create_loop", "has_hooks", "import_compiler",
    "list_attributes", "list_places", "map_tree", "normalise_inputs", "open_store", "returns_view", "trace", "trace_sizes",
    "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten", "unwrap_compiled", "writes_in_place",
]  # fmt: skip

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_TESTED = "2.8 to 2.14"


def _find(*names: str, default: Any = None) -> Any:
    """Return the object for the first dotted name that this torch has.

    Raises:
        MetaregError: it has none of them, and there is no default.
    """
    for name in names:
        module, _, attribute = name.rpartition(".")
        with suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    if default is not None:
        return default
    raise MetaregError(
        f"torch {torch.__version__} has no {' and no '.join(names)}, which metareg needs; use torch {_TESTED}."
    )


def _copy_one_by_one(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def import_compiler() -> None:
    """Import torch's compiler, which `torch.func` and `torch.optim` do in any case at their first use."""
    name = "torch._dynamo"
    if name not in sys.modules:  # a second pause would exempt the garbage of the runs between
        with pause_collector(), suppress(ImportError):
            importlib.import_module(name)


# For nested dicts, lists and tuples of tensors. Their future public name is torch.utils.pytree.
tree_map, tree_leaves, tree_flatten, tree_unflatten = (
    _find(f"torch.utils._pytree.{name}", f"torch.utils.pytree.{name}")
    for name in ("tree_map", "tree_leaves", "tree_flatten", "tree_unflatten")
)


def map_tree(function: Callable[..., Any], *trees: Any) -> Any:
    """Like `tree_map`, but for dicts, lists and tuples of tensors in a fifth of the time."""
    tree, *others = trees
    kind = type(tree)
    if not others:
        if kind is Tensor:
            return function(tree)
        if kind is dict:
            return {key: map_tree(function, value) for key, value in tree.items()}
        if kind in (list, tuple):
            return kind([map_tree(function, item) for item in tree])
    elif all(type(other) is kind for other in others):
        if kind is Tensor:
            return function(*trees)
        if kind is dict and all(other.keys() == tree.keys() for other in others):
            return {key: map_tree(function, *[each[key] for each in trees]) for key in tree}
        if kind in (list, tuple) and all(len(other) == len(tree) for other in others):
            return kind([map_tree(function, *items) for items in zip(*trees, strict=True)])
    return tree_map(function, *trees)


# The common base classes of layers, including other packages' layers; otherwise torch's own layers.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
BATCH_NORM: Any = _find("torch.nn.modules.batchnorm._BatchNorm", default=_BATCH_NORMS)
NORM_WITH_STATISTICS: Any = _find("torch.nn.modules.batchnorm._NormBase", default=_BATCH_NORMS + _INSTANCE_NORMS)
DROPOUT: Any = _find("torch.nn.modules.dropout._DropoutNd", default=_DROPOUTS)

# A view of a tensor without other references, which tracing matrix products produces; otherwise `view`.
UNSAFE_VIEW: Any = getattr(torch.ops.aten, "_unsafe_view", torch.ops.aten.view).default

# What tracing makes of `Tensor.to`.
TO_COPY: Any = getattr(torch.ops.aten, "_to_copy", torch.ops.aten.copy).default

# A mode that sees every operation of a block. The fallback TorchFunctionMode sees calls of torch's functions, but not
# the few other operations, such as torch.Tensor(3, 4).
OperationMode: Any = _find("torch.utils._python_dispatch.TorchDispatchMode", default=TorchFunctionMode)

# ``copy_tensors(targets, sources)`` copies the numbers of many tensors of a GPU with few kernels; otherwise one by one.
copy_tensors: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = _find(
    "torch._foreach_copy_", default=_copy_one_by_one
)

# The attributes in which every module stores its parameters, buffers, submodules and hooks.
MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}

_OPERATION = type(torch.ops.aten.add.Tensor)


def writes_in_place(operation: Any) -> bool:
    """Return whether an operation of a traced graph changes a tensor; True if torch cannot tell."""
    # If True is wrong, the graph is functionalized needlessly: the same result with more operations.
    return isinstance(operation, _OPERATION) and getattr(getattr(operation, "_schema", None), "is_mutable", True)


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Trace the operations of a function of tensors to a graph.

    Tracing uses fake tensors, which need neither memory nor arithmetic, together with the function's real constants
    (frozen parameters, buffers). If this torch does not support the mixture, it traces with real tensors.
    """
    make_fx = _find("torch.fx.experimental.proxy_tensor.make_fx", "functorch.make_fx")
    fake = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    known = fake.keys() <= inspect.signature(make_fx).parameters.keys()
    graph: torch.fx.GraphModule = make_fx(function, **(fake if known else {}))(*inputs)
    return graph


def create_loop(goes_on: torch.fx.GraphModule, body: torch.fx.GraphModule, carried: int) -> torch.fx.GraphModule:
    """The graph of ``while goes_on(*values, *constants): values = body(*values, *constants)``; it returns `values`.

    Args:
        goes_on: the graph of the condition.
        body: that of a turn.
        carried: the number of `values`, the first inputs of both.
    """
    loop = _find("torch._higher_order_ops.while_loop.while_loop_op")
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(node.name) for node in body.graph.find_nodes(op="placeholder")]
    parts = {"goes_on": goes_on, "body": body}
    functions = [graph.create_node("get_attr", name) for name in parts]
    values = graph.call_function(loop, (*functions, tuple(inputs[:carried]), tuple(inputs[carried:])))
    graph.output([graph.call_function(operator.getitem, (values, number)) for number in range(carried)])
    return torch.fx.GraphModule(parts, graph)


def trace_sizes(
    function: Callable[..., Any], inputs: Sequence[Tensor], free: Sequence[bool]
) -> tuple[torch.fx.GraphModule, Sequence[int | None], Callable[[Sequence[int]], tuple[bool, ...]]]:
    """Trace a function to a graph for any number of examples.

    Args:
        function: a function whose control flow depends only on shapes.
        inputs: each ``[examples, …]``.
        free: for each input, whether its number of examples is left open.

    Returns:
        The graph; the number of examples of each input that it supports, None for any; and the conditions on these
        numbers that tracing evaluated (for example, less than 16), as a function from numbers to the results. The graph
        is valid for numbers with the same results as `inputs`.
    """
    make_fx = _find("torch.fx.experimental.proxy_tensor.make_fx")
    shapes = "torch.fx.experimental.symbolic_shapes"
    environment = _find(f"{shapes}.ShapeEnv")(duck_shape=False)
    mode = _find("torch._subclasses.fake_tensor.FakeTensorMode")(shape_env=environment, allow_non_fake_inputs=True)
    context, kinds = _find(f"{shapes}.StatelessSymbolicContext"), _find(f"{shapes}.DimDynamic")
    source = _find("torch._dynamo.source.ConstantSource")
    fakes = []
    for number, (value, is_free) in enumerate(zip(inputs, free, strict=True)):
        sizes = [kinds.DYNAMIC if is_free else kinds.STATIC, *[kinds.STATIC] * (value.dim() - 1)]
        fakes.append(mode.from_tensor(value, symbolic_context=context(sizes), source=source(f"input{number}")))
    symbols = [fake.shape[0].node.expr if is_free else None for fake, is_free in zip(fakes, free, strict=True)]
    graph: torch.fx.GraphModule = make_fx(function)(*fakes)

    def answer(counts: Sequence[int]) -> tuple[bool, ...]:
        values = {symbol: count for symbol, count in zip(symbols, counts, strict=True) if symbol is not None}
        return tuple(bool(guard.expr.subs(values)) for guard in environment.guards)

    found = [fake.shape[0] for fake in fakes]
    fixed = [count if isinstance(count, int) else count.node.maybe_as_int() for count in found]
    return graph, fixed, answer


def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """Compile a traced graph for inputs of these shapes and types; this removes values recorded in the graph.

    torch.compile would extract a graph from Python code, and check at every call whether the code's state has changed.
    The graph already exists here, so this calls the compiler directly, or torch.compile if this torch does not allow
    it.
    """
    _choose_cache()
    compiler: Callable[..., Callable[..., list[Tensor]]] = _find(
        "torch._inductor.compile", default=lambda graph, _: torch.compile(graph, fullgraph=True, dynamic=False)
    )
    # The compiler's cache works across processes only if values recorded in the graph do not have their own fake mode,
    # in which sizes have no environment.
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.clear()
    try:
        with _use_size_environment(), _configure_compiler(inputs), _skip_checks(graph), _build_at_once():
            return compiler(graph, list(inputs))
    except Exception:  # the caches can be damaged, or the compiler too old for the processor
        return compiler(graph, list(inputs))


def _choose_cache() -> None:
    """Put the compiler's cache into the user's own cache folder, unless the user chose another one.

    Files in the cache are loaded as code. The compiler's default is a folder in /tmp with a predictable name, which
    anyone can create first.
    """
    if _CACHE_VARIABLE not in os.environ:
        os.environ[_CACHE_VARIABLE] = str(create_cache_folder("inductor"))


@contextmanager
def _use_size_environment() -> Iterator[None]:
    """Provide, for a block, the fake mode with an environment for sizes that torch.compile uses."""
    try:
        context, tracing = _find("torch._guards.TracingContext"), _find("torch._guards.tracing")
        mode = _find("torch._subclasses.fake_tensor.FakeTensorMode")
        environment = _find("torch.fx.experimental.symbolic_shapes.ShapeEnv")
    except MetaregError:
        yield
        return
    with tracing(context(mode(shape_env=environment()))):
        yield


@contextmanager
def _configure_compiler(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Configure the compiler, for a block, to make programs on small tensors fast, and to compile them quickly.

    On a CPU, one C++ function calls all kernels. Python calls between them would take a third of a small step, and
    compiling all kernels together takes half the time of compiling each by itself.
    """
    config = _find("torch._inductor.config")
    options = {
        "cpp.vec_isa_ok": True,
        "cpp_wrapper": all(value.device.type == "cpu" for value in inputs),
        # The function that calls the kernels has nothing to optimise; at their level of optimisation it takes the compiler
        # four fifths of its time.
        "cpp_wrapper_build_separate": True,
        # Precompiling headers takes 13 s once and saves 3 s per program. They would be in a folder in /tmp that anyone can
        # create first.
        "cpp_cache_precompile_headers": False,
        # The graph, which is the cache key, contains the loop's body and condition.
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": "its graphs"},
    }
    known = {name: value for name, value in options.items() if name in config.get_config_copy()}
    with config.patch(known):
        yield


@contextmanager
def _skip_checks(graph: torch.fx.GraphModule) -> Iterator[None]:
    """Skip, for a block, work of the compiler that leaves the program as it is and takes a third of its time."""
    parts = [part for part in graph.children() if isinstance(part, torch.fx.GraphModule)]
    with ExitStack() as replacements:
        if os.name == "posix":
            # The compiler would build a test library for each set of vector instructions, and load it in a new process.
            replacements.enter_context(
                _replace("torch._inductor.cpu_vec_isa:VecISA", "check_build", lambda _: _accepts_instructions)
            )
        if all(map(_returns_new_tensors, parts)):
            # The compiler would trace the parts of a loop twice more, to see whether they share or change tensors.
            replacements.enter_context(
                _replace("torch._higher_order_ops.while_loop", "_check_alias_and_mutation", lambda _: lambda *_: None)
            )
        replacements.enter_context(
            _replace("torch._inductor.sizevars", "simplify_index_in_vec_range", _simplify_no_polynomials)
        )
        yield


@contextmanager
def _build_at_once() -> Iterator[None]:
    """Have the C++ compiler build, for a block, the kernels and the function that calls them at the same time."""

    def convert(build: Callable[[str, Sequence[Any]], None]) -> Callable[[str, Sequence[Any]], None]:
        # The original takes the lock, and then builds what is missing, one after the other.
        return lambda lock, builders: build(lock, [_Parts(builders), *builders])

    with _replace("torch._inductor.codecache", "_worker_compile_cpp", convert):
        yield


class _Parts:
    """Builds the parts of a program at once if the program is missing; has the interface of the compiler's builders.

    Args:
        builders: those of the parts, and last that of the program, which links them.
    """

    def __init__(self, builders: Sequence[Any]) -> None:
        *self._parts, self._program = builders

    def get_target_file_path(self) -> str:
        path: str = self._program.get_target_file_path()
        return path

    def build(self) -> None:
        missing = [part for part in self._parts if not Path(part.get_target_file_path()).exists()]
        # Daemons do not keep an interrupted process from ending.
        threads = [threading.Thread(target=self._try_to_build, args=(part,), daemon=True) for part in missing[1:]]
        started = []
        with suppress(RuntimeError):  # there are no new threads while Python shuts down
            for thread in threads:
                thread.start()
                started.append(thread)
        if started:
            self._try_to_build(missing[0])
        for thread in started:
            thread.join()

    @staticmethod
    def _try_to_build(part: Any) -> None:
        with suppress(Exception):  # the part's own builder comes next, and raises it again
            part.build()


@contextmanager
def _replace(owner: str, name: str, convert: Callable[[Any], Any]) -> Iterator[None]:
    """Replace, for a block, an attribute of a module or class; leave it if this torch does not have it."""
    try:
        target = pkgutil.resolve_name(owner)
        original = vars(target)[name]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    setattr(target, name, convert(original))
    try:
        yield
    finally:
        setattr(target, name, original)


def _accepts_instructions(instructions: Any, _: str) -> bool:
    """Return whether the C++ compiler knows some vector instructions; that the processor has them is what it reports."""
    compiler = _find("torch._inductor.cpp_builder.get_cpp_compiler")()
    command = [compiler, *instructions.build_arch_flags().split(), "-fsyntax-only", "-xc++", "-"]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def _returns_new_tensors(graph: torch.fx.GraphModule) -> bool:
    """Return whether a graph changes no tensor and returns only tensors that share no memory with any other."""
    (output,) = graph.graph.find_nodes(op="output")
    results = tree_leaves(output.args)
    return (
        len(set(results)) == len(results)
        and not any(writes_in_place(node.target) for node in graph.graph.nodes)
        and all(isinstance(node.target, _OPERATION) and not returns_view(node.target) for node in results)
    )


def returns_view(operation: Any) -> bool:
    """Return whether a result of an operation shares memory with an argument; True if torch cannot tell."""
    schema = getattr(operation, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _simplify_no_polynomials(simplify: Callable[..., Any]) -> Callable[..., Any]:
    """Convert the function that simplifies indices, whose differences the compiler simplifies again.

    It rewrites divisions. On a polynomial, it would only call `sympy.simplify`, which takes milliseconds.
    """

    def simplify_others(index: Any, *arguments: Any) -> Any:
        is_polynomial = getattr(index, "is_polynomial", None)
        return index if is_polynomial is not None and is_polynomial() else simplify(index, *arguments)

    return simplify_others


def list_attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """List the dicts with a module's plain attributes, buffers and parameters, without submodules."""
    return vars(module), module._buffers, module._parameters


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Replace modules wrapped by `torch.compile`, including the module itself, by the originals, without copying."""
    module = getattr(module, "_orig_mod", module)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = unwrap_compiled(child)
    return module


def count_writes(value: Tensor) -> int:
    """Count how often a tensor was written in place."""
    return value._version


def list_places(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return a module's submodules by attribute; unlike public listings, it repeats a layer that is used twice."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module runs more than its forward pass."""
    return any(value for name, value in vars(module).items() if name.startswith("_") and name.endswith("_hooks"))


def copy_shell(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """Copy a module; the copy shares everything except the submodules in `replaced`.

    `nn.Module` has no public API for this: a shallow copy shares the dict of submodules, a deep copy copies parameters.
    """
    shell = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    return shell


def normalise_inputs(
    layer: nn.Module, statistics: Mapping[str, Tensor], normalise: Callable[[nn.Module, tuple[Tensor]], Tensor]
) -> nn.Module:
    """Copy a normalisation layer; the copy shares its parameters, and applies the layer to normalised inputs.

    It is in evaluation mode with these running statistics, which should leave normalised inputs as they are.
    """
    shell = copy.copy(layer)
    shell.training = False
    shell._buffers = {**layer._buffers, **statistics}
    shell._forward_pre_hooks = layer._forward_pre_hooks.copy()
    shell.register_forward_pre_hook(normalise)
    return shell


def open_store(prefix: str, timeout: timedelta) -> tuple[Any, int, int]:
    """Open the store by which torchrun's processes find each other, with a prefix for keys; also return rank and size.

    `init_process_group` would open it with the same keys each time.
    """
    rendezvous = _find("torch.distributed.rendezvous.rendezvous", "torch.distributed.rendezvous")
    prefixed = _find("torch.distributed.PrefixStore", "torch.distributed.distributed_c10d.PrefixStore")
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    return prefixed(prefix, store), rank, size
