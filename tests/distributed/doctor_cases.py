"""What the ranks of test_doctor.py run: training whose kernels are recorded, and flag checks."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from megatron_adams.cpu_rehearsal import rehearsal_flags
from megatron_adams.doctor.kernels import modes_of
from megatron_adams.kernels import Mode
from megatron_adams.optimizer import adams
from tests.distributed import cases, fsdp_cases


def kernels(argv: str, fsdp: bool = False) -> tuple[list[str], list[str]]:
    """The names of the modes that the doctor says, and of those that the run asks kernels of."""
    from megatron_adams.megatron.training.launch_check import check_flags

    flags = [*cases.TINY_GPT.split(), *argv.split()]
    answer = check_flags([*flags, *rehearsal_flags(flags)], int(os.environ["WORLD_SIZE"]))
    assert answer["refused"] is None, answer
    asked: set[str] = set()
    select_backend = adams.select_backend

    def recorded(device: torch.device, mode: Mode, requested: str = "auto") -> str:
        asked.add(mode.name)
        return select_backend(device, mode, requested)

    adams.select_backend = recorded  # type: ignore[assignment]
    (fsdp_cases if fsdp else cases).train(argv)
    return sorted(mode.name for mode in modes_of(answer["arguments"])), sorted(asked)


def answers(commands: Sequence[str], world_size: int | None = None) -> list[dict[str, Any]]:
    """What each command line, behind a small model's, is answered with."""
    from megatron_adams.megatron.training.launch_check import check_flags

    base = cases.TINY_GPT.split()
    base += rehearsal_flags(base)
    return [check_flags([*base, *command.split()], world_size) for command in commands]
