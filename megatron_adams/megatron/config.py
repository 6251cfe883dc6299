"""The optimizer configuration of adams: its fields, defaults and what it does not support.

Imports megatron.core alone, so that it serves users without megatron.training.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from megatron.core.optimizer import OptimizerConfig

from megatron_adams.kernels import BACKENDS
from megatron_adams.megatron import cuda_graph
from megatron_adams.optimizer import AdamS, check_guards

ADAMS = "adams"
KERNELS = ("auto", *BACKENDS)
DEFAULT_BETA2 = 0.95

# As Megatron's command line names them; fp8 is e4m3, which Megatron (0.19) writes as uint8.
_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "fp8",
    torch.float8_e4m3fn: "fp8",
}
# Megatron's keys of a param group for the scheduler.
RATES = ("max_lr", "min_lr")
# The precision-aware optimizer's fields, at values at which Megatron has no opinion of them.
NO_PRECISION = {
    "use_precision_aware_optimizer": False,
    "main_grads_dtype": torch.float32,
    "main_params_dtype": torch.float32,
    "exp_avg_dtype": torch.float32,
}
_PRECISIONS = {
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
    "exp_avg_dtype": ("fp32", "bf16", "fp16", "fp8"),
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

    adams_from_adam: bool = False
    """Take over an AdamW checkpoint: momentum and main params; exp_avg_sq is dropped."""

    adams_kernel: str = "auto"
    """What computes the step: one of KERNELS."""

    adams_max_update_rms: float | None = None
    """Scale a tensor's update down where its RMS, before lr and weight decay, is larger."""

    adams_match_rms: float | None = None
    """Scale every tensor's update to this RMS, before lr and weight decay."""

    override_opt_param_scheduler: bool = False
    """Load a checkpoint that was saved at other learning rates; Megatron's flag of this name."""

    use_checkpoint_opt_param_scheduler: bool = False
    """Go on at a checkpoint's learning rates, under Megatron-FSDP; Megatron's flag of this name."""

    def __post_init__(self) -> None:
        # Before Megatron's own checks, which name other flags.
        check_config(self)
        # Megatron's precision-aware optimizer is TransformerEngine's FusedAdam: its checks look for
        # that, and turn remainders off where it is not installed.
        precision = {name: getattr(self, name) for name in NO_PRECISION}
        self.__dict__.update(NO_PRECISION)
        super().__post_init__()
        self.__dict__.update(precision)
        # As upstream (optimizer_config.py, OptimizerConfig.__post_init__, 0.19): does the inner
        # optimizer keep the main params?
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


def check_config(config: Any) -> None:
    """Refuse what adams does not support, by the flag's name.

    Args:
        config: an OptimizerConfig, or Megatron's argument namespace, which has the same fields.
    Raises:
        ValueError: an unsupported flag is set, or a hyperparameter is out of range.
    """
    _check_precision(config)
    _check_offload(config)
    _check_guards(config)
    cuda_graph.check_config(config)
    _check_hyperparameters(config)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Megatron's name of a dtype in its command line, where it may not have been converted yet."""
    return dtype if isinstance(dtype, str) else _DTYPE_NAMES.get(dtype, str(dtype))


def other_rates(current: Mapping[str, Any], saved: Mapping[str, Any]) -> ValueError:
    """The error of a checkpoint whose param group has other learning rates than the run's."""
    own, theirs = ({key: group.get(key) for key in RATES} for group in (current, saved))
    return ValueError(
        f"the run's learning rates {own} are not the checkpoint's {theirs}; add "
        f"--override-opt_param-scheduler to go on from its momentum at the run's, or give --lr and "
        f"--min-lr as it has them"
    )


def no_exp_avg_sq(dtype: torch.dtype | str) -> ValueError:
    """The error of a dtype given for exp_avg_sq."""
    return ValueError(
        f"--exp-avg-sq-dtype {dtype_name(dtype)} with --optimizer {ADAMS}: {ADAMS} keeps no "
        f"exp_avg_sq; remove the flag"
    )


def _check_precision(config: Any) -> None:
    """Refuse dtypes that the precision-aware optimizer does not have, or that need it.

    Raises:
        ValueError: naming the flag.
    """
    given = {name: dtype_name(getattr(config, name)) for name in _PRECISIONS}
    flags = {name: f"--{name.replace('_', '-')} {given[name]}" for name in _PRECISIONS}
    if dtype_name(config.exp_avg_sq_dtype) != "fp32":
        raise no_exp_avg_sq(config.exp_avg_sq_dtype)
    for name, allowed in _PRECISIONS.items():
        if given[name] not in allowed:
            raise ValueError(
                f"{flags[name]} with --optimizer {ADAMS}: must be one of {', '.join(allowed)}"
            )
        if given[name] != "fp32" and not config.use_precision_aware_optimizer:
            raise ValueError(
                f"{flags[name]} with --optimizer {ADAMS}: belongs to the precision-aware "
                f"optimizer; add --use-precision-aware-optimizer, or remove the flag"
            )
    if config.use_precision_aware_optimizer and not config.use_distributed_optimizer:
        raise ValueError(
            f"--use-precision-aware-optimizer with --optimizer {ADAMS}: needs the distributed "
            f"optimizer; add --use-distributed-optimizer"
        )
    for name, needed in (("main_grads_dtype", ("bf16",)), ("main_params_dtype", ("bf16", "fp16"))):
        if given[name] != "fp32" and not any(getattr(config, flag) for flag in needed):
            raise ValueError(
                f"{flags[name]} with --optimizer {ADAMS}: concerns training in "
                f"{' or '.join(needed)}; add --{' or --'.join(needed)}, or remove the flag"
            )


def _check_offload(config: Any) -> None:
    """Refuse flags of --optimizer-cpu-offload that say nothing, or what adams does not do.

    Raises:
        ValueError: naming the flag.
    """
    if config.use_torch_optimizer_for_cpu_offload:
        raise ValueError(
            f"--use-torch-optimizer-for-cpu-offload with --optimizer {ADAMS}: torch has no "
            f"{ADAMS}; remove the flag (the CPU's part runs {ADAMS}'s own CPU kernel)"
        )
    fraction = config.optimizer_offload_fraction
    if not config.optimizer_cpu_offload:
        given = {
            # The defaults of OptimizerConfig and of the command line.
            f"--optimizer-offload-fraction {fraction}": fraction not in (0.0, 1.0),
            "--overlap-cpu-optimizer-d2h-h2d": config.overlap_cpu_optimizer_d2h_h2d,
            "--no-pin-cpu-grads": not config.pin_cpu_grads,
            "--no-pin-cpu-params": not config.pin_cpu_params,
        }
        for flag, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"{flag} with --optimizer {ADAMS}: belongs to --optimizer-cpu-offload; add "
                    f"that, or remove the flag"
                )
        return
    if not config.use_precision_aware_optimizer:
        raise ValueError(
            f"--optimizer-cpu-offload with --optimizer {ADAMS}: Megatron offloads the "
            f"precision-aware optimizer only; add --use-precision-aware-optimizer"
        )
    if not 0 < fraction <= 1:
        raise ValueError(
            f"--optimizer-offload-fraction {fraction} with --optimizer {ADAMS}: must be in (0, 1]; "
            f"remove --optimizer-cpu-offload to offload nothing"
        )
    kernel = getattr(config, "adams_kernel", KERNELS[0])
    if kernel == "cuda" and fraction == 1:
        raise ValueError(
            "--adams-kernel cuda with --optimizer-cpu-offload: no param stays on the GPU; give "
            "--optimizer-offload-fraction below 1, or remove one of the flags"
        )


def guards_of(config: Any) -> dict[str, float]:
    """The cap or the target of the update RMS, by its flag; Megatron's own config has neither."""
    flags = {
        "--adams-max-update-rms": "adams_max_update_rms",
        "--adams-match-rms": "adams_match_rms",
    }
    values = {flag: getattr(config, name, None) for flag, name in flags.items()}
    return {flag: value for flag, value in values.items() if value is not None}


# Field -> AdamS's argument.
_HYPERPARAMETERS = {
    "lr": "lr",
    "min_lr": "lr",
    "decoupled_lr": "lr",
    "decoupled_min_lr": "lr",
    "lr_warmup_init": "lr",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_eps": "eps",
    "weight_decay": "weight_decay",
    "start_weight_decay": "weight_decay",
    "end_weight_decay": "weight_decay",
}


def _check_hyperparameters(config: Any) -> None:
    """Refuse numbers that AdamS refuses.

    Raises:
        ValueError: naming the flag.
    """
    for name, argument in _HYPERPARAMETERS.items():
        value = getattr(config, name, None)
        if value is None:
            continue  # Megatron's own default, or only one of its two configurations has it.
        # A beta is looked at beside a valid other one.
        betas = {"adam_beta1": (value, DEFAULT_BETA2), "adam_beta2": (0.9, value)}
        try:
            AdamS.from_param_groups([], **{argument: betas.get(name, value)})
        except ValueError as exc:
            flag = f"--{name.replace('_', '-')} {value}"
            raise ValueError(f"{flag} with --optimizer {ADAMS}: {exc}") from exc


def _check_guards(config: Any) -> None:
    """Refuse a cap or a target of the update RMS that is none.

    Raises:
        ValueError: naming the flag.
    """
    given = guards_of(config)
    words = " ".join(f"{flag} {value}" for flag, value in given.items())
    try:
        check_guards(given.get("--adams-max-update-rms"), given.get("--adams-match-rms"))
    except ValueError as exc:
        raise ValueError(f"{words} with --optimizer {ADAMS}: {exc}") from exc


@contextmanager
def built_as_adam(config: "AdamSOptimizerConfig") -> Iterator[None]:
    """As `stated_as_adam`, for Megatron to build an Adam that any installation has.

    The arguments that it would give to TransformerEngine's FusedAdam, or to the optimizer that
    offloads, are given to AdamS.
    """
    names = ("use_precision_aware_optimizer", "optimizer_cpu_offload", "optimizer_cuda_graph")
    stated = {name: getattr(config, name) for name in names}
    config.__dict__.update(dict.fromkeys(names, False))
    try:
        with stated_as_adam(config):
            yield
    finally:
        config.__dict__.update(stated)


@contextmanager
def stated_as_adam(config: Any) -> Iterator[None]:
    """Let Megatron read "adam" from `config.optimizer`, and restore "adams"."""
    config.optimizer = "adam"
    try:
        yield
    finally:
        config.optimizer = ADAMS
