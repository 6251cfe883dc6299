from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE


@pytest.fixture(scope="package", autouse=True)
def _own_cache(kernel_cache: Path) -> Iterator[None]:
    """Kernels are compiled here, once for all tests of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(kernel_cache))
        yield


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """The oracle works on small tensors, for which more threads only cost time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
