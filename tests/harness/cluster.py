"""Run a function as N ranks of real Megatron-Core over gloo, each with a timeout.

A test names the function by a string, "package.module:function", and does not import it. The
function's module imports Megatron, which changes torch for its whole process, takes five seconds,
and starts threads that a fork would not take along. So the process of pytest must not import it:
the forked rank does, by the name. A name is checked where it is used, at a test's run, and
tests/unit/test_harness.py checks that every name in the tests is there.

What goes to the ranks, and what comes back, is data: arguments as JSON, results as a pickle.
"""

import copy
import fcntl
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO

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
    """Forks ranks from a process that has imported Megatron, which is a zygote; see zygote.py.

    Args:
        zygotes: a folder that all workers of this run of pytest share. They share the zygotes, too.
        folder: where logs and results are kept, a numbered subfolder for each run.
        flags: for zygote.py.
        extra_path: a folder of packages that the ranks find before the installed ones.
    """

    cpu_s: ClassVar[float] = 0.0
    """CPU seconds of all cases that clusters of this process have run."""
    zygote_pids: ClassVar[set[int]] = set()
    """The zygotes that this process has started. They run other workers' cases, too."""

    def __init__(
        self,
        zygotes: Path,
        folder: Path,
        flags: Sequence[str] = (),
        *,
        extra_path: Path | None = None,
    ) -> None:
        self._folder = folder
        self._num_runs = 0
        self._variables: dict[str, str] = {}
        path = [extra_path, REPO, os.environ.get("PYTHONPATH")]
        python_path = os.pathsep.join(str(entry) for entry in path if entry)
        world = hashlib.sha256(json.dumps([*flags, python_path]).encode()).hexdigest()[:16]
        self._zygote = zygotes / world
        self._zygote.mkdir(exist_ok=True)
        self._log = self._zygote / "log"
        with open(self._zygote / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that one worker starts it
            self._lines = self._connect() or self._start(flags, python_path)

    def _connect(self) -> TextIO | None:
        """Requests to the zygote, and answers from it, if there is one that runs."""
        folder = os.open(self._zygote, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                # The folder's own path may be too long: an address has at most 108 bytes.
                connection.connect(f"/proc/self/fd/{folder}/socket")
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            finally:
                os.close(folder)
            lines = connection.makefile("rw")  # keeps the connection open
        if not lines.readline():  # no greeting: the last worker that it served has just gone
            lines.close()
            return None
        return lines

    def _start(self, flags: Sequence[str], python_path: str) -> TextIO:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # which Megatron wants with tensor parallelism
            "LOCAL_WORLD_SIZE": "8",  # the rehearsal's devices, before a case says its number
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": python_path,
            "PYTHONUNBUFFERED": "1",
        }
        address = self._zygote / "socket"
        address.unlink(missing_ok=True)
        with open(self._log, "ab") as log:
            # What an import prints goes there, too.
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.harness.zygote", str(address), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPO,
                env=environment,
            )
        Cluster.zygote_pids.add(process.pid)
        while (lines := self._connect()) is None:
            if process.poll() is not None:
                raise self._ended()
            time.sleep(0.05)
        return lines

    def _answer(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> RuntimeError:
        log = self._log.read_text(errors="replace")
        return RuntimeError(f"the process that forks the ranks ended:\n{log[-4000:]}")

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
        print(json.dumps(request), file=self._lines, flush=True)
        answer = self._answer()
        Cluster.cpu_s += answer["cpu_s"]
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
        """Disconnect. The zygote ends when the last worker has done so."""
        self._lines.close()
