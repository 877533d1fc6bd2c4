"""Tables written by spreadsheets and programs, against the values that a person would read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metareg import UsageError
from metareg.util.tables import Table, read_table

ROWS = [(-2.0, 0.5), (-1.0, 0.7), (0.5, -0.3), (1.5, 0.1), (2.5, 0.9)]


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text(separator: str = ",", point: str = ".", end: str = "\n", head: str = "x,y") -> str:
    lines = [head.replace(",", separator)] if head else []
    return end.join([*lines, *(separator.join(repr(v).replace(".", point) for v in row) for row in ROWS)]) + end


@pytest.mark.parametrize(
    "content",
    [
        text(), "\ufeff" + text(), text(end="\r\n"), text(end="\r"), text(";"), text("\t"), text(";", ","), text("\t", ","),
        text().encode("utf-16"), text() + "\n\n", text().replace("\n", "\n\n"), text() + "  \n", text() + ",\n,\n",
        text().rstrip("\n"), text().replace("\n", ",\n"), text().replace(",", ", "), text().replace("x,y", '"x",y'),
        'x,y\n' + "".join(f'"{a}","{b}"\n' for a, b in ROWS).replace(".", ","),
    ],
)  # fmt: skip
def test_one_table_in_many_dresses(tmp_path: Path, content: str | bytes) -> None:
    table = read_table(write(tmp_path, content))
    assert table.names == ["x", "y"]
    assert table.named
    assert np.stack([table.get_numbers("x"), table.get_numbers("y")], 1).tolist() == [list(row) for row in ROWS]


def test_a_first_line_of_numbers(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, text(head="")))
    assert (table.names, table.named, len(table)) == (["x1", "x2"], False, 5)
    years = write(tmp_path, text(head="2020,2021"))
    with pytest.raises(UsageError, match=r"2020, 2021.*could be column names or a row"):
        read_table(years)
    assert read_table(years, ["2021"]).get_numbers("2020").tolist() == [row[0] for row in ROWS]
    table = read_table(write(tmp_path, "a,b\nb,c\n"), is_data=lambda cells: set(cells) <= {"a", "b", "c"})
    assert table.get_rows(["x1", "x2"]) == [["a", "b"], ["b", "c"]]


def test_a_column_of_decimal_commas_alone(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "x\n0,1\n-12\n,5\n")).get_numbers("x").tolist() == [0.1, -12, 0.5]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "contains no rows"),
        ("x,y\n1,2\n3\n", "1 cell in line 3, where its first line has 2"),
        ("x,y\n1,2,3\n", "3 cells in line 2, where its first line has 2"),
        ("x;y\n1;2\n1;2;3\n", "3 cells in line 3.*semicolons"),
        ("# made by me\nx,y\n1,2\n", "2 cells in line 2, where its first line has 1"),
        (",x,y\n0,1,2\n", "Column 1 of .* has no name"),
        ("x,x\n1,2\n", "two columns named 'x'"),
        ("größe,y\n1,2\n".encode("latin-1"), "line 1 is not UTF-8; save it as UTF-8"),
        ('x,y\n"1,2\n', "cannot be read"),
    ],
)
def test_refused_tables(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_table(write(tmp_path, content))


@pytest.mark.parametrize(
    "cell", ["four", "nan", "", "inf", "1_0", "1e999", '"1,000.5"', "2020-01-01", "50%", "\0", "0x1", "1 000"]
)
def test_cells_that_are_no_numbers(tmp_path: Path, cell: str) -> None:
    table = read_table(write(tmp_path, f"x,y\n1.5,2\n\n{cell},1\n"))
    with pytest.raises(UsageError, match=r"line 4, column 'x', contains"):
        table.get_numbers("x")


def test_thousands_are_not_taken_for_decimals(tmp_path: Path) -> None:
    """In a comma-separated file, ``1,000`` is ambiguous; with semicolons, the comma is a decimal comma."""
    with pytest.raises(UsageError, match=r"'1,000'.*thousands"):
        read_table(write(tmp_path, 'x,y\n"1,000",2\n')).get_numbers("x")
    assert read_table(write(tmp_path, "x;y\n1,000;2\n")).get_numbers("x").tolist() == [1.0]


def test_missing_numbers_and_mixed_columns(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a,b,c\n1,NA,x\n,2,3\nnan,n/a,\n"))
    assert np.isnan(table.get_numbers("a", missing=True)).tolist() == [False, True, True]
    assert [table.is_numeric(name) for name in "abc"] == [True, True, False]
    assert table.select([2, 0]).get_rows(["c", "a"]) == [["", "nan"], ["x", "1"]]
    with pytest.raises(UsageError, match="line 4"):
        table.select([2]).get_numbers("b")


def test_columns_are_checked_by_name(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "Temp,load\n1,2\n"))
    table.check_columns(["load"], ["Temp", "more"])
    with pytest.raises(UsageError, match="no column 'temp'; did you mean 'Temp'"):
        table.check_columns(["temp", "load"])
    with pytest.raises(UsageError, match="the column 'load', which is not used"):
        table.check_columns(["Temp"])


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, x=np.arange(6).reshape(3, 2), kind=np.array(["a", "b", ""]), y=np.array([0.5, np.nan, 2], ">f4"))
    table = read_table(path)
    assert table.get_rows(["x1", "x2", "kind", "y"]) == [
        ["0", "1", "a", "0.5"],
        ["2", "3", "b", ""],
        ["4", "5", "", "2"],
    ]
    with pytest.raises(UsageError, match="row 2, column 'y', contains nan"):
        table.get_numbers("y")
    for arrays, says in (
        ({"x": np.zeros(3), "y": np.zeros(2)}, "differ in length: x 3, y 2"),
        ({"x": np.array([1, None])}, "pickled objects"),
        ({"x": np.zeros((1, 1, 1))}, "shape"),
        ({"x": np.zeros(1, complex)}, "complex128"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=says):
            read_table(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"n": [1, None], "s": ["a", None], "f": [0.25, 2.0], "b": [True, False]}), path)
    table: Table = read_table(path)
    assert table.get_rows(["n", "s", "f", "b"]) == [["1", "a", "0.25", "1"], ["", "", "2", "0"]]
    write(tmp_path, "no parquet", "t.parquet")
    with pytest.raises(UsageError, match="cannot be read"):
        read_table(path)


@pytest.mark.parametrize("name", ["none.csv", ".", "none.npz"])
def test_files_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"There is no file|cannot be read"):
        read_table(tmp_path / name)
