"""What the ranks of test_gpu_memory.py run: training on a stand-in for the driver."""

import ctypes
import os
from pathlib import Path
from typing import Any

import pynvml
import torch

from tests.distributed import cases
from tests.unit.fake_nvml import NODE

MIB = 2**20


def used_bytes(iteration: int, rank: int) -> int:
    """What NVML says is in use on a rank's GPU when an iteration is logged."""
    return (100 * iteration + 7 * rank) * MIB


def train(argv: str, library: str | None, folder: str, lost_at: int | None = None) -> Any:
    """Train as `cases.train`, as if each rank had a GPU.

    Args:
        library: the driver's; None: there is none.
        folder: for what it answers.
        lost_at: the iteration from whose log on rank 1's GPU is lost.
    Returns:
        What `cases.train` returns; "scalars": what went to TensorBoard, {name: {iteration: value}};
        "wandb": the same of W&B.
    """
    from megatron_adams.megatron.training import gpu_memory

    rank = int(os.environ["RANK"])
    file = Path(folder) / f"rank{rank}.txt"
    os.environ["FAKE_NVML"] = str(file)
    if library is not None:
        pynvml.nvmlLib = ctypes.CDLL(library)
    # CUDA's form of the UUID, and not in NVML's order.
    gpu_memory.own_gpu = lambda: NODE[f"Uuid.{7 - rank}"].removeprefix("GPU-")
    torch.cuda.max_memory_allocated = lambda device=None: (30 + rank) * MIB
    torch.cuda.max_memory_reserved = lambda device=None: (40 - rank) * MIB

    def say(iteration: int) -> None:
        is_lost = lost_at is not None and rank == 1 and iteration >= lost_at
        answer = "error 15" if is_lost else f"{80 * 2**30} {used_bytes(iteration, rank)}"
        lines = {**NODE, f"Memory.{7 - rank}": answer}
        file.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))

    say(0)
    log = gpu_memory.log

    def at_log(args: Any, iteration: int, *, is_first: bool) -> None:
        say(iteration)
        log(args, iteration, is_first=is_first)

    gpu_memory.log = at_log
    return recorded(argv)


def recorded(argv: str) -> Any:
    """Train as `cases.train`, with "scalars" and "wandb" as `train`."""
    from megatron_adams.megatron.training import writers

    scalars: dict[str, dict[int, float]] = {}
    wandb: dict[str, dict[int, float]] = {}

    def is_of_memory(name: str) -> bool:
        # The update RMS goes to the same writers.
        return name != "adams/update-rms"

    class Writer:
        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            if is_of_memory(name):
                scalars.setdefault(name, {})[iteration] = value

    class WandbWriter:
        def log(self, values: dict[str, float], iteration: int) -> None:
            for name, value in values.items():
                if is_of_memory(name):
                    wandb.setdefault(name, {})[iteration] = value

    writers.get_tensorboard_writer = Writer
    writers.get_wandb_writer = WandbWriter
    return {**cases.train(argv), "scalars": scalars, "wandb": wandb}
