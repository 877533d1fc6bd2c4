"""What the project is checked with: ``nox`` runs lint, types and tests; ``nox -l`` lists the rest.

All sessions share one environment, ``.nox/metareg`` or the one that METAREG_NOX_ENV names, so that torch is installed once.
METAREG_PLUGINS names further packages for it, folders or requirements with spaces between; an example by default.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import nox

ROOT = Path(__file__).parent
ENVIRONMENT = Path(os.environ.get("METAREG_NOX_ENV", ROOT / ".nox" / "metareg"))
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
STRANGERS = os.environ.get("METAREG_PLUGINS", "examples/metareg-signmaml").split()
RESULTS = ROOT / ".nox" / "matrix"
COMPARISONS = ROOT / "benchmarks" / "comparisons"
MAIN_RESULTS = "augmenters"

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
        python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[dev,graph,images]", *editable, *others,
        external=True,
    )  # fmt: skip
    stamp.write_text(state)
    return python


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite; what follows -- goes to pytest: nox -s tests -- -m slow."""
    session.run(environment(session), "-m", "pytest", *session.posargs, external=True)


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
    session.run(python, "-m", "pip", "install", "-q", *options, "-e", ".[test,graph,images]", external=True)
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
    """The documentation, as written: its commands are run and its listings installed; the hook reference is current."""
    python = environment(session)
    session.run(python, "docs/hook_reference.py", "--check", external=True)
    session.run(python, "-m", "pytest", "-m", "slow or not slow", "tests/whole/test_docs_plugins.py", external=True)


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
    page = "docs/results" if name == MAIN_RESULTS else f"docs/results/{name}"
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
    for suffix in ("md", "html"):
        session.run(python, "-m", "metareg", "report", folder, "--out", f"{page}.{suffix}", external=True)


@nox.session(default=False)
def device(session: nox.Session) -> None:
    """What a GPU has to show, at most 12 minutes: nox -s device; -- --quick takes a CPU a minute."""
    session.run(environment(session), "benchmarks/device.py", *session.posargs, external=True)


# --------------------------------------------------------------------------------------------------------------- matrix


def installed(kind: str) -> list[str]:
    """The names of a kind of plugin: those of the shared environment, and those that it will hold."""
    group = f"metareg.{kind}"
    packages = [ROOT, *(ROOT / path for path in STRANGERS)]
    tables = [tomllib.loads((path / "pyproject.toml").read_text("utf-8")) for path in packages if path.is_dir()]
    names = {name for table in tables for name in table["project"].get("entry-points", {}).get(group, {})}
    for site in ENVIRONMENT.glob("[Ll]ib/**/site-packages"):
        for distribution in distributions(path=[str(site)]):
            names |= {point.name for point in distribution.entry_points if point.group == group}
    return sorted(names)


@nox.session
@nox.parametrize(
    ("algorithm", "augmenter"),
    [
        nox.param(algorithm, augmenter, id=f"{algorithm}, {augmenter}")
        for algorithm in installed("algorithms")
        for augmenter in ("none", *installed("augmenters"))
    ],
)
def matrix(session: nox.Session, algorithm: str, augmenter: str) -> None:
    """One algorithm with one augmenter: nox -s "matrix(maml, cml)"; nox -s matrix for all that are installed."""
    python = environment(session)
    session.notify("table")
    start = time.perf_counter()
    output = session.run(
        python, "-m", "metareg.testing", algorithm, augmenter,
        env={"OMP_NUM_THREADS": "1"}, silent=True, success_codes=[0, 1, 2], external=True,
    )  # fmt: skip
    try:
        found = json.loads(str(output).strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = {"started": str(output).strip()}
    problems = [f"{check}: {problem}" for check, problem in found.items() if problem not in (None, "not applicable")]
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"seconds": round(time.perf_counter() - start, 1), "problems": problems, "nox": os.getpid()}
    (RESULTS / f"{algorithm}, {augmenter}.json").write_text(json.dumps(result))
    if problems:
        session.error("\n".join(problems))


@nox.session(default=False)
def table(session: nox.Session) -> None:
    """The combinations of the last matrix, algorithms down and augmenters across."""
    results = {}
    for path in RESULTS.glob("*.json"):
        results[tuple(path.stem.split(", "))] = json.loads(path.read_text())
    mine = {pair: result for pair, result in results.items() if result["nox"] == os.getpid()} or results
    columns = ["none", *sorted({augmenter for _, augmenter in mine} - {"none"})]
    rows = [["", *columns]]
    for algorithm in sorted({algorithm for algorithm, _ in mine}):
        cells = [mine.get((algorithm, augmenter)) for augmenter in columns]
        rows.append(
            [algorithm]
            + [
                "" if cell is None else "FAILED" if cell["problems"] else f"ok {cell['seconds']:.0f} s"
                for cell in cells
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        session.log("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
