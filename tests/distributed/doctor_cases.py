"""What the ranks of test_doctor_modes.py run: training whose kernels are recorded."""

import torch

from megatron_adams import optimizer
from megatron_adams.kernels import Mode
from tests.distributed import cases, fsdp_cases


def kernels(argv: str, fsdp: bool = False) -> list[str]:
    """The names of the modes that the run has asked for kernels of, sorted."""
    names: set[str] = set()
    select_backend = optimizer.select_backend

    def recorded(device: torch.device, mode: Mode, requested: str = "auto") -> str:
        names.add(mode.name)
        return select_backend(device, mode, requested)

    optimizer.select_backend = recorded  # type: ignore[assignment]
    (fsdp_cases if fsdp else cases).train(argv)
    return sorted(names)
