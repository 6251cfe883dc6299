"""Libraries in C that stand in for those of a driver."""

import subprocess
from pathlib import Path

import pytest

from megatron_adams.kernels.compile import host_compiler


def compile_c(source: Path, library: Path, *flags: str) -> Path:
    """Compile a shared library; return it. Skips the test where there is no compiler.

    Args:
        flags: more of them for the compiler.
    """
    compiler = host_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [*compiler.command, "-x", "c", "-shared", "-fPIC", *flags, "-o", str(library)]
    subprocess.run([*command, str(source)], check=True)
    return library
