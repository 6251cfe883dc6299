"""What adams is called in Megatron, and which names of Megatron's several modules here use.

Imports torch and kernels alone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_adams.kernels import BACKENDS

ADAMS = "adams"
KERNELS = ("auto", *BACKENDS)
DEFAULT_BETA2 = 0.95
# AdamW's in --adams-log-adamw-rms, where none is given: usual for large language models.
ADAMW_BETA2 = 0.95

# Megatron's keys of a param group for the scheduler.
RATES = ("max_lr", "min_lr")
# The checkpoint format of Megatron-FSDP.
FSDP_FORMAT = "fsdp_dtensor"
# The names on Megatron's command line. fp8 is e4m3, which Megatron (0.19) writes as uint8.
_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "fp8",
    torch.float8_e4m3fn: "fp8",
}


def dtype_name(dtype: torch.dtype | str) -> str:
    """Megatron's name of a dtype in its command line, where it may not have been converted yet."""
    return dtype if isinstance(dtype, str) else _DTYPE_NAMES.get(dtype, str(dtype))


def flag_of(name: str) -> str:
    """The flag of the command line that sets a field, without its value."""
    return f"--{name.replace('_', '-')}"


def rates_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rates between which Megatron's scheduler moves a param group."""
    return {key: group.get(key) for key in RATES}
