"""What a program has set for its own tensors changes nothing in the package.

`torch.set_default_device`, `torch.set_default_dtype`: every tensor that the package makes for
itself says its device and dtype.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

from megatron_adams import AdamS
from tests.harness.thinning import thinned
from tests.unit.other_defaults import defaults

ROOT = Path(__file__).parents[2]

# torch's own list of the functions that make tensors on the default device.
FACTORIES = {function.__name__ for function in _device_constructors()}


def without_device_or_dtype(source: str) -> list[str]:
    """The calls of torch's factories in a module that leave device or dtype to a default."""
    tree = ast.parse(source)
    aliases = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                pass
            case ast.Call(func=ast.Name(id=alias)) if alias in aliases:
                name = aliases[alias]
            case _:
                continue
        missing = {"device", "dtype"} - {keyword.arg for keyword in node.keywords}
        if name in FACTORIES and missing:
            found.append(
                f"line {node.lineno}: torch.{name} without {' and '.join(sorted(missing))}"
            )
    return found


def test_every_tensor_that_the_package_makes_says_its_device_and_dtype():
    paths = sorted((ROOT / "megatron_adams").rglob("*.py"))
    assert len(paths) > 20
    found = {
        str(path.relative_to(ROOT)): lines
        for path in paths
        if (lines := without_device_or_dtype(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("torch.zeros(3)", "torch.zeros without device and dtype"),
        ("torch.tensor([1.0], device=x.device)", "torch.tensor without dtype"),
        ("torch.full((2,), 1.0, dtype=torch.float32)", "torch.full without device"),
        ("from torch import ones as o\no(3)", "torch.ones without device and dtype"),
    ],
)
def test_planted_factory_is_found(source, missing):
    (line,) = without_device_or_dtype(source)
    assert line.endswith(missing)


def test_factory_with_both_is_not_reported():
    assert without_device_or_dtype("torch.zeros(3, dtype=torch.int64, device='cpu')") == []
    assert without_device_or_dtype("torch.zeros_like(x)\nx.zeros(3)") == []


@pytest.mark.parametrize("kernel", ["host", "foreach"])
def test_step_under_another_default_device(kernel):
    param = torch.nn.Parameter(torch.zeros(8))
    param.grad = torch.ones(8)
    optimizer = AdamS([param], lr=0.1, kernel=kernel)
    with torch.device("meta"):
        optimizer.step()
    assert param.detach().tolist() == pytest.approx([-0.0447] * 8, abs=1e-4)


@pytest.mark.parametrize("kernel", ["host", "foreach"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_capped_step_under_another_default_dtype(kernel, dtype):
    param = torch.nn.Parameter(torch.zeros(8))
    param.grad = torch.ones(8)
    optimizer = AdamS([param], lr=0.1, max_update_rms=0.3, kernel=kernel)
    with defaults(dtype, "cpu"):
        optimizer.step()
    assert param.detach().tolist() == pytest.approx([-0.03] * 8, abs=1e-6)


# The files whose cases a step, its state and its checkpoints are tested by.
CASES = (
    "test_optimizer.py",
    "test_optimizer_storage.py",
    "test_optimizer_kernels.py",
    "test_guards.py",
    "test_capturable.py",
)


@pytest.mark.parametrize("dtype", thinned(["bfloat16", "float64"], full=("float64",)))
def test_all_cases_of_the_optimizer_pass_under_other_defaults(dtype):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "tests.unit.other_defaults", "--default-dtype", dtype]
    command += ["--default-device", "meta"]
    done = subprocess.run(
        [*command, *(f"tests/unit/{name}" for name in CASES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
