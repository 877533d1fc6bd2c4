"""Limits on the cost of a file: a small multiple of its size, in memory and in time, whatever it contains."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from metareg import MetaLearner, TaskSpec
from metareg.learner.module_json import build_module
from metareg.util.tensorfile import TensorFile, write_tensors

pytestmark = pytest.mark.strangers

Tried = Callable[..., None]

_MEASURE = """
import resource, sys, time
from metareg import MetaregError
{setup}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    began = time.process_time()
    try:
        read(path)
        said = "read"
    except MetaregError as error:
        said = "refused: " + str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(grown, round(time.process_time() - began), said[:300].replace("\\n", " "), sep="\\t")
"""


def measure(setup: str, paths: list[Path], megabytes: int = 250, seconds: int = 60) -> list[str]:
    """Read each file in a fresh process with limited memory and time; return messages. `setup` defines ``read(path)``."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(setup=setup), *map(str, paths)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == len(paths)
    for path, (grown, took, said) in zip(paths, rows, strict=True):
        assert int(grown) < megabytes, (path, said)
        assert int(took) < seconds, (path, said)
    return [said for _, _, said in rows]


def _layer(name: str, **arguments: Any) -> dict[str, Any]:
    return {"layer": name, "arguments": arguments}


def _nest(depth: int) -> dict[str, Any]:
    inner = _layer("ReLU")
    for _ in range(depth):
        inner = {"layer": "Sequential", "children": {"0": inner}}
    return inner


_ARCHITECTURES: list[Any] = [
    _layer("LSTM", input_size=1, hidden_size=1, num_layers=10**9),
    _layer("GRU", input_size=1, hidden_size=1, num_layers=10**7, bidirectional=True),
    _layer("Transformer", d_model=1, nhead=1, num_encoder_layers=10**8, dim_feedforward=1),
    _layer("Linear", in_features=1 << 20, out_features=1 << 20, device="cpu"),
    _layer("Linear", in_features=1 << 15, out_features=1 << 15, dtype="float64", device="cpu"),
    _layer("Linear", in_features=10**30, out_features=1),
    _layer("Linear", in_features=-1, out_features=1),
    _layer("LazyLinear", out_features=5),
    _layer("Conv2d", in_channels=4, out_channels=4, kernel_size=3, groups=0),
    _layer("MultiheadAttention", embed_dim=3, num_heads=2),
    _layer("Module"), _layer("ModuleList"), _layer("os.system"), _layer("DataParallel"), [], None, 7, {"layer": 7},
    {"layer": "Sequential"}, {"layer": "Sequential", "children": [1]}, {"layer": "BodyHead", "children": {}},
    _nest(100),
    {"layer": "Sequential", "children": {str(n): _layer("Linear", in_features=4096, out_features=4096, bias=False)
                                         for n in range(200)}},
    {"layer": "Sequential", "children": {str(n): _layer("Linear", in_features=1, out_features=1) for n in range(20_000)}},
    {"layer": "Sequential", "children": {str(n): _layer("ReLU") for n in range(20_000)}},
]  # fmt: skip
_RECIPES: list[dict[str, Any]] = [
    {"hidden": [4096] * 200}, {"hidden": [1] * 20_000}, {"hidden": [200_000, 1_000_000]}, {"hidden": [1 << 30]},
    {"hidden": [2000] * 100},
]  # fmt: skip


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return learners' files that declare more than they contain."""
    folder = tmp_path_factory.mktemp("made-up")
    learner = MetaLearner("mlp", loss="mse", spec=TaskSpec((1,), (1,)), model_options={"hidden": [3]})
    learner.save(folder / "good")
    file = TensorFile(folder / "good", "learner")
    headers = [file.header | {"model": None, "architecture": each} for each in _ARCHITECTURES]
    headers += [file.header | {"model": file.header["model"] | {"config": each}} for each in _RECIPES]
    headers += [file.header | {"example": ["float32", 1 << 40]}, file.header | {"example": [{}]}]
    paths = []
    for number, header in enumerate(headers):
        paths.append(folder / f"{number}.safetensors")
        write_tensors(paths[-1], file.read(), header)
    paths.append(folder / "tensors.safetensors")
    write_tensors(paths[-1], {f"t{n}": file.read()["head.bias"] for n in range(20_000)}, file.header)
    return paths


def test_a_learner_costs_what_its_file_holds(made_up: list[Path], tried: Tried) -> None:
    said = measure("from metareg import MetaLearner\nread = MetaLearner.load", made_up)
    refused = [each.startswith("refused") for each in said]
    assert sum(refused) >= len(made_up) - 2, said
    assert "bug" not in "".join(said)
    tried("architectures", len(made_up))


def test_a_stored_architecture_names_no_device() -> None:
    with pytest.raises(Exception, match="a file must not set 'device'"):
        build_module(_layer("Linear", in_features=2, out_features=2, device="cpu"), {})


_READ = """
from metareg import Columns, load_image, read_split_file, read_table
from metareg.comparison.plan import Plan
from metareg.runs.run import read_config
from metareg_graph.data import load as load_graph
from pathlib import Path

def read(path):
    path = Path(path)
    kind = path.name.partition("-")[0]
    return {
        "split": lambda: read_split_file(path, ["a"], "class"),
        "image": lambda: load_image(path, 3),
        "table": lambda: read_table(path),
        "graph": lambda: load_graph(path),
        "run": lambda: read_config(path),
        "comparison": lambda: Plan.read(path),
    }[kind]()
"""


def _aliases(levels: int = 9) -> str:
    """Return nested lists, each with nine references to the previous one: a gigabyte in a few lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        before, name = chr(96 + level), chr(97 + level)
        lines.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    return "\n".join(lines)


def _png(path: Path, side: int) -> None:
    """Return a black square image, compressed to a thousandth of its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(1 + side)) for _ in range(side)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"".join(rows) + packer.flush()) + chunk(b"IEND", b"")
    )


def _make_bombs(folder: Path) -> dict[str, list[Path]]:
    texts = {
        "split-aliases.yaml": _aliases(), "split-merge.yaml": "a: &a {x: [1]}\nb:\n  <<: [" + "*a, " * 100_000 + "*a]",
        "split-deep.json": "[" * 1_000_000, "split-deep.yaml": "[" * 100_000,
        "split-many.yaml": "[" + "[]," * 1_000_000 + "]",
        "table-columns.csv": "," * 1_000_000, "table-rows.csv": "x\n" + "1\n" * 500_000,
        "table-quote.csv": '"' + "x" * 1_000_000,
    }  # fmt: skip
    configurations = {
        "run-aliases": _aliases(), "run-threads": "threads: 1000000", "run-steps": f"steps: {10**30}",
        "run-digits": "steps: " + "9" * 4000, "run-tests": f"test_inner_steps: [{'1, ' * 1000}1]",
        "run-nested": "a: " + "{b: " * 5000, "comparison-seeds": "seeds: 1000000000",
        "comparison-product": yaml.safe_dump({key: [f"a{n}" for n in range(900)] for key in ("algo", "augment", "tasks")}),
        "comparison-names": yaml.safe_dump({"algo": [f"a{n}" for n in range(50_000)]}),
        "comparison-grid": yaml.safe_dump({"tune": {"space": {f"o{n}": list(range(50)) for n in range(20)}}}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name, text in configurations.items():
        (folder / name).mkdir()
        (folder / name / ("config.yaml" if name.startswith("run") else "comparison.yaml")).write_text(text)
    _png(folder / "image-wide.png", 12_000)
    for name, kind, size in (
        ("image-huge.bmp", "<2sIHHIIiiHHIIiiII", 60_000),
        ("image-odd.bmp", "<2sIHHIIiiHHIIiiII", 2),
    ):
        head = struct.pack(kind, b"BM", 54, 0, 0, 54, 40, size, -size, 1, 24, 0, 0, 0, 0, 0, 0)
        (folder / name).write_bytes(head)
    big = np.zeros(1 << 20)
    with zipfile.ZipFile(folder / "table-packed.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        content = io.BytesIO()
        np.save(content, big)
        for number in range(200):
            archive.writestr(f"x{number}.npy", content.getvalue())
    for name, shape in (
        ("table-shape.npz", (1 << 40,)),
        ("table-wide.npz", (0, 1 << 40)),
        ("table-axes.npz", (1,) * 32),
    ):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("x.npy", head.getvalue())
    csr = {"adj_indptr": [0, 1, 2, 3], "adj_indices": [1, 2, 0], "labels": [0, 1, 1]}
    np.savez(folder / "graph-rows.npz", **{**csr, "adj_indptr": [0, 10**10, 10**10, 10**10]}, features=np.eye(3))
    np.savez(folder / "graph-width.npz", **csr, attr_indptr=[0, 1, 1, 1], attr_indices=[0], attr_data=[1.0],
             attr_shape=[3, 10**10])  # fmt: skip
    np.savez(folder / "graph-entries.npz", **csr, attr_indptr=[0, 10**10, 1, 1], attr_indices=[0], attr_data=[1.0],
             attr_shape=[3, 2])  # fmt: skip
    (folder / "graph-ogb" / "raw").mkdir(parents=True)
    for name in ("edge", "node-feat", "node-label"):
        (folder / "graph-ogb" / "raw" / f"{name}.csv.gz").write_bytes(gzip.compress(b"1" * (1 << 28), 9))
    groups: dict[str, list[Path]] = {}
    names = {"split": "configurations", "run": "configurations", "comparison": "configurations", "image": "images",
             "table": "tables", "graph": "graphs"}  # fmt: skip
    for path in sorted(folder.iterdir()):
        group = (
            "archives" if path.name.startswith("table") and path.suffix == ".npz" else names[path.name.split("-")[0]]
        )
        groups.setdefault(group, []).append(path)
    return groups


@pytest.mark.slow
def test_small_files_cost_little(tmp_path: Path, tried: Tried) -> None:
    pytest.importorskip("dgl")
    groups = _make_bombs(tmp_path)
    paths = [path for listed in groups.values() for path in listed]
    said = dict(zip(paths, measure(_READ, paths, megabytes=400), strict=True))
    allowed = {"table-columns.csv", "table-rows.csv"}
    assert {path.name for path, each in said.items() if each == "read"} <= allowed, said
    for group, listed in groups.items():
        tried(group, len(listed))
