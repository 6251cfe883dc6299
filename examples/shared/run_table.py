"""A study's table: a CSV file with a row a run, on the disk before the next run starts.

A process that is killed while it writes leaves a line without its end. What reads cuts it off.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def whole_lines(path: Path) -> list[str]:
    """Read a file's lines; one that a killed process left without its end is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return whole.decode().splitlines()


def append(path: Path, text: str) -> None:
    """Append text to a file, and return when it is on the disk."""
    with path.open("a", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read all rows of a table; none if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    reader = csv.DictReader(whole_lines(path))
    rows = list(reader)
    if reader.fieldnames is not None and tuple(reader.fieldnames) != tuple(columns):
        raise ValueError(f"{path}: must have the columns of this version; give another --out")
    return rows


def append_row(path: Path, row: dict[str, Any], columns: Sequence[str]) -> None:
    """Append a run, whose keys are `columns`."""
    assert set(row) == set(columns), set(row) ^ set(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow(row)
    append(path, text.getvalue())
