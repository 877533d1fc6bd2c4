"""Templates for new plugin packages, which are complete and pass their own tests."""

from __future__ import annotations

import datetime
import importlib.resources
import importlib.util
import re
import tempfile
from pathlib import Path
from string import Template

from metareg._version import __version__
from metareg.contract.hookspecs import CONTRACT_VERSION
from metareg.errors import MetaregError, UsageError
from metareg.registry.plugins import list_entries

__all__ = ["write_plugin"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

# How users select a plugin of each kind, on the command line and in Python.
_USES = {
    "algorithms": ("--algo {name} --augment cml", 'algo="{name}"'),
    "augmenters": ("--augment {name}", 'augment=["{name}"]'),
    "tasks": ("--task {name}", 'task="{name}"'),
    "models": ("--model {name}", 'model="{name}"'),
    "observers": ("--observe {name}", 'observers=["{name}"]'),
}


def write_plugin(kind: str, name: str, parent: Path) -> Path:
    """Write the package ``metareg-NAME``: a working plugin, its entry point, tests, README, license and a CI workflow.

    Returns:
        The package's folder, in `parent`. If writing fails, the folder is removed.
    """
    if not _NAME.fullmatch(name):
        allowed = "use lower-case letters, digits and hyphens, such as sign-maml"
        raise UsageError(f"'{name}' cannot be a plugin's name: {allowed}.")
    owner = next((entry.distribution for entry in list_entries(kind) if entry.name == name), None)
    if owner is not None:
        raise UsageError(f"The name '{name}' is taken by the {kind.removesuffix('s')} of {owner}; choose another one.")
    module = _name_module(name)
    if importlib.util.find_spec(module) is not None:
        raise UsageError(
            f"The module {module}, which the name '{name}' needs, is already installed; choose another name."
        )
    folder = parent / f"metareg-{name}"
    if folder.exists():
        raise UsageError(f"{folder} already exists; choose another name, or another folder with --out.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".metareg-") as temporary:
            package = Path(temporary, folder.name)
            for path, text in _render_files(kind, name).items():
                (package / path).parent.mkdir(parents=True, exist_ok=True)
                (package / path).write_text(text, encoding="utf-8")
            package.rename(folder)
    except OSError as error:
        raise MetaregError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _name_module(name: str) -> str:
    return f"metareg_{name.replace('-', '_')}"


def _render_files(kind: str, name: str) -> dict[str, str]:
    flags, arguments = _USES[kind]
    module = _name_module(name)
    values = {
        "kind": kind,
        "singular": kind.removesuffix("s"),
        "name": name,
        "title": name.replace("-", " ").capitalize(),
        "distribution": f"metareg-{name}",
        "module": module,
        "cls": "".join(word.capitalize() for word in name.split("-")),
        "contract": str(CONTRACT_VERSION),
        "metareg": __version__,
        "year": str(datetime.date.today().year),
        "flags": flags.format(name=name),
        "arguments": arguments.format(name=name),
    }
    folder = importlib.resources.files("metareg.cli") / "templates"
    templates = {name: name for name in ("pyproject.toml", "README.md", "LICENSE")}
    templates |= {".gitignore": "gitignore", ".github/workflows/tests.yml": "tests.yml"}
    templates |= {f"{module}/__init__.py": f"{kind}.py", "tests/test_plugin.py": "test_plugin.py"}
    return {
        path: Template((folder / f"{template}.template").read_text(encoding="utf-8")).substitute(values)
        for path, template in templates.items()
    }
