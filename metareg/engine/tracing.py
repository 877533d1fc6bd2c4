"""Traces functions to graphs of operations, simplifies the graphs, and replays or compiles them."""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functionalize

from metareg.contract.episodes import Episodes
from metareg.engine.agreement import compare
from metareg.engine.context import Task, Tensors
from metareg.engine.cuda_graphs import capture, find_gpu
from metareg.engine.products import simplify_products
from metareg.engine.python_state import PythonState
from metareg.engine.rewriting import PRODUCTS, call_torch_functions, remove_idle_operations, writes
from metareg.engine.shared_graphs import SHARED
from metareg.errors import MetaregError, describe_error
from metareg.printable import format_count
from metareg.util.compiler import compile_graph
from metareg.util.imports import collect_no_garbage
from metareg.util.layout import make_contiguous, settle_layout
from metareg.util.torch_internals import trace, tree_flatten, tree_unflatten

__all__ = [
    "CompileError", "Description", "Graphs", "OutOfMemoryError", "Program", "advise_on_memory", "create_graph",
    "lift_factors", "prepare_to_trace", "summarise_error",
]  # fmt: skip

log = logging.getLogger("metareg")

_ATEN = torch.ops.aten
_CALLS_OF_ANOTHER_SHAPE = 32
_LOCK = RLock()


class CompileError(MetaregError):
    """torch.compile did not produce a program, usually because there is no C++ compiler."""


class OutOfMemoryError(MetaregError):
    """Tasks that run at once do not fit the memory."""


class Graphs:
    """The graphs of programs that read the same Python variables: equal ones are kept once, and news is logged once.

    Args:
        reads: functions, objects and modules of the user whose variables the programs read.
    """

    def __init__(self, reads: Sequence[Any]) -> None:
        self.changes = 0
        """How often a variable had another value than when graphs were traced; these graphs are dropped."""
        self.is_current = False
        """Whether no Python of the user has run since `notice_changes`."""
        self._reads = reads
        self._state: PythonState | None = None
        self._by_code: dict[str, torch.fx.GraphModule] = {}
        self._said: set[Hashable] = set()

    def read_variables(self) -> PythonState:
        """Return the record of the variables with which graphs were traced; without graphs, their values now."""
        return self._state or PythonState(*self._reads)

    def watch(self, variables: PythonState) -> None:
        """Have `notice_changes` compare the variables with a record, the result of `read_variables`."""
        self._state = variables

    def notice_changes(self) -> None:
        """Drop the graphs if a variable has changed since they were traced."""
        self.is_current = True
        changed = None if self._state is None else next(self._state.find_changes(), None)
        if changed is None:
            return
        self.warn(
            "changed",
            f"The value of '{changed}' has changed since the previous calls; the graph traced with the old value is "
            "dropped. While it keeps changing, every call runs untraced, which is slower.",
        )
        self.changes += 1
        self._state = None
        self._by_code.clear()

    def find_equal(self, graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Return the first graph with the same operations; a graph with tensors, which its code does not show, is itself."""
        return graph if graph.graph.find_nodes(op="get_attr") else self._by_code.setdefault(graph.code, graph)

    def warn(self, what: Hashable, message: str) -> None:
        """Log a warning, unless the same was logged before."""
        if what not in self._said:
            self._said.add(what)
            log.warning("%s", message)


class Description(NamedTuple):
    """What a program's function returns for inputs of some shapes."""

    checked: int
    """How many of the first tensors a graph must reproduce."""
    structure: Any
    """What the caller needs to know about the tensors, such as their names."""


Function = Callable[[Tensors, Task, Mapping[str, Any]], tuple[list[Tensor], Description]]


@dataclass(frozen=True)
class _Call:
    """The arguments of a call."""

    meta: Tensors
    inputs: Sequence[Tensor]
    """The tensors of the tasks and of the extra inputs."""
    structure: Any
    """How they belong together."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs of a graph."""
        return *self.meta.values(), *self.inputs

    @property
    def key(self) -> Hashable:
        """What a graph is valid for."""
        return self.structure, *[(leaf.shape, leaf.stride(), leaf.dtype) for leaf in self.inputs]


class Program:
    """A function of meta-parameters, tasks and extra inputs that is traced to a graph of operations for each set of shapes.

    Tracing runs the function's Python, including plugins and `torch.func` transforms, and keeps only the operations.
    Replaying them costs a fraction of the original and gives the same bits. `torch.compile` receives the traced graph,
    which contains no Python that could fail to compile. On a GPU, a CUDA graph launches all operations at once.

    A graph contains the values of Python variables at the time of tracing. If one changes, the graphs are dropped and the
    function runs untraced; while it keeps changing, every call runs untraced. A function that cannot be traced, or whose
    graph computes different values, always runs untraced.

    Args:
        function: returns tensors, and describes them; its control flow depends only on shapes.
        graphs: the graphs of the programs that belong together.
        compiled: compile the graph with `torch.compile`.
        calls_before_tracing: the number of untraced calls with inputs of the same shapes before tracing.
        captures: whether CUDA graphs may launch the operations; each has its own copy of all inputs and outputs.
        identity: a description of everything else that the function is traced from; programs with equal ones share their
            graphs. None if nothing is shared.
        lay_inputs: returns a single task's inputs of the model in the memory order that suits it.
    """

    def __init__(
        self,
        function: Function,
        graphs: Graphs,
        *,
        compiled: bool,
        calls_before_tracing: int = 1,
        captures: bool = True,
        identity: Hashable | None = None,
        lay_inputs: Callable[[Any], Any] = lambda inputs: inputs,
    ) -> None:
        self._function = function
        self._lay_inputs = lay_inputs
        self._together = graphs
        self._compiled = compiled
        self._calls_before_tracing = calls_before_tracing
        self._captures = captures
        self._identity = identity
        self._graphs: dict[Hashable, Callable[..., list[Tensor]]] = {}
        self._descriptions: dict[Hashable, Description] = {}
        self._calls: Counter[Hashable] = Counter()
        self._changes = graphs.changes
        """Those that the graphs take into account."""

    def __call__(self, meta: Tensors, episodes: Episodes, extra: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
        """Return the function's tensors, and the structure that describes them."""
        parts = episodes.parts
        if len(episodes) == 1:
            parts = self._lay_inputs(parts[0]), parts[1], self._lay_inputs(parts[2]), parts[3]
        inputs, structure = _flatten(parts, extra)
        # A graph requires one memory layout, and the last bits can depend on it: all strategies use the same layout. Under
        # vmap, it must not be channels last, where the second derivative of max-pooling has no batching rule.
        settled = settle_layout if len(episodes) == 1 else make_contiguous
        call = _Call(meta, [settled(leaf) for leaf in inputs], structure)
        key = call.key
        with torch.no_grad(), advise_on_memory(len(episodes)):
            values = self._compute(key, call)
        return values, self._descriptions[key].structure

    def _compute(self, key: Hashable, call: _Call) -> list[Tensor]:
        """Return the function's tensors, by a graph if there is one or if it is time to trace one."""
        if not self._together.is_current:
            self._together.notice_changes()
        if self._changes != self._together.changes:
            self._changes = self._together.changes
            self._graphs.clear()
            self._calls.clear()
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(*call.leaves)
        self._calls[key] += 1
        values = self._adopt(key, call) if self._calls[key] == 1 else None
        if values is not None:
            return values
        if self._calls[key] <= self._count_calls_before_tracing():
            return self._run(key, call)
        return self._trace(key, call)

    def _run(self, key: Hashable, call: _Call) -> list[Tensor]:
        """Call the function, and keep the description of what it returns."""
        self._together.is_current = False
        values, self._descriptions[key] = self._function(call.meta, *_unflatten(call.inputs, call.structure))
        return values

    def _count_calls_before_tracing(self) -> int:
        """Return the number of untraced calls before tracing.

        Tracing costs at least as much as a dozen calls. It does not pay for a function that is called once, for each of the
        many shapes of tasks of unequal sizes, or if the variables keep changing.
        """
        if self._changes:
            return 2 ** min(self._changes, 30)
        if self._compiled:
            return 0
        return _CALLS_OF_ANOTHER_SHAPE if self._graphs else self._calls_before_tracing

    def _adopt(self, key: Hashable, call: _Call) -> list[Tensor] | None:
        """Use a graph that another program has traced, and return its values; None if there is none for this function.

        A replayed graph must give the function's bits here, and a compiled one its values up to the order of sums.
        """
        run = None if self._identity is None or self._changes else SHARED.find(self._identify(key, call))
        if run is None:
            return None
        variables = self._together.read_variables()
        values, expected = run(*call.leaves), self._run(key, call)
        if self._compiled:
            checked = self._descriptions[key].checked
            is_same = compare(values[:checked], expected[:checked], close=True) is None
        else:
            is_same = all(torch.equal(one, other) for one, other in zip(values, expected, strict=True))
        if not is_same:
            return None
        self._together.watch(variables)
        self._graphs[key] = run
        return values

    def _identify(self, key: Hashable, call: _Call) -> Hashable:
        """Describe what the graph for such inputs is traced from."""
        names = tuple((name, value.shape, value.stride(), value.dtype) for name, value in call.meta.items())
        return self._identity, self._compiled, names, key, tuple(leaf.device for leaf in call.inputs)

    def _trace(self, key: Hashable, call: _Call) -> list[Tensor]:
        """Trace the function for inputs of these shapes, and return its values for these inputs."""
        names, leaves = tuple(call.meta), call.leaves

        def flat(*leaves: Tensor) -> list[Tensor]:
            meta = dict(zip(names, leaves, strict=False))
            return self._run(key, _Call(meta, leaves[len(names) :], call.structure))

        variables = self._together.read_variables()
        self._together.watch(variables)
        try:
            with prepare_to_trace():
                graph = create_graph(flat, leaves)
                graph = graph if self._compiled else self._together.find_equal(call_torch_functions(graph))
                gpu = find_gpu(graph, leaves) if self._captures else None
                run = _compile(graph, leaves) if self._compiled else graph.forward
                run = run if gpu is None else capture(graph, run, leaves, gpu)
                values = run(*leaves) if self._compiled else None
        except MetaregError:
            raise
        except Exception as error:  # tracing runs the code of users and plugins, and torch raises errors of many kinds
            if self._compiled:
                raise CompileError(
                    f"torch.compile failed ({summarise_error(error)}); strategy='vectorized' needs no compiler."
                ) from error
            self._together.warn(
                "failed", f"Running untraced, which is slower: tracing failed ({summarise_error(error)})."
            )
            self._graphs[key] = flat
            return flat(*leaves)
        values = run(*leaves) if values is None else values
        expected = flat(*leaves)
        checked = self._descriptions[key].checked
        difference = compare(values[:checked], expected[:checked], close=not self._compiled)
        if difference is None:
            self._graphs[key] = run
            if self._identity is not None and gpu is None:  # a CUDA graph would hold memory for others
                SHARED.add(self._identify(key, call), graph, run, variables)
            return values
        if self._compiled:
            raise CompileError(f"The compiled function computes other values: {difference}.")
        self._together.warn(
            "values", f"Running untraced, which is slower: the traced graph computes other values; {difference}."
        )
        self._graphs[key] = flat
        return expected


@contextmanager
def prepare_to_trace() -> Iterator[None]:
    """Trace and compile in a block: in one thread at a time, as torch requires, and without collecting garbage.

    Both create so many objects that the collector would look through all of them again and again, for a fifth of the time.
    """
    with _LOCK, collect_no_garbage():
        yield


def create_graph(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Trace a function, and remove idle operations from its graph."""
    graph = trace(function, inputs)
    if writes(graph):
        graph = trace(functionalize(graph), inputs)
    return remove_idle_operations(graph)


def lift_factors(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Turn the constants that tensors are multiplied by into additional inputs, and return their values as 0-d tensors.

    A step size is a constant of the graph; as an input, it lets one compiled program serve all of its values. Integers,
    which come from derivatives and shapes, stay constants. So do factors of tensors with 8 or 16 bits per number: as a
    tensor, the factor itself would be rounded to that precision.
    """
    places: dict[tuple[float, torch.dtype, torch.device], list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or node.target not in PRODUCTS or not isinstance(value, Tensor):
            continue
        factor = node.args[1]
        if isinstance(factor, float) and not factor.is_integer() and value.dtype in (torch.float32, torch.float64):
            places.setdefault((factor, value.dtype, value.device), []).append(node)
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for number, nodes in enumerate(places.values()):
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"factor_{number}")
        for node in nodes:
            node.target, node.args = _ATEN.mul.Tensor, (node.args[0], last)
    graph.recompile()
    return [torch.tensor(factor, dtype=dtype, device=device) for factor, dtype, device in places]


def _compile(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """Compile a graph."""
    simplify_products(graph)
    factors = lift_factors(graph)
    program = compile_graph(graph, [*inputs, *factors])
    return lambda *leaves: program(*leaves, *factors)


def summarise_error(error: Exception) -> str:
    """Describe an error in one line, without a full stop."""
    return textwrap.shorten(describe_error(error).splitlines()[0], 160, placeholder=" …").removesuffix(".")


def _flatten(parts: Task, extra: Mapping[str, Any]) -> tuple[Sequence[Tensor], Any]:
    """Return the tensors of tasks and extra inputs, and their structure; None if there are only the four parts."""
    if not extra and type(parts[0]) is Tensor and type(parts[2]) is Tensor:
        return parts, None
    return tree_flatten((parts, extra))


def _unflatten(leaves: Sequence[Tensor], structure: Any) -> tuple[Task, Mapping[str, Any]]:
    """Invert `_flatten`."""
    if structure is None:
        support_x, support_y, query_x, query_y = leaves
        return (support_x, support_y, query_x, query_y), {}
    parts, noise = tree_unflatten(leaves, structure)
    return parts, noise


@contextmanager
def advise_on_memory(tasks: int) -> Iterator[None]:
    """Replace an out-of-memory error by an error that says what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        smaller = f"chunk={max(1, tasks // 2)} runs fewer tasks at once" if tasks > 1 else "use a smaller batch"
        raise OutOfMemoryError(
            f"Out of memory with {format_count(tasks, 'task')} at once; {smaller}, and memory='recompute' keeps "
            "only the parameters of each inner step."
        ) from error
