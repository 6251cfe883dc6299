"""A Python environment of its own for a test, and the package's wheel."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> Path:
    """Build the package's wheel into a folder, with the setuptools that is installed."""
    subprocess.run(
        [ROOT / "docker" / "build-wheel.sh", folder, "", "--no-build-isolation"],
        cwd="/",
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> Path:
    """Make a Python with nothing in it, also no pip; return its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python3.*/site-packages")
    return site_packages


def make_environment_with_wheel(folder: Path, *more: Path) -> Path:
    """Make a Python as a user has it: the package's wheel, and what is installed here.

    It also has the tests, without the package that lies beside them, and the packages in the
    folders `more`. A PYTHONPATH would come before all that: start it with none.

    Args:
        folder: a new one.
    Returns:
        The interpreter.
    """
    site_packages = make_environment(folder)
    pip(folder, "install", "--no-deps", build_wheel(folder / "dist"))
    tests = folder / "tests-alone"
    tests.mkdir()
    (tests / "tests").symlink_to(ROOT / "tests")
    # Behind the wheel, and without their own .pth files: the editable package's is one.
    others = [tests, *more, sysconfig.get_path("purelib")]
    (site_packages / "others.pth").write_text("".join(f"{each}\n" for each in others), "utf-8")
    return folder / "bin" / "python"


def run_without_checkout(
    python: Path, *words: object, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` of `make_environment_with_wheel` as one rank on a CPU, and wait for it.

    Args:
        variables: of its environment, beside those of this process.
    """
    return subprocess.run(
        [python, *map(str, words)],
        cwd="/",
        env={
            **os.environ,
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "LOCAL_WORLD_SIZE": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def told_in(output: str) -> list[Any]:
    """Return the values of the lines that say "told " and JSON."""
    return [json.loads(line[5:]) for line in output.splitlines() if line.startswith("told ")]


def pip(folder: Path, *words: object) -> None:
    """Run pip for an environment, without a network and without a configuration."""
    # With PYTHONPATH, pip would take what lies there for what is installed.
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("PIP_") and key != "PYTHONPATH"
    }
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "--quiet", *map(str, words)],
        env={**own, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"},
        check=True,
    )
