"""What the stages in this folder share: arguments, and records of checks."""

import argparse
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu.records import Records


class Stage:
    """The process of a stage.

    Attributes:
        name: its name in the records.
        is_rehearsal: whether to do what is possible without a GPU.
        is_small: whether to do only what a sanitizer can follow.
        folder: the folder for other files.
        device: "cuda", or "cpu" in a rehearsal.
    """

    def __init__(self, name: str) -> None:
        parser = argparse.ArgumentParser(description=f"The stage {name} of tests/gpu/run.py.")
        parser.add_argument("--results", type=Path, required=True, help="records are added to it")
        parser.add_argument("--out", type=Path, required=True, help="a folder for other files")
        parser.add_argument("--seconds", type=float, default=600, help="when to have ended")
        parser.add_argument("--rehearse", action="store_true", help="without a GPU")
        parser.add_argument("--small", action="store_true", help="of smoke: for a sanitizer")
        args = parser.parse_args()
        self.name = name
        self.results = args.results
        self.is_rehearsal = args.rehearse
        self.is_small = args.small
        self.folder = args.out
        self.device = "cpu" if args.rehearse else "cuda"
        self._records = Records(args.results)
        self._end = time.monotonic() + args.seconds
        self._has_failed = False

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def record(self, name: str, **fields: Any) -> None:
        self._records.write(self.name, name, **fields)

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Record whether the body raises, together with what it puts into the dict."""
        found: dict[str, Any] = {}
        start = time.monotonic()
        try:
            yield found
        except Exception as exc:
            self._has_failed = True
            traceback.print_exc()
            found = {**found, "ok": False, "words": f"{type(exc).__name__}: {str(exc)[:400]}"}
        else:
            found = {"ok": True, **found}
        self.record(name, seconds=round(time.monotonic() - start, 3), **found)
        print(f"{name}: {'right' if found['ok'] else 'wrong'} {found.get('words', '')}", flush=True)

    @property
    def exit_code(self) -> int:
        return int(self._has_failed)
