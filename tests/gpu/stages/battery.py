"""Run all tests of tests/gpu, in parallel if pytest-xdist is installed.

If a CUDA error has made a process useless, it ends, and another one goes on
(tests/gpu/conftest.py).
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.gpu.stages.stage import Stage

ROOT = Path(__file__).resolve().parents[3]
# Most of the time goes into the oracle and the host compiler. Each process has one CPU for them.
NUM_PROCESSES = min(12, os.cpu_count() or 1)


def main() -> int:
    stage = Stage("battery")
    # The options in pyproject.toml are ignored, because the plugins that they need may be missing.
    options = ["-q", "-rfE", "--tb=short", "-c", os.devnull, "--rootdir", str(ROOT)]
    options += ["-p", "no:cacheprovider", f"--results={stage.results}"]
    # The method is "thread", because a process that waits for a hanging kernel handles no signal.
    options += ["--timeout=60", "--timeout-method=thread"]
    if stage.is_rehearsal:
        options += ["-p", "tests.gpu.rehearsal"]
    elif importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(NUM_PROCESSES), "--max-worker-restart=40"]
    return int(pytest.main([*options, str(ROOT / "tests" / "gpu")]))


if __name__ == "__main__":
    sys.exit(main())
