"""Users' tables: text (CSV from spreadsheets and programs), Parquet and npz, read by column names."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from metareg.errors import UsageError, nearest
from metareg.printable import format_count
from metareg.util.arrays import open_arrays
from metareg.util.files import MALFORMED, refuse_special_file

__all__ = ["Table", "read_frame", "read_table"]

_LARGEST_TEXT = 1 << 28
_MOST_COLUMNS = 100_000
_LEAST_CELLS, _MOST_CELLS = 1 << 22, 20
"""Limits for a Parquet file: it may have this many cells, or this many per byte."""
_SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas"}
"""Separators in the order in which they are tried; semicolons before commas, which can be decimal commas."""
_WHOLE = re.compile(r"[+-]?\d+")
_POINT = re.compile(r"[+-]?(\d+\.\d*|\.\d+)")
_COMMA = re.compile(r"[+-]?(\d+,\d*|,\d+)([eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_MISSING = frozenset({"", "na", "n/a", "nan", "null"})
_SHOWN = 12


@dataclass(frozen=True, eq=False)
class Table:
    """Rows and named columns.

    Args:
        path: its origin, for messages.
        columns: each column by its name: cells of text, or numbers (float64, NaN where one is missing).
        named: whether the file names its columns; if not, they are ``x1, x2, …``.
        lines: the line of each row in a text file; empty for other files.
        decimal_comma: whether numbers are written as ``0,5``.
    """

    path: Path
    columns: Mapping[str, Sequence[str] | np.ndarray]
    named: bool = True
    lines: Sequence[int] = ()
    decimal_comma: bool = False

    @property
    def names(self) -> list[str]:
        """The columns' names in order."""
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def is_numeric(self, name: str) -> bool:
        """Return whether a column has cells that are not missing, and all of these are numbers."""
        cells = self.columns[name]
        return isinstance(cells, np.ndarray) or (any(cells) and not self.find_texts(name))

    def find_texts(self, name: str) -> list[int]:
        """Find the rows whose cells in a column are neither numbers nor missing."""
        cells = self.columns[name]
        if isinstance(cells, np.ndarray):
            return []
        return [row for row, cell in enumerate(cells) if cell.casefold() not in _MISSING and self._parse(cell) is None]

    def get_numbers(self, name: str, *, missing: bool = False) -> np.ndarray:
        """Return a column as numbers (float64).

        Args:
            name: the column.
            missing: treat empty cells, NA, N/A, NaN and null as missing numbers, which become NaN, instead of as
                errors.

        Raises:
            UsageError: a cell is not a finite number.
        """
        cells = self.columns[name]
        if isinstance(cells, np.ndarray):
            wrong = ~np.isfinite(cells) & ~(np.isnan(cells) & missing)
            if wrong.any():
                row = int(wrong.argmax())
                raise UsageError(f"{self.locate(row, name)} contains {cells[row]} instead of a finite number.")
            return cells
        numbers = np.full(len(cells), math.nan)
        for row, cell in enumerate(cells):
            if missing and cell.casefold() in _MISSING:
                continue
            value = self._parse(cell)
            if value is None:
                raise UsageError(f"{self.locate(row, name)} contains {self._explain(cell)}.")
            numbers[row] = value
        return numbers

    def get_texts(self, name: str) -> list[str]:
        """Return a column as strings: numbers with decimal points, whole numbers without, and "" for missing ones."""
        cells = self.columns[name]
        if isinstance(cells, np.ndarray):
            return ["" if math.isnan(value) else _format_number(value) for value in cells.tolist()]
        return [cell.replace(",", ".") if self.decimal_comma and _COMMA.fullmatch(cell) else cell for cell in cells]

    def get_rows(self, names: Sequence[str]) -> list[list[str]]:
        """Return the strings of some columns, row by row."""
        return [list(row) for row in zip(*(self.get_texts(name) for name in names), strict=True)]

    def select(self, rows: Sequence[int] | np.ndarray) -> Table:
        """Return a table with some of the rows."""
        columns = {
            name: cells[rows] if isinstance(cells, np.ndarray) else [cells[row] for row in rows]
            for name, cells in self.columns.items()
        }
        return replace(self, columns=columns, lines=[self.lines[row] for row in rows] if self.lines else ())

    def rename(self, names: Sequence[str]) -> Table:
        """Return a table with the same columns under other names."""
        return replace(self, columns=dict(zip(names, self.columns.values(), strict=True)))

    def locate(self, row: int, name: str) -> str:
        """Describe a cell for messages: the file, its line and its column."""
        return f"{self.path}, {f'line {self.lines[row]}' if self.lines else f'row {row + 1}'}, column '{name}',"

    def check_columns(self, required: Collection[str], optional: Collection[str] = ()) -> None:
        """Refuse the table unless it has the required columns, and no others except the optional ones.

        Raises:
            UsageError: a column is missing or unknown; the message gives the nearest names.
        """
        for name in required:
            self.require(name)
        allowed = {*required, *optional}
        for name in self.columns:
            if name not in allowed:
                close = nearest(name, allowed - set(self.columns))
                advice = f"did you mean '{close[0]}'?" if close else "remove it."
                raise UsageError(
                    f"{self.path} has the column '{name}', which is not used: the columns are "
                    f"{_list_names(sorted(allowed, key=_order_of([*required, *optional])))}; {advice}"
                )

    def require(self, name: str) -> None:
        """Refuse the table if it has no column with this name.

        Raises:
            UsageError: there is no such column; the message gives the nearest name.
        """
        if name in self.columns:
            return
        close = nearest(name, self.columns)
        advice = f"did you mean '{close[0]}'?" if close else f"its columns are {_list_names(self.names)}."
        raise UsageError(f"{self.path} has no column '{name}'; {advice}")

    def _parse(self, cell: str) -> float | None:
        """Parse a cell as a finite number; None if it is not one."""
        if self.decimal_comma:
            cell = cell.replace(",", ".") if cell.count(",") == 1 and "." not in cell else cell
        if not _NUMBER.fullmatch(cell):
            return None
        value = float(cell)
        return value if math.isfinite(value) else None

    def _explain(self, cell: str) -> str:
        if not cell:
            return "nothing instead of a number"
        hint = ""
        if "," in cell:
            hint = "; thousands separators are not allowed, and a file uses either decimal points or decimal commas"
        return f"{cell!r} instead of a finite number{hint}"


def read_table(path: Path, known: Collection[str] = (), *, is_data: Callable[[list[str]], bool] | None = None) -> Table:
    """Read a user's table.

    Text is UTF-8 or UTF-16, with or without a byte order mark. Cells are separated by tabs, semicolons or commas.
    Numbers have decimal points or, throughout the file, decimal commas. Blank lines are ignored. The first line names
    the columns. If it consists only of numbers, it is a row; whole numbers could be either and are refused.

    Args:
        path: text, ``.parquet`` (with pyarrow) or ``.npz``, in which each array is a column, or several columns if it
            is ``[rows, columns]``.
        known: names of columns; a first line that contains one of them names the columns, even if they are numbers.
        is_data: decides whether the cells of the first line are a row; by default, as described above.

    Raises:
        UsageError: the file cannot be read, lines differ in length, or column names are missing or duplicated.
    """
    try:
        refuse_special_file(path)
        if path.suffix.lower() == ".npz":
            return _read_npz(path)
        if path.suffix.lower() in (".parquet", ".pq"):
            return _read_parquet(path)
        if path.stat().st_size > _LARGEST_TEXT:
            raise UsageError(f"{path} is larger than {_LARGEST_TEXT >> 20} MiB; write it as Parquet or npz.")
        return _read_text(path, known, is_data)
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.") from None
    except (OSError, *MALFORMED) as error:
        raise UsageError(f"{path} cannot be read as a table: {getattr(error, 'strerror', None) or error}.") from error


def _read_text(path: Path, known: Collection[str], is_data: Callable[[list[str]], bool] | None) -> Table:
    separator, numbered = _split_cells(path, _decode(path))
    while numbered and not any(numbered[-1][1]):  # spreadsheets write emptied rows
        numbered.pop()
    if not numbered:
        raise UsageError(f"{path} contains no rows.")
    first = numbered[0][1]
    data = not set(first) & set(known) and (is_data or _create_rule(path))(first)
    names = [f"x{number}" for number in range(1, len(first) + 1)] if data else first
    numbered = numbered if data else numbered[1:]
    columns = dict(enumerate(zip(*(cells for _, cells in numbered), strict=True))) if numbered else {}
    texts = {place: list(columns.get(place, ())) for place in range(len(names))}
    kept = [place for place, name in enumerate(names) if name or any(texts[place])]
    _check_names(path, [names[place] for place in kept])
    return Table(
        path,
        {names[place]: texts[place] for place in kept},
        not data,
        [line for line, _ in numbered],
        _has_decimal_comma(separator, [cell for _, cells in numbered for cell in cells]),
    )


def _decode(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{path} cannot be read as a table: line {line} is not {encoding.removesuffix('-sig').upper()}; save it as "
            "UTF-8."
        ) from error


def _split_cells(path: Path, text: str) -> tuple[str, list[tuple[int, list[str]]]]:
    """Find the separator, and split each nonblank line into cells; also return the lines' numbers."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    candidates = [separator for separator in _SEPARATORS if separator in first] or _SEPARATORS
    tried = {separator: lines for separator in candidates if (lines := _parse_lines(text, separator)) is not None}
    if not tried:
        raise UsageError(f"{path} cannot be read as a table: a quotation mark is not closed.")
    widths = {separator: [len(cells) for _, cells in lines] for separator, lines in tried.items()}
    for separator, found in widths.items():
        if len(set(found)) == 1 and found[0] > 1:
            return separator, tried[separator]
    likely = max(widths, key=lambda separator: widths[separator][:1])
    if widths[likely][:1] <= [1]:  # one column with decimal commas
        split = (separator for separator in tried if not _is_one_column(tried[separator], separator))
        likely = next(split, likely)
    for (line, _), width in zip(tried[likely], widths[likely], strict=True):
        if width != widths[likely][0]:
            raise UsageError(
                f"{path} has {format_count(width, 'cell')} in line {line}, where its first line has "
                f"{widths[likely][0]} (separated by {_SEPARATORS[likely]})."
            )
    return likely, tried[likely]


def _is_one_column(lines: list[tuple[int, list[str]]], separator: str) -> bool:
    """Return whether the separator never occurs, or is a comma that is always a decimal comma."""
    split = [separator.join(cells) for _, cells in lines if len(cells) > 1]
    return not split or (separator == "," and all(_COMMA.fullmatch(line) for line in split))


def _parse_lines(text: str, separator: str) -> list[tuple[int, list[str]]] | None:
    """Split nonblank lines by a separator; None if quotation marks are not where this separator requires them."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    lines = []
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if len(stripped) > 1 or any(stripped):
                lines.append((reader.line_num, stripped))
    except csv.Error:
        return None
    return lines


def _create_rule(path: Path) -> Callable[[list[str]], bool]:
    """Create the rule that decides whether the first line is a row, for tables of numbers."""

    def is_data(cells: list[str]) -> bool:
        if not all(_NUMBER.fullmatch(cell) or _COMMA.fullmatch(cell) or _is_marker(cell) for cell in cells):
            return False
        if all(_WHOLE.fullmatch(cell) for cell in cells):
            raise UsageError(
                f"The first line of {path}, '{', '.join(cells[:_SHOWN])}', could be column names or a row: replace it "
                "with names that are not numbers, or add such a line before it."
            )
        return True

    return is_data


def _is_marker(cell: str) -> bool:
    """Return whether a cell marks a missing number in letters."""
    return cell.casefold() in _MISSING and bool(cell)


def _check_names(path: Path, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if not name:
            raise UsageError(
                f"Column {place + 1} of {path} has no name; name it in the first line, or remove it (in pandas, "
                "to_csv(…, index=False))."
            )
        if name in names[:place]:
            raise UsageError(f"{path} has two columns named '{name}'.")


def _has_decimal_comma(separator: str, cells: Sequence[str]) -> bool:
    commas = [cell for cell in cells if "," in cell and _COMMA.fullmatch(cell)]
    if not commas or any(_POINT.match(cell) and _NUMBER.fullmatch(cell) for cell in cells if "." in cell):
        return False
    return separator != "," or not all(_THOUSANDS.fullmatch(cell) for cell in commas)


def _read_npz(path: Path) -> Table:
    columns: dict[str, Sequence[str] | np.ndarray] = {}
    with open_arrays(path, "a table") as arrays:
        for name in arrays:
            array = np.asarray(arrays[name])
            if array.ndim == 2 and array.shape[1] > _MOST_COLUMNS:
                raise UsageError(f"The array '{name}' of {path} has {array.shape[1]} columns; at most {_MOST_COLUMNS}.")
            if array.ndim == 1:
                columns[name] = _convert_array(path, name, array)
            elif array.ndim == 2:
                for number, column in enumerate(array.T, 1):
                    columns[f"{name}{number}"] = _convert_array(path, name, column)
            else:
                raise UsageError(
                    f"The array '{name}' of {path} has the shape {array.shape}; a column is [rows], several "
                    "are [rows, columns]."
                )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"The columns of {path} differ in length: {listed}.")
    return Table(path, columns)


def read_frame(frame: Any, name: str) -> Table:
    """Convert a pandas frame, or a similar object, to a table.

    Args:
        frame: an object with `columns`, and for each a column with `to_numpy`.
        name: the name in messages.

    Raises:
        UsageError: a column contains neither numbers nor strings, or two columns have the same name.
    """
    path, names = Path(name), [str(each) for each in frame.columns]
    _check_names(path, names)
    columns = {text: frame[each].to_numpy() for text, each in zip(names, frame.columns, strict=True)}
    return Table(path, {text: _convert_cells(path, text, cells) for text, cells in columns.items()})


def _convert_cells(path: Path, name: str, cells: np.ndarray) -> Sequence[str] | np.ndarray:
    """Convert a column of Python objects: to numbers if all are numbers, otherwise to strings, empty if missing."""
    if cells.dtype.kind != "O":
        return _convert_array(path, name, cells)
    values = [None if cell is None or cell != cell else cell for cell in cells.tolist()]
    if all(value is None or isinstance(value, int | float | np.number) for value in values):
        return np.array([math.nan if value is None else float(value) for value in values])
    return ["" if value is None else str(value).strip() for value in values]


def _convert_array(path: Path, name: str, array: np.ndarray) -> Sequence[str] | np.ndarray:
    if array.dtype.kind in "biuf":
        return array.astype(np.float64)
    if array.dtype.kind in "US":
        return [str(cell).strip() for cell in array.astype(np.str_).tolist()]
    raise UsageError(f"The array '{name}' of {path} has the type {array.dtype}; columns must be numbers or strings.")


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise UsageError(f"Reading Parquet ({path}) needs pyarrow: pip install 'metareg[parquet]'.") from error
    try:
        with parquet.ParquetFile(path) as file:
            cells = file.metadata.num_rows * file.metadata.num_columns
            if cells > max(_LEAST_CELLS, _MOST_CELLS * path.stat().st_size):
                raise UsageError(f"{path} claims to have {cells} cells, which is impossible for its size.")
            content = file.read()
    except ArrowException as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}.") from error
    columns: dict[str, Sequence[str] | np.ndarray] = {}
    for name, column in zip(content.column_names, content.columns, strict=True):
        kind, values = column.type, column.to_pylist()
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
            columns[name] = np.array(
                [math.nan if value is None else float(value) for value in values], dtype=np.float64
            )
        else:
            columns[name] = ["" if value is None else str(value).strip() for value in values]
    _check_names(path, content.column_names)
    return Table(path, columns)


def _format_number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _order_of(names: Sequence[str]) -> Callable[[str], int]:
    return list(names).index
