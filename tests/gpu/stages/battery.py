"""All tests of tests/gpu: side by side where pytest-xdist is, one after another elsewhere.

A process that a CUDA error has made useless ends, and another goes on (tests/gpu/conftest.py).
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.gpu.stages.stage import Stage

ROOT = Path(__file__).resolve().parents[3]
# Most of the time goes into the oracle and the host compiler, which have a CPU each.
NUM_PROCESSES = min(12, os.cpu_count() or 1)


def main() -> int:
    stage = Stage("battery")
    # The options and plugins of pyproject.toml are left aside: they may not be there.
    options = ["-q", "-rfE", "--tb=short", "-c", os.devnull, "--rootdir", str(ROOT)]
    options += ["-p", "no:cacheprovider", f"--results={stage.results}"]
    # A thread's, because no signal reaches Python in a process that waits for a kernel that hangs.
    options += ["--timeout=60", "--timeout-method=thread"]
    if stage.is_rehearsal:
        options += ["-p", "tests.gpu.rehearsal"]
    elif importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(NUM_PROCESSES), "--max-worker-restart=40"]
    return int(pytest.main([*options, str(ROOT / "tests" / "gpu")]))


if __name__ == "__main__":
    sys.exit(main())
