"""A plugin of pytest that tries tests of this folder out without a GPU: `-p tests.gpu.rehearsal`.

The CPU is in the GPU's place (megatron_adams/cpu_rehearsal), and the emulator of tests/kernels
in the driver's. This shows that the tests run to their end; of a GPU it shows nothing.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from emulator import EmulatedDriver

from megatron_adams import cpu_rehearsal, kernels
from megatron_adams.kernels import cuda
from megatron_adams.optimizer import adams

# What needs no more than that, and not long.
_REHEARSED = (
    *("test_adams_on_gpu", "test_nan_places", "test_foreach_gives", "test_host_and_gpu"),
    *("test_thousands_of_tensors", "test_the_current_stream", "test_factors_have"),
)


def _backend(device: torch.device, mode: kernels.Mode, requested: str = "auto") -> str:
    """As it is asked for: the device of a tensor does not say which one it stands for."""
    return "host" if requested == "auto" else requested


def pytest_configure() -> None:
    cpu_rehearsal.install(force=True)
    torch.cuda._sleep = lambda clocks: None
    torch.cuda.set_sync_debug_mode = lambda mode: None
    cuda.CudaDriver = EmulatedDriver
    kernels._check_device = lambda backend, device: None
    adams.select_backend = _backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(name in item.nodeid for name in _REHEARSED):
            item.add_marker(pytest.mark.skip(reason="not run: no GPU"))
