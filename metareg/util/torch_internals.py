"""The names that torch keeps to itself and metareg needs: what each is for, and what takes its place where it is gone.

Any version of torch may rename or remove them. Everything else takes them from here.
"""

from __future__ import annotations

import atexit
import copy
import importlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metareg.errors import MetaregError

__all__ = [
    "BATCH_NORM", "DROPOUT", "MODULE_INTERNALS", "NORM_WITH_STATISTICS", "UNSAFE_VIEW", "OperationMode", "compile_graph",
    "copy_shell", "count_writes", "list_attributes", "list_places", "open_store", "trace", "trace_loop", "trace_sizes",
    "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten", "unwrap_compiled", "writes_in_place",
]  # fmt: skip

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_TESTED = "2.8 to 2.14"


def _find(*names: str, default: Any = None) -> Any:
    """What the first known one of some dotted names means in this torch.

    Raises:
        MetaregError: it knows none of them, and there is no default.
    """
    for name in names:
        module, _, attribute = name.rpartition(".")
        with suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    if default is not None:
        return default
    raise MetaregError(
        f"torch {torch.__version__} has no {' and no '.join(names)}, which metareg needs; torch {_TESTED} has what it needs."
    )


# Nested dicts, lists and tuples of tensors, for inputs and state of any structure. torch.utils.pytree is the name under
# which they are to become public.
tree_map, tree_leaves, tree_flatten, tree_unflatten = (
    _find(f"torch.utils._pytree.{name}", f"torch.utils.pytree.{name}")
    for name in ("tree_map", "tree_leaves", "tree_flatten", "tree_unflatten")
)

# The common ancestors of layers, from which other packages derive theirs; without them, torch's own layers.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
BATCH_NORM: Any = _find("torch.nn.modules.batchnorm._BatchNorm", default=_BATCH_NORMS)
NORM_WITH_STATISTICS: Any = _find("torch.nn.modules.batchnorm._NormBase", default=_BATCH_NORMS + _INSTANCE_NORMS)
DROPOUT: Any = _find("torch.nn.modules.dropout._DropoutNd", default=_DROPOUTS)

# A view of a tensor that nothing else holds, which traced products leave behind; `view` where there is no such operation.
UNSAFE_VIEW: Any = getattr(torch.ops.aten, "_unsafe_view", torch.ops.aten.view).default

# A mode whose `__torch_dispatch__` sees every operation of a block. TorchFunctionMode, whose `__torch_function__` sees the
# calls of torch's functions, misses the few that are none, such as torch.Tensor(3, 4).
OperationMode: Any = _find("torch.utils._python_dispatch.TorchDispatchMode", default=TorchFunctionMode)

# What every module keeps in its attributes for itself: its parameters, buffers, submodules and hooks.
MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}

_OPERATION = type(torch.ops.aten.add.Tensor)


def writes_in_place(operation: Any) -> bool:
    """Whether a function of a traced graph is an operation that changes a tensor; where torch cannot tell, it is."""
    # A graph that is wrongly taken for one that writes is functionalized in vain: the same result, by more operations.
    return isinstance(operation, _OPERATION) and getattr(getattr(operation, "_schema", None), "is_mutable", True)


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The graph of the operations that a function makes of tensors.

    Fake tensors take neither memory nor arithmetic; the function's constants (frozen parameters, buffers) are real. A torch
    that does not take both traces with real tensors.
    """
    make_fx = _find("torch.fx.experimental.proxy_tensor.make_fx", "functorch.make_fx")
    fake = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    known = fake.keys() <= inspect.signature(make_fx).parameters.keys()
    graph: torch.fx.GraphModule = make_fx(function, **(fake if known else {}))(*inputs)
    return graph


def trace_loop(
    goes_on: Callable[..., Tensor],
    body: Callable[..., Sequence[Tensor]],
    carried: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> torch.fx.GraphModule:
    """The graph of ``while goes_on(*carried, *constants): carried = body(*carried, *constants)``; it returns `carried`.

    The loop is run where torch cannot tell the shapes of its results without.
    """
    loop = _find("torch._higher_order_ops.while_loop.while_loop_op")
    graphs = [trace(function, (*carried, *constants)) for function in (goes_on, body)]
    count = len(carried)
    return trace(lambda *leaves: loop(*graphs, leaves[:count], leaves[count:]), (*carried, *constants))


def trace_sizes(
    function: Callable[..., Any], inputs: Sequence[Tensor], free: Sequence[bool]
) -> tuple[torch.fx.GraphModule, Sequence[int | None], Callable[[Sequence[int]], tuple[bool, ...]]]:
    """The graph of a function's operations for any number of examples.

    Args:
        function: its control flow depends on nothing but shapes.
        inputs: each ``[examples, …]``.
        free: whether the number of examples of each input is to be left open.

    Returns:
        The graph; the number of examples of each input that it is for, None for any; and what tracing asked of these
        numbers (is it less than 16?), as a function from other numbers to the answers. The graph is known to be right
        where the answers are those of `inputs`.
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
    """A traced graph as a compiled function of inputs of these shapes and types; what was recorded in the graph is gone.

    torch.compile would look for a graph in Python code, and at every call for what the code may have changed; here the
    graph is there already, so its compiler is called directly. Where that cannot be reached, torch.compile is.
    """
    _choose_cache()
    compiler: Callable[..., Callable[..., list[Tensor]]] = _find(
        "torch._inductor.compile", default=lambda graph, _: torch.compile(graph, fullgraph=True, dynamic=False)
    )
    # The compiler finds again what it compiled in another process, unless values recorded in the graph have a mode of
    # their own, in which sizes have no environment.
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.clear()
    try:
        with _use_size_environment(), _configure_compiler(inputs):
            return compiler(graph, list(inputs))
    except Exception:  # the caches may be damaged, and the compiler too old for the processor
        return compiler(graph, list(inputs))


def _choose_cache() -> None:
    """Let the compiler keep what it builds in the user's own cache, unless the user named another place.

    What lies there is loaded as code. By itself the compiler takes a folder in /tmp, of a name that anyone can take first.
    """
    if _CACHE_VARIABLE in os.environ:
        return
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("metareg", appauthor=False), "inductor")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # the home cannot be written: nothing is kept beyond this process
        folder = Path(tempfile.mkdtemp(prefix="metareg-inductor-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_CACHE_VARIABLE] = str(folder)


@contextmanager
def _use_size_environment() -> Iterator[None]:
    """Compile within a block as torch.compile does: with a mode for fake tensors in which sizes have an environment."""
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
    """Set what makes programs of small tensors fast, and fast to compile, within a block.

    On a CPU one C++ function calls all kernels: Python between them takes a third of a small step, and compiling it together
    with the kernels half of what each kernel by itself takes. What the processor says of its vector instructions is
    believed: the compiler would try each of them by programs of its own.
    """
    config = _find("torch._inductor.config")
    options = {
        "cpp.vec_isa_ok": True,
        "cpp_wrapper": all(value.device.type == "cpu" for value in inputs),
        # A loop is part of its graph, body and condition included, by which programs are found in the cache.
        "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.while_loop": "its graphs"},
    }
    with config.patch({name: value for name, value in options.items() if name in config.get_config_copy()}):
        yield


def list_attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dicts in which a module keeps its attributes, submodules left out: plain ones, buffers and parameters."""
    return vars(module), module._buffers, module._parameters


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """A module with those in the place of what `torch.compile` made of them, itself included; nothing is copied."""
    module = getattr(module, "_orig_mod", module)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = unwrap_compiled(child)
    return module


def count_writes(value: Tensor) -> int:
    """How often a tensor was written in place."""
    return value._version


def list_places(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The submodules of a module by attribute; a layer that stands twice is there twice, as in no public listing."""
    return module._modules


def copy_shell(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module that shares all but the submodules named, which are replaced in the copy alone.

    `nn.Module` has no public way to it: a shallow copy shares the dict of submodules, a deep one copies the parameters.
    """
    shell = copy.copy(module)
    shell._modules = {**module._modules, **replaced}
    return shell


def open_store(prefix: str, timeout: timedelta) -> tuple[Any, int, int]:
    """What the processes that torchrun started together find each other by, with names under a prefix; rank and size.

    `init_process_group` would open it too, but with the same names each time.
    """
    rendezvous = _find("torch.distributed.rendezvous.rendezvous", "torch.distributed.rendezvous")
    prefixed = _find("torch.distributed.PrefixStore", "torch.distributed.distributed_c10d.PrefixStore")
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    return prefixed(prefix, store), rank, size
