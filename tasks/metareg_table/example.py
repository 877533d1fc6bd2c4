"""Generated example tables: sensors that respond similarly but not identically."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from shlex import quote

import numpy as np

from metareg import MetaregError, UsageError

__all__ = ["write_example"]

_SENSORS, _ROWS = 40, 60
_NEW, _SUPPORT, _QUERY = 1, 10, 20
_MODES = {"idle": 0.0, "run": 60.0, "boost": 150.0}


def write_example(folder: Path) -> str:
    """Write the tables of 40 sensors, and for a new sensor its first rows and rows to predict.

    A sensor's reading y (in millivolts) depends on the temperature, the humidity and the mode of its machine. Each
    sensor has its own offset, gain, temperature of oscillation and effect of the mode.

    Args:
        folder: the folder; it must not exist or be empty.

    Returns:
        Instructions for using it.

    Raises:
        UsageError: the folder is not empty.
        MetaregError: the folder cannot be written.
    """
    tables, support, query = folder / "sensors", folder / "new-support.csv", folder / "new-query.csv"
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty; choose a new folder for the example.")
        tables.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(0)
        for number in range(_SENSORS):
            _write(tables / f"sensor-{number:02}.csv", _draw_sensor(generator, _ROWS))
        rows = _draw_sensor(generator, _SUPPORT + _QUERY)
        _write(support, rows[:_SUPPORT])
        _write(query, [{name: value for name, value in row.items() if name != "y"} for row in rows[_SUPPORT:]])
    except OSError as error:
        raise MetaregError(f"{folder} cannot be written: {error.strerror}.") from error
    return (
        f"{tables} contains {_SENSORS} tables of {_ROWS} rows; {support.name} and {query.name} are from another "
        f"sensor.\n  metareg train --task table-folder --data {quote(str(tables))} --target y --shots 10\n  metareg "
        f"predict RUN --support {quote(str(support))} --query {quote(str(query))}"
    )


def _draw_sensor(generator: np.random.Generator, rows: int) -> list[dict[str, str]]:
    offset, gain, shift, strength = generator.uniform((300, -1, 0, 0), (700, 1, 20, 2))
    temperature, humidity = generator.uniform((-10, 20), (40, 90), (rows, 2)).T.round(1)
    modes = generator.choice(list(_MODES), rows)
    noise = generator.normal(0, 3, rows)
    reading = offset + 100 * gain * np.sin((temperature - shift) / 50 * 2 * math.pi) + 0.5 * humidity + noise
    reading += strength * np.array([_MODES[mode] for mode in modes])
    return [
        {"temperature": f"{t:.1f}", "humidity": f"{h:.1f}", "mode": str(mode), "y": f"{y:.1f}"}
        for t, h, mode, y in zip(temperature, humidity, modes, reading, strict=True)
    ]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
