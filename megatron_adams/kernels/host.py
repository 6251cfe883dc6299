"""The host backend: the kernel, compiled for this CPU at its first use, on OpenMP threads."""

import ctypes
from functools import cache

import torch

from megatron_adams.kernels.batch import (
    Batch,
    Scalars,
    kernel_arguments,
    update_gradients,
    update_table,
)
from megatron_adams.kernels.compile import host_library
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import PointerTable


@cache
def load(mode: Mode) -> ctypes.CDLL:
    """Return the library of a mode. If it is not in the cache, compile it first.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    return host_library(mode)


def run(batch: Batch, scalars: Scalars, table: PointerTable, *, only_count: bool = False) -> None:
    """Update `batch`, or only count the squares of its updates. Afterwards `table` describes it."""
    update_table(batch, table)
    launch(table, scalars, only_count=only_count)


def repeat(
    table: PointerTable, scalars: Scalars, *, grads: list[int], only_count: bool = False
) -> None:
    """Run again on what `table` describes, with the gradients at other addresses."""
    update_gradients(table, grads)
    launch(table, scalars, only_count=only_count)


def launch(table: PointerTable, scalars: Scalars, *, only_count: bool = False) -> None:
    """Run on what `table` describes, on torch's number of threads, at most one per chunk."""
    mode = scalars.kernel_of(table.mode)
    library = load(mode)
    arguments = kernel_arguments(table, scalars)
    num_threads = max(1, min(torch.get_num_threads(), table.num_chunks))
    entry_points = mode.count_entry_points if only_count else mode.entry_points
    for entry_point in entry_points:
        library[entry_point](*arguments.values, ctypes.c_int(num_threads))
