"""AdamS(torch.optim.Optimizer), and what the rest of the package asks it.

adams.py has the class: constructor, groups, step and state dicts. hyperparameters.py refuses what a
user may not give, plan.py sorts a step's tensors into launches, guards.py counts updates and scales
them, and tensors.py knows the tensors that are not plain. Imports torch, kernels, precision and
update; it must not import Megatron, TransformerEngine or Apex.
"""

from megatron_adams.optimizer.adams import AdamS
from megatron_adams.optimizer.hyperparameters import (
    HYPERPARAMETERS,
    SWITCHES,
    check_guards,
    check_hyperparameters,
)
from megatron_adams.optimizer.tensors import fp8_memory, is_quantized, local_part

__all__ = [
    "HYPERPARAMETERS",
    "SWITCHES",
    "AdamS",
    "check_guards",
    "check_hyperparameters",
    "fp8_memory",
    "is_quantized",
    "local_part",
]
