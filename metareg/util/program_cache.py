"""Programs that were compiled on this machine before, by all that they were compiled from.

torch's compiler keeps programs as well. But before it finds one, it must be imported and must prepare the graph, which takes
longer than all that a process needs otherwise to find and load a program.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metareg._version import __version__
from metareg.errors import MetaregError
from metareg.util.files import write_json
from metareg.util.native import describe_processor, find_compiler
from metareg.util.torch_internals import find_name

__all__ = ["describe_program", "find_program", "keep_program"]

Program = Callable[..., list[Tensor]]

_INPUTS = re.compile(r"steal_from_raw_handles_to_raii_handles\(\w+, (\d+)\)")


def describe_program(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> str | None:
    """Return a digest of everything that a program is compiled from, under the compiler's present configuration.

    Args:
        graph: a graph that changes none of its inputs, and returns only new tensors.
        inputs: tensors of the shapes and types of its inputs.

    Returns:
        None if the program cannot be kept: the graph holds tensors or functions that have no name, is not for a CPU, or the
        compiler's caches are off.

    Raises:
        MetaregError: this torch has no settings of the compiler.
    """
    if torch.is_grad_enabled() or any(each.device.type != "cpu" or each.layout != torch.strided for each in inputs):
        return None
    lines = [f"{each.dtype} {tuple(each.shape)} {each.stride()}" for each in inputs]
    for name, module in graph.named_modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.op == "get_attr" and not isinstance(getattr(module, node.target), torch.fx.GraphModule):
                return None
            lines.append(f"{name} {node.name} {node.op} {node.target} {node.args} {node.kwargs}")
    config = find_name("torch._inductor.config")
    settings = config.get_config_copy()
    if getattr(config, "force_disable_caches", False) or not settings.get("fx_graph_cache", True):
        return None
    text = "\n".join(lines + _describe_machine(settings))
    # An object without a name, such as a pass of the user's for the compiler, is described by its address.
    return None if " at 0x" in text else hashlib.sha256(text.encode()).hexdigest()


def _describe_machine(settings: Mapping[str, Any]) -> list[str]:
    """List what, besides the graph, a program depends on: versions, settings, C++ compiler, processor and threads."""
    compiler = find_compiler() or ""
    return [
        f"metareg {__version__}, torch {torch.__version__} {torch.version.git_version}, {sys.implementation.cache_tag}",
        f"{compiler} {Path(compiler).stat().st_mtime if compiler else None}",
        f"{torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()} {torch.get_float32_matmul_precision()}",
        f"{torch.get_default_dtype()} {torch.are_deterministic_algorithms_enabled()}",
        *describe_processor(),
        *(f"{name} {value!r}" for name, value in sorted(settings.items()) if not name.endswith("_dir")),
    ]


def keep_program(key: str, library: Path, function: str, inputs: int, folder: Path) -> None:
    """Keep a program for `find_program`, unless its function needs more than the graph's inputs.

    Args:
        key: a description from `describe_program`.
        library: the shared library that torch's compiler has built, beside its source.
        function: the name of the library's function.
        inputs: the number of the graph's inputs.
        folder: the compiler's cache.
    """
    with suppress(OSError, ValueError):  # a program that cannot be kept is compiled again
        found = _INPUTS.search(library.with_suffix(".cpp").read_text("utf-8"))
        if found is None or int(found[1]) != inputs:
            return
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        place = _find_entry(key, folder)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        write_json(place, {"library": os.path.relpath(library, folder), "function": function, "sha256": digest})


def find_program(key: str, folder: Path) -> Program | None:
    """Load a program that `keep_program` has kept; None if there is none, or if its file has changed, which is deleted."""
    try:
        entry = json.loads(_find_entry(key, folder).read_bytes())
        library = folder / entry["library"]
        if hashlib.sha256(library.read_bytes()).hexdigest() != entry["sha256"]:
            library.unlink()  # torch's compiler would load it: a process that loads half a library is killed
            return None
        return _load(library, entry["function"])
    except (OSError, ImportError, ValueError, KeyError, TypeError, MetaregError):
        return None


def _find_entry(key: str, folder: Path) -> Path:
    return folder / "metareg" / f"{key}.json"


def _load(library: Path, name: str) -> Program:
    """Load a function that torch's compiler has built, with the conventions by which its own code calls it."""
    pack = find_name("torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors")
    unpack = find_name("torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs")
    address = find_name("torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr")
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    spec = importlib.util.spec_from_file_location(f"{library.stem}.{name}", library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return unpack(function(pack(list(inputs))))

    return run
