"""Loads and launches the benchmarks' own GPU kernels through the driver's bindings."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch


class Kernel:
    """An entry point of a cubin. Torch must have used the device in this thread before.

    Raises:
        DriverError: the driver refuses. The text has the driver's words.
    """

    def __init__(self, image: bytes, entry_point: str) -> None:
        # Imported here, because without a GPU the driver's bindings may be missing.
        from megatron_adams.kernels.cuda import call_driver

        self._call_driver = call_driver
        module = call_driver("cuModuleLoadData", image)
        self.function = call_driver("cuModuleGetFunction", module, entry_point.encode())

    def launch(self, num_blocks: int, num_threads: int, arguments: Sequence[Any]) -> None:
        """Launch on torch's current stream.

        Args:
            arguments: ctypes numbers and pointers, or ctypes structures, which are passed by value.
        """
        values = tuple(a if isinstance(a, ctypes.Structure) else a.value or 0 for a in arguments)
        types = tuple(None if isinstance(a, ctypes.Structure) else type(a) for a in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        grid, block = (num_blocks, 1, 1), (num_threads, 1, 1)
        self._call_driver(
            "cuLaunchKernel", self.function, *grid, *block, 0, stream, (values, types), 0
        )
