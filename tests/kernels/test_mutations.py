"""Each planted fault is caught by the checks that the tests run."""

import subprocess
import sys

import pytest

from tests.harness.cluster import REPO
from tests.kernels import mutate


@pytest.mark.timeout(600)
def test_every_planted_fault_is_caught():
    # A process of its own: this one may have started OpenMP threads, and could not fork then.
    done = subprocess.run(
        [sys.executable, "-m", mutate.__name__],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(mutate.faults_of_this_machine())
    assert count >= 100
    assert f"{count} of {count} faults are caught." in done.stdout
