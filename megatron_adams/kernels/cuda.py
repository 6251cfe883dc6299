"""The kernel on a GPU: compiled by NVRTC at first use, launched through cuda.core.

`Driver` is the seam to the GPU: the tests put the same kernel, executed on the CPU, in its place.
"""

import ctypes
from functools import cache
from typing import Protocol

import cuda.core
import torch
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Stream

from megatron_adams.kernels.batch import Argument, Batch, Scalars, kernel_arguments, update_table
from megatron_adams.kernels.compile import cubin
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import PointerTable

# BLOCK in source/device.cu.
BLOCK = 256


class Driver(Protocol):
    """What launching takes."""

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""
        ...

    def launch(
        self,
        mode: Mode,
        entry_point: str,
        num_blocks: int,
        arguments: list[Argument],
        device: torch.device,
    ) -> None:
        """Launch blocks of BLOCK threads on the device's current stream."""
        ...


class CudaDriver:
    """The GPU."""

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def launch(
        self,
        mode: Mode,
        entry_point: str,
        num_blocks: int,
        arguments: list[Argument],
        device: torch.device,
    ) -> None:
        with torch.cuda.device(device):
            stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
            config = LaunchConfig(grid=num_blocks, block=BLOCK)
            kernel = _kernel(mode, entry_point, torch.cuda.current_device())
            # cuda.core takes a pointer as an int.
            values = [
                argument.value or 0 if isinstance(argument, ctypes.c_void_p) else argument
                for argument in arguments
            ]
            cuda.core.launch(stream, config, kernel, *values)


def arch_of(device: torch.device | int) -> str:
    """Return a device's architecture, as NVRTC names it: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def load(mode: Mode, device: torch.device) -> None:
    """Compile the kernel of a mode for a device, if it is not in the cache.

    Raises:
        CompileError: NVRTC is missing, or it fails.
    """
    cubin(mode, arch_of(device))


@cache
def _module(mode: Mode, device_index: int) -> ObjectCode:
    return ObjectCode.from_cubin(cubin(mode, arch_of(device_index)))


@cache
def _kernel(mode: Mode, entry_point: str, device_index: int) -> Kernel:
    # torch has made its context, the device's primary one, current: the module goes there.
    Device(device_index).set_current()
    return _module(mode, device_index).get_kernel(entry_point)


def run(batch: Batch, scalars: Scalars, table: PointerTable, driver: Driver) -> None:
    """Update `batch`; `table` describes it then."""
    update_table(batch, table, is_capturing=driver.is_capturing())
    launch(table, scalars, driver)


def launch(table: PointerTable, scalars: Scalars, driver: Driver) -> None:
    """Update what `table` describes by one launch, or, with scaled state, by three."""
    if table.num_chunks == 0:
        return
    arguments = kernel_arguments(table, scalars)
    for entry_point in table.mode.entry_points:
        per_tensor = entry_point == "adams_finish"
        num_blocks = -(-table.num_tensors // BLOCK) if per_tensor else table.num_chunks
        driver.launch(table.mode, entry_point, num_blocks, arguments.values, table.device)
