"""The checks of the project: ``nox`` runs lint, types and tests; ``nox -l`` lists the rest.

All sessions share one environment, ``.nox/metareg`` or the one that METAREG_NOX_ENV names, so that torch is installed once.
METAREG_PLUGINS names further packages for it, folders or requirements with spaces between; an example by default.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
ENVIRONMENT = Path(os.environ.get("METAREG_NOX_ENV", ROOT / ".nox" / "metareg"))
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
STRANGERS = os.environ.get("METAREG_PLUGINS", "examples/metareg-signmaml").split()
COMPARISONS = ROOT / "benchmarks" / "comparisons"
PROCESSES = ("-n", "2", "--dist", "worksteal")
"""Each process takes half of the tests, so that what the tests of a module share is made once, and then helps the other."""

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]


def environment(session: nox.Session) -> str:
    """The shared environment's Python; made, or brought up to date where a pyproject.toml or the versions changed."""
    python = str(BIN / "python")
    folders = [path for path in STRANGERS if (ROOT / path / "pyproject.toml").is_file()]
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", *(ROOT / path / "pyproject.toml" for path in folders)]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in files) + " ".join(STRANGERS).encode()).hexdigest()
    stamp = ENVIRONMENT / "metareg-nox.txt"
    if stamp.is_file() and stamp.read_text() == state:
        return python
    if not Path(python).exists():
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    editable = [part for path in folders for part in ("-e", path)]
    others = [name for name in STRANGERS if name not in folders]
    session.run(
        python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[dev,docs,graph,images,timm]", *editable,
        *others, external=True,
    )  # fmt: skip
    stamp.write_text(state)
    return python


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite in two processes; what follows -- goes to pytest: nox -s tests -- -m slow."""
    session.run(environment(session), "-m", "pytest", *PROCESSES, *session.posargs, external=True)


def lower_bounds() -> list[str]:
    """The requirements of pyproject.toml at the oldest versions that they allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = (requirement for extra in project["optional-dependencies"].values() for requirement in extra)
    return [
        requirement.replace(">=", "==")
        for requirement in (*project["dependencies"], *extras)
        if not requirement.startswith("metareg[")
    ]


def run_suite(session: nox.Session, *options: str) -> None:
    """Run the suite, or what follows --, with what pip chooses, in an environment of its own."""
    folder = ROOT / ".nox" / session.name
    session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True)
    python = str(folder / BIN.name / "python")
    session.run(python, "-m", "pip", "install", "-q", *options, "-e", ".[test,graph,images,timm]", external=True)
    # What other packages say of each other's age is not for this one.
    quiet = ("-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning")
    session.run(python, "-m", "pytest", *quiet, *session.posargs, external=True)


@nox.session(default=False)
def oldest(session: nox.Session) -> None:
    """The test suite with the lower bounds of pyproject.toml: nox -s oldest -- tests/engine."""
    bounds = Path(session.create_tmp()) / "bounds.txt"
    bounds.write_text("\n".join(lower_bounds()), "utf-8")
    run_suite(session, "-c", str(bounds.resolve()))


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """The test suite with the newest versions that install."""
    run_suite(session, "--upgrade")


@nox.session(default=False)
def steps(session: nox.Session) -> None:
    """Whole training steps in all combinations, a day's work; -k "not compiled" leaves the hour without a compiler."""
    arguments = ("-m", "slow or not slow", "tests/whole/test_steps.py", *session.posargs)
    session.run(environment(session), "-m", "pytest", *arguments, external=True)


@nox.session(default=False)
def strangers(session: nox.Session) -> None:
    """Strangers' files and hard days, with a table of all that was tried, an hour's work."""
    arguments = ("-m", "strangers", "--hypothesis-profile", "strangers", *session.posargs)
    session.run(environment(session), "-m", "pytest", *arguments, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff; and the floors of the house: import-linter."""
    python = environment(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    session.run(str(BIN / "lint-imports"), external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy, strict."""
    session.run(environment(session), "-m", "mypy", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation: build the site, run its notebooks, commands and listings, and compare its generated pages."""
    python = environment(session)
    session.run(python, "-m", "mkdocs", "build", "-q", env={"NO_MKDOCS_2_WARNING": "1"}, external=True)
    session.run(python, "docs/notebooks.py", "--check", external=True)
    options = (*PROCESSES, "-m", "slow or not slow", "--durations", "10")
    session.run(python, "-m", "pytest", *options, "tests/docs", external=True)


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and train from it in a clean environment, outside of the checkout."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    session.run(environment(session), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), ".", external=True)
    session.run(sys.executable, "-m", "venv", str(folder / "venv"), external=True)
    python = str(folder / "venv" / BIN.name / "python")
    (wheel,) = folder.glob("metareg-*.whl")
    session.run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", str(wheel), external=True)
    session.chdir(folder)
    for arguments in (["plugins"], ["train", "--algo", "maml", "--augment", "cml", "--steps", "50", "--out", "run"]):
        session.run(python, "-m", "metareg", *arguments, external=True)


@nox.session(default=False)
@nox.parametrize("name", [nox.param(path.stem, id=path.stem) for path in sorted(COMPARISONS.glob("*.yaml"))])
def results(session: nox.Session, name: str) -> None:
    """A page of results from its YAML: nox -s "results(images)"; runs that are finished are not run again."""
    python = environment(session)
    folder = f"comparisons/{name}"
    page = f"docs/results/{name}"
    session.run(
        python,
        "-m",
        "metareg",
        "compare",
        "--config",
        str(COMPARISONS / f"{name}.yaml"),
        "--out",
        folder,
        external=True,
    )
    raw = f"{page}.tar.xz"
    session.run(python, "-m", "metareg", "report", folder, "--archive", raw, "--out", f"{page}.md", external=True)
    session.run(python, "-m", "metareg", "report", raw, "--out", f"{folder}/report.html", external=True)


@nox.session(default=False)
def device(session: nox.Session) -> None:
    """What a GPU has to show, at most 12 minutes: nox -s device; -- --quick takes a CPU a minute."""
    session.run(environment(session), "benchmarks/device.py", *session.posargs, external=True)


@nox.session(default=False)
def matrix(session: nox.Session) -> None:
    """Every algorithm with every augmenter on regression, images and graphs, in one table: nox -s matrix -- maml cml."""
    session.run(
        environment(session), "tests/helpers/matrix.py", *session.posargs, env={"OMP_NUM_THREADS": "1"}, external=True
    )


@nox.session(default=False)
def pair(session: nox.Session) -> None:
    """The conformance kit's checks of one algorithm with one augmenter, or none: nox -s pair -- maml cml."""
    session.run(
        environment(session), "-m", "metareg.testing", *session.posargs, env={"OMP_NUM_THREADS": "1"}, external=True
    )
