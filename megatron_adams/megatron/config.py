"""The optimizer configuration of adams: its fields, and their defaults.

Imports megatron.core alone, so that it serves users without megatron.training.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_adams.megatron.names import ADAMS, DEFAULT_BETA2, KERNELS
from megatron_adams.megatron.refusals import check_config

# The precision-aware optimizer's fields, at values at which Megatron has no opinion of them.
NO_PRECISION = {
    "use_precision_aware_optimizer": False,
    "main_grads_dtype": torch.float32,
    "main_params_dtype": torch.float32,
    "exp_avg_dtype": torch.float32,
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

    adams_cautious: bool = False
    """Leave an element where its update would move it against its gradient."""

    adams_from_adam: bool = False
    """Take over an AdamW checkpoint: momentum and main params; exp_avg_sq is dropped."""

    adams_kernel: str = KERNELS[0]
    """What computes the step: one of KERNELS."""

    adams_max_update_rms: float | None = None
    """Scale a tensor's update down where its RMS, before lr and weight decay, is larger."""

    adams_match_rms: float | None = None
    """Scale every tensor's update to this RMS, before lr and weight decay."""

    adams_nesterov: bool = False
    """Let the numerator of updates look ahead by one step."""

    override_opt_param_scheduler: bool = False
    """Load a checkpoint that was saved at other learning rates; Megatron's flag of this name."""

    use_checkpoint_opt_param_scheduler: bool = False
    """Go on at a checkpoint's learning rates, under Megatron-FSDP; Megatron's flag of this name."""

    def __post_init__(self) -> None:
        # Before Megatron's own checks, which name other flags.
        check_config(self)
        # Megatron's precision-aware optimizer is TransformerEngine's FusedAdam: its checks look for
        # that, and turn remainders off where it is not installed.
        with _stated(self, NO_PRECISION):
            super().__post_init__()
        # The inner optimizer keeps the main params in the cases in which upstream's does
        # (optimizer_config.py, OptimizerConfig.__post_init__, 0.19).
        self.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = (
            self.use_precision_aware_optimizer
            and (
                self.main_params_dtype != torch.float32
                or self.fp8_recipe in (None, "delayed")
                or self.optimizer_cpu_offload
            )
        )

    def __repr__(self) -> str:
        # Megatron logs the configuration while `stated_as_adam` holds.
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown["optimizer"] = ADAMS
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @classmethod
    def from_config(cls, config: OptimizerConfig, **own_fields: Any) -> Self:
        """The same configuration, with adams's own fields, or others, as given."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(OptimizerConfig)}
        return cls(**{**values, **own_fields})


# adams's own flags, by their fields, and what they are where they were not given. The last one is
# Megatron's `store_param_remainders` in a configuration.
OWN_FLAGS: dict[str, Any] = {
    **{
        field.name: field.default
        for field in dataclasses.fields(AdamSOptimizerConfig)
        if field.name.startswith("adams_")
    },
    "adams_no_param_remainders": False,
}


@contextmanager
def built_as_adam(config: AdamSOptimizerConfig) -> Iterator[None]:
    """As `stated_as_adam`, for Megatron to build an Adam that any installation has.

    The arguments that it would give to TransformerEngine's FusedAdam, or to the optimizer that
    offloads, are given to AdamS.
    """
    names = ("use_precision_aware_optimizer", "optimizer_cpu_offload", "optimizer_cuda_graph")
    with _stated(config, dict.fromkeys(names, False)), stated_as_adam(config):
        yield


@contextmanager
def stated_as_adam(config: Any) -> Iterator[None]:
    """Let Megatron read "adam" from `config.optimizer`, and restore "adams"."""
    config.optimizer = "adam"
    try:
        yield
    finally:
        config.optimizer = ADAMS


@contextmanager
def _stated(config: AdamSOptimizerConfig, values: Mapping[str, Any]) -> Iterator[None]:
    """Let Megatron read other values from the configuration, and restore its own."""
    own = {name: getattr(config, name) for name in values}
    config.__dict__.update(values)
    try:
        yield
    finally:
        config.__dict__.update(own)
