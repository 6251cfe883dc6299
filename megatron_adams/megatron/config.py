"""The optimizer configuration of adams: its fields, their defaults, and Megatron's own one.

Imports megatron.core alone, so that it serves users without megatron.training.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.utils import log_single_rank
from typing_extensions import Self

from megatron_adams.megatron.names import ADAMS, DEFAULT_BETA2, KERNELS
from megatron_adams.megatron.refusals import check_config, check_values, graph_version_refusal

logger = logging.getLogger(__name__)

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
    `OptimizerConfig(optimizer="adams")` works as well, once `register()` was called; its beta2 of
    0.999, which is Adam's default, is replaced (`as_adams`).

    Fields may be set after construction, as Megatron-Bridge's recipes do: `finalize` checks them
    against each other. What builds the optimizer calls it: `get_megatron_optimizer`, `provide` and
    `adopt`.

    Raises:
        ValueError: a hyperparameter is out of range.
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

    adams_log_adamw_rms: float | None = None
    """AdamW's beta2: log the RMS of the update that AdamW would make, beside AdamS's."""

    adams_max_update_rms: float | None = None
    """Scale a tensor's update down where its RMS, before lr and weight decay, is larger."""

    adams_match_rms: float | None = None
    """Scale every tensor's update to this RMS, before lr and weight decay."""

    adams_nesterov: bool = False
    """Let the numerator of updates look ahead by one step."""

    optimizer_cuda_graph: bool = False
    """Megatron's own field, which came with 0.17: capture the optimizer's step."""

    override_opt_param_scheduler: bool = False
    """Load a checkpoint that was saved at other learning rates; Megatron's flag of this name."""

    use_checkpoint_opt_param_scheduler: bool = False
    """Go on at a checkpoint's learning rates, under Megatron-FSDP; Megatron's flag of this name."""

    def __post_init__(self) -> None:
        check_values(self)
        _derive(self)

    def finalize(self) -> None:
        """Check the fields against each other, and derive what Megatron derives from them.

        Megatron-Bridge calls it once all fields are set. It may be called again after a change.

        Raises:
            ValueError: two fields contradict each other, or one asks for what adams has not.
        """
        # versions.py imports what `register()` looks for first, with a better error.
        from megatron_adams.megatron.versions import CAPTURES_STEPS

        if self.optimizer_cuda_graph and not CAPTURES_STEPS:
            raise graph_version_refusal()
        # Before Megatron's own checks, which name other flags.
        check_config(self)
        post_init_as_adams(self, OptimizerConfig.__post_init__)

    def provide(
        self,
        model_chunks: Any,
        config_overrides: Any = None,
        use_gloo_process_groups: bool = True,
        pg_collection: Any = None,
    ) -> Any:
        """Build the optimizer. Megatron-Bridge calls this where a configuration has it.

        Args: those of Megatron's get_megatron_optimizer.

        Returns:
            What that returns, with AdamS in it.
        Raises:
            ValueError: as `finalize`, or the model cannot be trained with adams.
            UnsupportedMegatronError: as `register`.
        """
        from megatron_adams.megatron.register import register_core

        register_core()
        # By its module: `register_core` has exchanged it there.
        return megatron.core.optimizer.get_megatron_optimizer(
            self,
            model_chunks,
            config_overrides=config_overrides,
            use_gloo_process_groups=use_gloo_process_groups,
            pg_collection=pg_collection,
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


def as_adams(config: OptimizerConfig) -> AdamSOptimizerConfig:
    """Return a configuration as one of adams's, finalized.

    In a plain OptimizerConfig, a beta2 of 0.999 cannot be told from the default, which is made for
    Adam. It becomes the paper's 0.95, and a warning in the log says so.

    Args:
        config: whatever its `optimizer` is. One of adams's is returned itself; of any other class
            a copy is made.
    Raises:
        ValueError: as `AdamSOptimizerConfig.finalize`.
    """
    if not isinstance(config, AdamSOptimizerConfig):
        config = AdamSOptimizerConfig.from_config(
            config, optimizer=ADAMS, adam_beta2=_beta2_of(config)
        )
    config.finalize()
    return config


def _beta2_of(plain: OptimizerConfig) -> float:
    adams_default = OptimizerConfig.adam_beta2
    if plain.adam_beta2 != adams_default:
        return plain.adam_beta2
    log_single_rank(
        logger,
        logging.WARNING,
        f"{ADAMS}: adam_beta2={adams_default} is OptimizerConfig's default, made for Adam; "
        f"{DEFAULT_BETA2} is taken. To have {adams_default}, or no warning, give adam_beta2 in an "
        f"AdamSOptimizerConfig",
    )
    return DEFAULT_BETA2


def wrap_post_init(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let Megatron check a plain OptimizerConfig for adams as it checks one for Adam."""

    def __post_init__(self: Any) -> Any:
        if getattr(self, "optimizer", None) != ADAMS:
            return original(self)
        check_values(self)
        post_init_as_adams(self, original)
        return None

    return __post_init__


def post_init_as_adams(config: OptimizerConfig, original: Callable[[Any], None]) -> None:
    """Run Megatron's own checks of a configuration, and derive what it derives.

    Args:
        original: OptimizerConfig.__post_init__.
    """
    # Megatron's precision-aware optimizer is TransformerEngine's FusedAdam: its checks look for
    # that, and turn remainders off where it is not installed.
    with _stated(config, NO_PRECISION):
        original(config)
    _derive(config)


def _derive(config: OptimizerConfig) -> None:
    # The inner optimizer keeps the main params in the cases in which upstream's does
    # (optimizer_config.py, OptimizerConfig.__post_init__, 0.19).
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = (
        config.use_precision_aware_optimizer
        and (
            config.main_params_dtype != torch.float32
            or config.fp8_recipe in (None, "delayed")
            or config.optimizer_cpu_offload
        )
    )


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
    """Let Megatron build, for a configuration of adams, an Adam that any installation has.

    `adopt` then puts AdamS in its place. While this is active, Megatron reads "adam" from the
    configuration. The arguments that it would give to TransformerEngine's FusedAdam, or to the
    optimizer that offloads, are given to AdamS.
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
def _stated(config: OptimizerConfig, values: Mapping[str, Any]) -> Iterator[None]:
    """Let Megatron read other values from the configuration, and restore its own."""
    own = {name: getattr(config, name) for name in values}
    config.__dict__.update(values)
    try:
        yield
    finally:
        config.__dict__.update(own)
