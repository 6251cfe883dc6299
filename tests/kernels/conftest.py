from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_adams.kernels import host
from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE
from tests.kernels.emulator import EmulatedDriver


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


@pytest.fixture(scope="package")
def compiled(request: pytest.FixtureRequest, _own_cache: None) -> None:
    """The host and the emulated kernel of each mode that a test asks for, side by side."""
    driver = EmulatedDriver()

    def load(mode):
        host.load(mode)
        driver.load(mode)

    asking = [item for item in request.session.items if "compiled" in item.fixturenames]
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, dict.fromkeys(item.callspec.params["mode"] for item in asking)))
