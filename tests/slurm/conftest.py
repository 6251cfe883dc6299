import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.local_slurm import INSTALL, PROGRAMS, LocalSlurm, what_is_missing


def install_where_wanted() -> None:
    """Install Slurm's packages, where CI or the user says that the machine is there for tests."""
    wanted = (
        os.environ.get("CI") == "true" or os.environ.get("MEGATRON_ADAMS_TEST_SLURM") == "install"
    )
    if wanted and os.geteuid() == 0 and not all(map(shutil.which, PROGRAMS)):
        run = subprocess.run([INSTALL], capture_output=True, text=True, timeout=240, check=False)
        if run.returncode:
            pytest.skip(f"Slurm could not be installed: {run.stderr.strip()[-500:]}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A Slurm of four virtual nodes, n1 to n4."""
    install_where_wanted()
    if missing := what_is_missing():
        pytest.skip(missing)
    # pytest's own folders have names that are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        slurm = LocalSlurm(Path(folder), ("n1", "n2", "n3", "n4"))
        yield slurm
        slurm.stop()
