"""The cuda backend: NVRTC compiles the kernel at its first use; it runs on torch's current stream.

This module loads and launches kernels through the driver's bindings (cuda.bindings), which come
with torch's CUDA builds; compile.py compiles through those of NVRTC. `Driver` is the seam to the
GPU: the tests replace it by one that executes the same kernel on the CPU.
"""

from functools import cache
from typing import Any, Protocol

import torch
from cuda.bindings import driver as bindings

from megatron_adams.kernels.batch import (
    Argument,
    Batch,
    Scalars,
    kernel_arguments,
    update_gradients,
    update_table,
)
from megatron_adams.kernels.compile import CompileError, cubin
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import PointerTable
from megatron_adams.kernels.tuning import Tuning, tuning_of


class Driver(Protocol):
    """What a launch needs of the GPU and its driver."""

    def is_capturing(self, device: torch.device) -> bool:
        """Whether the device's current stream is being captured into a CUDA graph."""
        ...

    def tuning(self, mode: Mode) -> Tuning:
        """Return the constants that a mode's kernel is compiled with."""
        ...

    def launch(
        self,
        mode: Mode,
        entry_point: str,
        num_blocks: int,
        arguments: list[Argument],
        device: torch.device,
    ) -> None:
        """Launch blocks of `tuning(mode).block` threads on the device's current stream."""
        ...


class DriverError(RuntimeError):
    """The CUDA driver has refused a call."""


class CudaDriver:
    """The `Driver` of a real GPU.

    Args:
        tuning: the constants for all modes. None: each mode's own.
    Raises:
        DriverError: the driver refuses; with its own words.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning

    def tuning(self, mode: Mode) -> Tuning:
        return self._tuning or tuning_of(mode)

    def is_capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
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
            index = torch.cuda.current_device()
            # A thread that has not called CUDA yet has no context.
            call_driver("cuCtxSetCurrent", _context(index))
            tuning = self.tuning(mode)
            kernel = _kernel(mode, tuning, entry_point, index)
            stream = torch.cuda.current_stream().cuda_stream
            parameters = (
                # A null pointer's value is None.
                tuple(0 if arg.value is None else arg.value for arg in arguments),
                tuple(type(argument) for argument in arguments),
            )
            grid, block = (num_blocks, 1, 1), (tuning.block, 1, 1)
            call_driver("cuLaunchKernel", kernel, *grid, *block, 0, stream, parameters, 0)


def call_driver(function: str, *arguments: object) -> Any:
    """Call a function of the driver by its name; return its result, if it has one.

    Raises:
        DriverError: the driver refuses; with its own words.
    """
    error, *result = getattr(bindings, function)(*arguments)
    if error != bindings.CUresult.CUDA_SUCCESS:
        _, words = bindings.cuGetErrorString(error)
        raise DriverError(f"{function}: {error.name}, {words.decode()}")
    return result[0] if result else None


def arch_of(device: torch.device | int) -> str:
    """Return a device's architecture as NVRTC names it, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def load(mode: Mode, device: torch.device) -> None:
    """Load the kernel of a mode on a device. If it is not in the cache, compile it first.

    Raises:
        CompileError: NVRTC is missing or fails, or the driver does not load what NVRTC made.
    """
    tuning = tuning_of(mode)
    names = mode.entry_points + (mode.count_entry_points if mode.is_guarded else ())
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        try:
            call_driver("cuCtxSetCurrent", _context(index))
            for entry_point in names:
                _kernel(mode, tuning, entry_point, index)
        except DriverError as exc:
            raise CompileError(
                f"the driver does not load the kernel {mode.name} for {device}: {exc}; update the "
                "driver, or install a torch for the CUDA version that it supports"
            ) from exc


@cache
def _context(index: int) -> Any:
    """Return the device's primary context, which torch uses."""
    return call_driver("cuDevicePrimaryCtxRetain", call_driver("cuDeviceGet", index))


@cache
def _module(mode: Mode, tuning: Tuning, index: int) -> Any:
    return call_driver("cuModuleLoadData", cubin(mode, arch_of(index), tuning=tuning))


@cache
def _kernel(mode: Mode, tuning: Tuning, entry_point: str, index: int) -> Any:
    return call_driver("cuModuleGetFunction", _module(mode, tuning, index), entry_point.encode())


def run(
    batch: Batch,
    scalars: Scalars,
    table: PointerTable,
    driver: Driver,
    *,
    only_count: bool = False,
) -> None:
    """Update `batch`, or only count the squares of its updates. Afterwards `table` describes it."""
    update_table(batch, table, is_capturing=driver.is_capturing(batch.device))
    launch(table, scalars, driver, only_count=only_count)


def repeat(
    table: PointerTable,
    scalars: Scalars,
    driver: Driver,
    *,
    grads: list[int],
    only_count: bool = False,
) -> None:
    """Run again on what `table` describes, with the gradients at other addresses."""
    if table.grads != grads:
        update_gradients(table, grads, is_capturing=driver.is_capturing(table.device))
    launch(table, scalars, driver, only_count=only_count)


def launch(
    table: PointerTable, scalars: Scalars, driver: Driver, *, only_count: bool = False
) -> None:
    """Run on what `table` describes: one launch, or three if scaled state is updated."""
    if table.num_chunks == 0:
        return
    if table.device.type == "cuda":
        stream = torch.cuda.current_stream(table.device)
        # For a graph, its owner keeps the table.
        if not table.is_of(stream) and not driver.is_capturing(table.device):
            table.record_stream(stream)
    arguments = kernel_arguments(table, scalars)
    mode = scalars.kernel_of(table.mode)
    entry_points = mode.count_entry_points if only_count else mode.entry_points
    for entry_point in entry_points:
        per_tensor = entry_point == "adams_finish"
        num_threads = driver.tuning(mode).block
        num_blocks = -(-table.num_tensors // num_threads) if per_tensor else table.num_chunks
        driver.launch(mode, entry_point, num_blocks, arguments.values, table.device)
