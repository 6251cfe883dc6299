"""The results of stages: one line of JSON each, on the disk as soon as it is known.

For run.py and its stages. Imports only the standard library.
"""

import json
import os
from pathlib import Path
from typing import Any


class Records:
    """A file of records, which several processes may add to at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, stage: str, name: str, **fields: Any) -> None:
        """Add a record: the stage, the name of what was tried, and other fields."""
        line = json.dumps({"stage": stage, "name": name, **fields}, default=str) + "\n"
        # One call of write per line, so that lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        """Return a stage's records so far. An incomplete line is left out."""
        return [record for record in read_lines(self.path) if record.get("stage") == stage]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines. Incomplete lines are left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
