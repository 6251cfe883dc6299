"""AddressSanitizer and UBSan have nothing to say about the kernels, and would say something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.cluster import REPO
from tests.kernels import sanitize

# Said at the first use of fibers (shim.h); what it fears are longjmp and exceptions.
_NOTICE = re.compile(r"==\d+==WARNING: ASan doesn't fully support makecontext/swapcontext .*\n")


def run(*arguments):
    """sanitize.py in a process of its own: Python itself must be started under the sanitizer."""
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("gcc has no libasan")
    return subprocess.run(
        [sys.executable, "-m", sanitize.__name__, *arguments],
        cwd=REPO,
        env={
            **os.environ,
            "LD_PRELOAD": library,
            # Python leaks; the rest of torch is not what is tested.
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_sanitizers_are_silent():
    done = run()
    assert _NOTICE.sub("", done.stderr) == ""
    assert done.stdout == f"{2 * len(sanitize.MODES) * sanitize.NUM_BATCHES} checks\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("vector loop: a vector over the end", "AddressSanitizer: heap-buffer-overflow"),
        ("alignment of grad dropped", "misaligned address"),
    ],
)
def test_sanitizers_report_what_is_planted(fault, finding):
    assert finding in run(fault).stderr
