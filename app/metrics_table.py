"""The file `metrics.csv` of a run, for the log that writes it and the report that reads it.

First column `step`, then the metric names, sorted; one line per step; blank where a metric was not logged. Numbers stay
the text that was written, so that a file can be rewritten without changing a digit.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import InputError

FILE_NAME = "metrics.csv"

Row = dict[str, str]
"""metric name -> number as text; blank metrics are left out"""


@dataclass
class MetricsTable:
    """What one `metrics.csv` holds."""

    names: list[str] = field(default_factory=list)
    """metric names in the order of the columns, without `step`"""
    rows: dict[int, Row] = field(default_factory=dict)
    """by step, ascending"""

    def to_bytes(self) -> bytes:
        """The whole file."""
        return encode_header(self.names) + b"".join(encode_row(s, self.rows[s], self.names) for s in sorted(self.rows))


def read_table(path: Path) -> MetricsTable:
    """Read a `metrics.csv`; a last line without its newline (torn by a crash) is left out.

    A missing file is an empty table. Raises InputError for a file that is not a table of metrics.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = csv.reader(data.decode("utf-8", errors="replace").split("\n")[:-1])
    header = next(lines, None)
    if header is None:
        return MetricsTable()
    if header[:1] != ["step"] or len(set(header)) != len(header):
        raise InputError(
            f"{path} begins with the columns {','.join(header)[:60]!r}; a metrics file has the column step first "
            "and each name once: move this file away, or name another run directory"
        )
    names = header[1:]
    rows: dict[int, Row] = {}
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(header) or not cells[0].isdecimal():
            raise InputError(
                f"{path} line {number} has {len(cells)} values and the step {cells[:1]}; it needs {len(header)} values "
                "and a whole number as its step: remove or repair that line"
            )
        values = {name: cell for name, cell in zip(names, cells[1:], strict=True) if cell}
        rows.setdefault(int(cells[0]), {}).update(values)
    return MetricsTable(names, dict(sorted(rows.items())))


def encode_header(names: Iterable[str]) -> bytes:
    """The first line of the file."""
    return _encode(["step", *names])


def encode_row(step: int, row: Mapping[str, str], names: Iterable[str]) -> bytes:
    """One line of the file."""
    return _encode([str(step), *(row.get(name, "") for name in names)])


def format_number(name: str, value: Any) -> str:
    """The text of a metric's value that reads back as the same number.

    Tensors and NumPy scalars of one element count as numbers. Raises TypeError for anything else.
    """
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (int, float)):
        raise TypeError(f"metric {name!r} has the value {value!r} of type {type(value).__name__}; log a number instead")
    return str(int(value)) if isinstance(value, int) else repr(value)


def _encode(cells: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
