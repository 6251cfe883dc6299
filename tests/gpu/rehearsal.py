"""A pytest plugin that tries out tests of this folder without a GPU: `-p tests.gpu.rehearsal`.

The CPU stands in for the GPU (megatron_adams/cpu_rehearsal/), and the emulator of tests/kernels
for the driver. This shows that the tests run to their end. It shows nothing about a GPU.
"""

import pytest
import torch

from megatron_adams import cpu_rehearsal, kernels
from megatron_adams.kernels import cuda
from megatron_adams.optimizer import adams
from tests.kernels.emulator import EmulatedDriver

# The tests that need no more than that, and are short.
_REHEARSED = (
    *("test_adams_on_gpu", "test_nan_places", "test_foreach_gives", "test_host_and_gpu"),
    *("test_thousands_of_tensors", "test_the_current_stream", "test_factors_have"),
)


def _backend(device: torch.device, mode: kernels.Mode, requested: str = "auto") -> str:
    """Return the backend asked for: a tensor's device does not show which one it stands for."""
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
