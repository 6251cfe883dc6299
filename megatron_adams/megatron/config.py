"""The optimizer configuration of adams: its fields, defaults and what it does not support.

Imports megatron.core alone, so that it serves users without megatron.training.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from megatron.core.optimizer import OptimizerConfig

from megatron_adams.kernels import BACKENDS
from megatron_adams.optimizer import AdamS

ADAMS = "adams"
KERNELS = ("auto", *BACKENDS)
DEFAULT_BETA2 = 0.95

_NOT_SUPPORTED = {
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "optimizer_cuda_graph": "--optimizer-cuda-graph",
}


@dataclasses.dataclass
class AdamSOptimizerConfig(OptimizerConfig):
    """Megatron's OptimizerConfig with adams's defaults, for users of megatron.core's API.

    betas and eps are `adam_beta1`, `adam_beta2` and `adam_eps`. A plain
    `OptimizerConfig(optimizer="adams")` works as well, but has Adam's beta2 of 0.999.
    """

    optimizer: str = ADAMS
    adam_beta2: float = DEFAULT_BETA2
    adams_bias_correction: bool = False
    """Divide the old and the new exp_avg by 1 - beta1^step (the authors' released code)."""

    adams_kernel: str = "auto"
    """What computes the step: one of KERNELS."""

    def __post_init__(self) -> None:
        # Before Megatron's own checks, which name other flags.
        check_config(self)
        super().__post_init__()

    def __repr__(self) -> str:
        # Megatron logs the configuration while `stated_as_adam` holds.
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown["optimizer"] = ADAMS
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @classmethod
    def from_config(cls, config: OptimizerConfig, **own_fields: Any) -> Self:
        """The same configuration, with adams's own fields."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(OptimizerConfig)}
        return cls(**values, **own_fields)


def check_config(config: Any) -> None:
    """Refuse what adams does not support, by the flag's name.

    Args:
        config: an OptimizerConfig, or Megatron's argument namespace, which has the same fields.
    Raises:
        ValueError: an unsupported flag is set, or a hyperparameter is out of range.
    """
    for name, flag in _NOT_SUPPORTED.items():
        if getattr(config, name):
            raise ValueError(
                f"{flag} with --optimizer {ADAMS}: not supported; remove the flag "
                f"(the optimizer then keeps fp32 exp_avg and main params on the GPU)"
            )
    AdamS.from_param_groups(
        [],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


@contextmanager
def stated_as_adam(config: Any) -> Iterator[None]:
    """Let Megatron read "adam" from `config.optimizer`, and restore "adams"."""
    config.optimizer = "adam"
    try:
        yield
    finally:
        config.optimizer = ADAMS
