from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_adams.kernels import host
from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE
from megatron_adams.kernels.modes import ALL_MODES
from tests.kernels.emulator import EmulatedDriver


@pytest.fixture(scope="package", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled here, once for all tests of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """The oracle works on small tensors, for which more threads only cost time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="package")
def compiled(_own_cache: None) -> None:
    """The host and the emulated kernel of every mode, compiled side by side."""
    driver = EmulatedDriver()

    def load(mode):
        host.load(mode)
        driver.load(mode)

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, ALL_MODES))
