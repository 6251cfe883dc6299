"""A pytest plugin: the package runs under other defaults than those of the tests around it.

    python -m pytest -p tests.unit.other_defaults --default-dtype bfloat16 --default-device meta

A program may have set `torch.set_default_dtype` and `torch.set_default_device` for its own tensors.
Each public function of the package is called under these defaults, and what it calls is, too. Used
by test_defaults.py.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron_adams import kernels, optimizer, precision, update
from megatron_adams.checkpoint import conversion, files, from_adam
from megatron_adams.optimizer import guards

_MODULES = (conversion, files, from_adam, kernels, precision, update)
_CLASSES = (guards.UpdateGuards, optimizer.AdamS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--default-dtype", default="float32")
    parser.addoption("--default-device", default="cpu")


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Set the defaults, and put back those that were."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def pytest_configure(config: pytest.Config) -> None:
    dtype = getattr(torch, config.getoption("--default-dtype"))
    device = config.getoption("--default-device")

    def under_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with defaults(dtype, device):
                return function(*args, **kwargs)

        return call

    for owner in (*_MODULES, *_CLASSES):
        for name, value in list(vars(owner).items()):
            is_own = inspect.isfunction(value) and value.__module__.startswith("megatron_adams")
            if is_own and (name == "__init__" or not name.startswith("_")):
                setattr(owner, name, under_defaults(value))
