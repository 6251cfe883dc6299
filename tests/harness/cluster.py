"""Run a function as N ranks of real Megatron-Core over gloo, each with a timeout.

A test names the function by a string, "package.module:function", and does not import it. The
function's module imports Megatron, which changes torch for its whole process, takes five seconds,
and starts threads that a fork would not take along. So the process of pytest must not import it:
the forked rank does, by the name. A name is checked where it is used, at a test's run, and
tests/unit/test_harness.py checks that every name in the tests is there.

What goes to the ranks, and what comes back, is data: arguments as JSON, results as a pickle.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What the ranks of a case returned, printed and exited with, by rank."""

    results: list[Any]
    logs: list[str]
    codes: list[int]

    @property
    def log(self) -> str:
        return "\n".join(self.logs)


class Cluster:
    """Forks ranks from a process that has imported Megatron; see zygote.py.

    Args:
        folder: where logs and results are kept, a numbered subfolder for each run.
        flags: for zygote.py.
        extra_path: a folder of packages that the ranks find before the installed ones.
    """

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str] = (),
        *,
        extra_path: Path | None = None,
    ) -> None:
        self._folder = folder
        self._num_runs = 0
        self._variables: dict[str, str] = {}
        path = [extra_path, REPO, os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # which Megatron wants with tensor parallelism
            "LOCAL_WORLD_SIZE": "8",  # the rehearsal's devices, before a case says its number
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry),
            "PYTHONUNBUFFERED": "1",
        }
        self._log = open(folder / "zygote.log", "ab")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.zygote", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=REPO,
            env=environment,
            text=True,
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            log = (self._folder / "zygote.log").read_text(errors="replace")
            raise RuntimeError(f"the process that forks the ranks ended:\n{log[-4000:]}")
        return line

    def with_variables(self, folder: Path, **variables: str) -> "Cluster":
        """Ranks of the same process that see other environment variables; not to be closed.

        Args:
            folder: where its logs and results are kept.
        """
        other = copy.copy(self)
        other._folder = folder
        other._num_runs = 0
        other._variables = variables
        return other

    def run(
        self,
        case: str,
        num_ranks: int = 1,
        *,
        timeout_s: float = 120.0,
        check: bool = True,
        **kwargs: Any,
    ) -> Outcome:
        """Run `module:function` as `num_ranks` ranks and return what each returned.

        Raises:
            AssertionError: with the end of the logs, if a rank failed and `check` is set, or if
                the timeout passed.
        """
        folder = self.new_folder(case.rpartition(":")[2])
        request = {
            "case": case,
            "num_ranks": num_ranks,
            "timeout_s": timeout_s,
            "folder": str(folder),
            "variables": self._variables,
            "kwargs": kwargs,
        }
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._answer())
        logs = [
            (folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(num_ranks)
        ]
        ends = "\n".join(f"--- rank {i}:\n{log[-3000:]}" for i, log in enumerate(logs))
        ends = f"{ends}\n--- whole logs: {folder}"
        assert not answer["timed_out"], f"{case}: no end within {timeout_s} s\n{ends}"
        if check:
            assert not any(answer["codes"]), f"{case}: exit codes {answer['codes']}\n{ends}"
        results = []
        for rank in range(num_ranks):
            path = folder / f"rank{rank}.pkl"
            results.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        return Outcome(results=results, logs=logs, codes=answer["codes"])

    def new_folder(self, name: str) -> Path:
        """An empty folder that lasts as long as this cluster."""
        self._num_runs += 1
        folder = self._folder / f"{self._num_runs:03d}-{name}"
        folder.mkdir()
        return folder

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()
        self._log.close()
