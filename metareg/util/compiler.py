"""Compiles traced graphs with torch's compiler, and keeps the programs for later processes."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareg.errors import MetaregError
from metareg.util.native import create_cache_folder
from metareg.util.program_cache import describe_program, find_program, keep_program
from metareg.util.torch_internals import OPERATION, find_name, returns_view, tree_leaves, writes_in_place

__all__ = ["compile_graph"]

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """Compile a traced graph for inputs of these shapes and types; this removes values recorded in the graph.

    torch.compile would extract a graph from Python code, and check at every call whether the code's state has changed.
    The graph already exists here, so this calls the compiler directly, or torch.compile if this torch does not allow
    it.
    """
    folder = _choose_cache()
    # The compiler's cache works across processes only if values recorded in the graph do not have their own fake mode,
    # in which sizes have no environment.
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.clear()
    key = _describe(graph, inputs)
    program = None if key is None else find_program(key, folder)
    if program is not None:
        return program
    compiler: Callable[..., Callable[..., list[Tensor]]] = find_name(
        "torch._inductor.compile", default=lambda graph, _: torch.compile(graph, fullgraph=True, dynamic=False)
    )
    try:
        with (
            _use_size_environment(),
            _configure_compiler(inputs),
            _skip_checks(graph),
            _build_at_once(),
            _watch_libraries() as libraries,
        ):
            program = compiler(graph, list(inputs))
    except Exception:  # the caches can be damaged, or the compiler too old for the processor
        return compiler(graph, list(inputs))
    if key is not None and len(libraries) == 1:
        keep_program(key, *libraries[0], len(inputs), folder)
    return program


def _describe(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """Return a digest of all that the program is compiled from; None if later processes cannot use it."""
    with suppress(MetaregError), _configure_compiler(inputs):  # this torch may have other settings
        if all(map(_returns_new_tensors, _list_parts(graph))):
            return describe_program(graph, inputs)
    return None


def _choose_cache() -> Path:
    """Put the compiler's cache into the user's own cache folder, unless the user chose another one; return it.

    Files in the cache are loaded as code. The compiler's default is a folder in /tmp with a predictable name, which
    anyone can create first. torch sets the variable to it when parts of the compiler are imported.
    """
    default = find_name("torch._inductor.runtime.cache_dir_utils.default_cache_dir", default=str)()
    if os.environ.get(_CACHE_VARIABLE, default) == default:
        os.environ[_CACHE_VARIABLE] = str(create_cache_folder("inductor"))
    return Path(os.environ[_CACHE_VARIABLE])


def _list_parts(graph: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """Return the condition and body of a loop; for another graph, the graph itself."""
    parts = [part for part in graph.children() if isinstance(part, torch.fx.GraphModule)]
    return parts or [graph]


@contextmanager
def _use_size_environment() -> Iterator[None]:
    """Provide, for a block, the fake mode with an environment for sizes that torch.compile uses."""
    try:
        context, tracing = find_name("torch._guards.TracingContext"), find_name("torch._guards.tracing")
        mode = find_name("torch._subclasses.fake_tensor.FakeTensorMode")
        environment = find_name("torch.fx.experimental.symbolic_shapes.ShapeEnv")
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
    config = find_name("torch._inductor.config")
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
    with ExitStack() as replacements:
        if os.name == "posix":
            # The compiler would build a test library for each set of vector instructions, and load it in a new process.
            replacements.enter_context(
                _replace("torch._inductor.cpu_vec_isa:VecISA", "check_build", lambda _: _accepts_instructions)
            )
        if all(map(_returns_new_tensors, _list_parts(graph))):
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


@contextmanager
def _watch_libraries() -> Iterator[list[tuple[Path, str]]]:
    """Note, for a block, the libraries that the compiler loads in this thread, and the name of each one's function."""
    libraries: list[tuple[Path, str]] = []
    thread = threading.get_ident()

    def convert(method: Any) -> Any:
        def load(cache: Any, path: str, key: str) -> Any:
            if threading.get_ident() == thread:
                libraries.append((Path(path), cache.entry_function))
            return method.__func__(cache, path, key)

        return classmethod(load)

    with _replace("torch._inductor.codecache:CppPythonBindingsCodeCache", "_load_library_inner", convert):
        yield libraries


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
    compiler = find_name("torch._inductor.cpp_builder.get_cpp_compiler")()
    command = [compiler, *instructions.build_arch_flags().split(), "-fsyntax-only", "-xc++", "-"]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def _returns_new_tensors(graph: torch.fx.GraphModule) -> bool:
    """Return whether a graph changes no tensor and returns only tensors that share no memory with any other."""
    (output,) = graph.graph.find_nodes(op="output")
    results = tree_leaves(output.args)
    return (
        len(set(results)) == len(results)
        and not any(writes_in_place(node.target) for node in graph.graph.nodes)
        and all(isinstance(node.target, OPERATION) and not returns_view(node.target) for node in results)
    )


def _simplify_no_polynomials(simplify: Callable[..., Any]) -> Callable[..., Any]:
    """Convert the function that simplifies indices, whose differences the compiler simplifies again.

    It rewrites divisions. On a polynomial, it would only call `sympy.simplify`, which takes milliseconds.
    """

    def simplify_others(index: Any, *arguments: Any) -> Any:
        is_polynomial = getattr(index, "is_polynomial", None)
        return index if is_polynomial is not None and is_polynomial() else simplify(index, *arguments)

    return simplify_others
