"""The private names of torch that metareg needs, what each is for, and a fallback for versions without it.

Any version of torch can rename or remove them. All other modules import them from here, or find them by `find_name`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metareg.errors import MetaregError
from metareg.util.imports import pause_collector

__all__ = [
    "BATCH_NORM", "DROPOUT", "MODULE_INTERNALS", "NORM_WITH_STATISTICS", "OPERATION", "TO_COPY", "UNSAFE_VIEW",
    "OperationMode", "copy_shell", "copy_tensors", "count_writes", "create_loop", "find_name", "has_hooks",
    "import_compiler", "list_attributes", "list_places", "map_tree", "normalise_inputs", "open_store", "returns_view",
    "trace", "trace_sizes", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten", "unwrap_compiled",
    "writes_in_place",
]  # fmt: skip

_TESTED = "2.8 to 2.14"


def find_name(*names: str, default: Any = None) -> Any:
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
    find_name(f"torch.utils._pytree.{name}", f"torch.utils.pytree.{name}")
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
BATCH_NORM: Any = find_name("torch.nn.modules.batchnorm._BatchNorm", default=_BATCH_NORMS)
NORM_WITH_STATISTICS: Any = find_name("torch.nn.modules.batchnorm._NormBase", default=_BATCH_NORMS + _INSTANCE_NORMS)
DROPOUT: Any = find_name("torch.nn.modules.dropout._DropoutNd", default=_DROPOUTS)

# A view of a tensor without other references, which tracing matrix products produces; otherwise `view`.
UNSAFE_VIEW: Any = getattr(torch.ops.aten, "_unsafe_view", torch.ops.aten.view).default

# What tracing makes of `Tensor.to`.
TO_COPY: Any = getattr(torch.ops.aten, "_to_copy", torch.ops.aten.copy).default

# A mode that sees every operation of a block. The fallback TorchFunctionMode sees calls of torch's functions, but not
# the few other operations, such as torch.Tensor(3, 4).
OperationMode: Any = find_name("torch.utils._python_dispatch.TorchDispatchMode", default=TorchFunctionMode)

# ``copy_tensors(targets, sources)`` copies the numbers of many tensors of a GPU with few kernels; otherwise one by one.
copy_tensors: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = find_name(
    "torch._foreach_copy_", default=_copy_one_by_one
)

# The attributes in which every module stores its parameters, buffers, submodules and hooks.
MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}

# What tracing makes of a call of an operation of torch.
OPERATION = type(torch.ops.aten.add.Tensor)


def writes_in_place(operation: Any) -> bool:
    """Return whether an operation of a traced graph changes a tensor; True if torch cannot tell."""
    # If True is wrong, the graph is functionalized needlessly: the same result with more operations.
    return isinstance(operation, OPERATION) and getattr(getattr(operation, "_schema", None), "is_mutable", True)


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Trace the operations of a function of tensors to a graph.

    Tracing uses fake tensors, which need neither memory nor arithmetic, together with the function's real constants
    (frozen parameters, buffers). If this torch does not support the mixture, it traces with real tensors.
    """
    make_fx = find_name("torch.fx.experimental.proxy_tensor.make_fx", "functorch.make_fx")
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
    loop = find_name("torch._higher_order_ops.while_loop.while_loop_op")
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
    make_fx = find_name("torch.fx.experimental.proxy_tensor.make_fx")
    shapes = "torch.fx.experimental.symbolic_shapes"
    environment = find_name(f"{shapes}.ShapeEnv")(duck_shape=False)
    mode = find_name("torch._subclasses.fake_tensor.FakeTensorMode")(shape_env=environment, allow_non_fake_inputs=True)
    context, kinds = find_name(f"{shapes}.StatelessSymbolicContext"), find_name(f"{shapes}.DimDynamic")
    source = find_name("torch._dynamo.source.ConstantSource")
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


def returns_view(operation: Any) -> bool:
    """Return whether a result of an operation shares memory with an argument; True if torch cannot tell."""
    schema = getattr(operation, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


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
    rendezvous = find_name("torch.distributed.rendezvous.rendezvous", "torch.distributed.rendezvous")
    prefixed = find_name("torch.distributed.PrefixStore", "torch.distributed.distributed_c10d.PrefixStore")
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    return prefixed(prefix, store), rank, size
