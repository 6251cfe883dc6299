"""`--optimizer adams` in Megatron's command line: its arguments, defaults, checks and reports.

Wraps functions of megatron.training; used through `register()`. What a wrapper sees of other
optimizers passes through unchanged.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer import OptimizerConfig

from megatron_adams.megatron.config import (
    ADAMS,
    DEFAULT_BETA2,
    KERNELS,
    AdamSOptimizerConfig,
    check_config,
    stated_as_adam,
)


class _Unset(float):
    """A default of --adam-beta2 that can be told from the same number given by the user."""


def wrap_add_megatron_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add adams to the choices of --optimizer, and the flags that only adams has."""

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        optimizer = parser._option_string_actions["--optimizer"]
        optimizer.choices = [*(optimizer.choices or ()), ADAMS]
        beta2 = parser._option_string_actions["--adam-beta2"]
        beta2.default = _Unset(beta2.default)
        beta2.help = f"{beta2.help} (default for --optimizer {ADAMS}: {DEFAULT_BETA2})"
        group = parser.add_argument_group(title=ADAMS)
        group.add_argument(
            "--adams-bias-correction",
            action="store_true",
            help="Divide the old and the new exp_avg by 1 - beta1^step, as the authors' released "
            "code does; the paper, and the default, has no bias correction.",
        )
        group.add_argument(
            "--adams-kernel",
            choices=KERNELS,
            default=KERNELS[0],
            help="What computes the step: a CUDA kernel, the same kernel compiled for the CPU, or "
            "PyTorch operations; auto is the first of them that the parameters' device has.",
        )
        return parser

    return add_megatron_arguments


def wrap_validate_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Validate adams as Megatron validates adam.

    megatron.training.arguments.validate_args (0.19) takes every optimizer but adam and sgd for a
    layer-wise one and drops --use-distributed-optimizer.
    """

    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        beta2_given = not isinstance(args.adam_beta2, _Unset)
        # Saved with the checkpoint: a plain float, loadable without this package.
        args.adam_beta2 = float(args.adam_beta2)
        if args.optimizer != ADAMS:
            _refuse_own_flags(args)
            return original(args, *rest, **kwargs)
        if not beta2_given:
            args.adam_beta2 = DEFAULT_BETA2
        _check_arguments(args)
        with stated_as_adam(args), _printed_as_adams(args):
            return original(args, *rest, **kwargs)

    return validate_args


def _refuse_own_flags(args: argparse.Namespace) -> None:
    given = {
        "--adams-bias-correction": args.adams_bias_correction,
        f"--adams-kernel {args.adams_kernel}": args.adams_kernel != KERNELS[0],
    }
    for flag, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{flag} with --optimizer {args.optimizer}: it belongs to --optimizer {ADAMS}; "
                f"remove it or change the optimizer"
            )


def wrap_validate_yaml(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse adams in a YAML configuration, which never passes `validate_args`."""

    def validate_yaml(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if getattr(args, "optimizer", None) == ADAMS:
            raise ValueError(
                f"--yaml-cfg with optimizer: {ADAMS}: not supported; give Megatron's flags on the "
                f"command line instead"
            )
        return original(args, *rest, **kwargs)

    return validate_yaml


# The namespace whose validation is under way: `_print_args` is called from inside it.
_being_validated: list[argparse.Namespace] = []


@contextmanager
def _printed_as_adams(args: argparse.Namespace) -> Iterator[None]:
    _being_validated.append(args)
    try:
        yield
    finally:
        _being_validated.remove(args)


def wrap_print_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Print the optimizer's own name in Megatron's argument dump."""

    def print_args(title: str, args: argparse.Namespace) -> None:
        if any(args is namespace for namespace in _being_validated):
            args = argparse.Namespace(**{**vars(args), "optimizer": ADAMS})
        original(title, args)

    return print_args


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse, before any work, what Megatron's configuration of the optimizer does not show."""
    check_config(args)
    if args.use_megatron_fsdp or args.use_torch_fsdp2:
        flag = "--use-megatron-fsdp" if args.use_megatron_fsdp else "--use-torch-fsdp2"
        raise ValueError(
            f"{flag} with --optimizer {ADAMS}: not supported; use --use-distributed-optimizer"
        )
    if args.ckpt_format not in ("torch", "torch_dist"):
        raise ValueError(
            f"--ckpt-format {args.ckpt_format} with --optimizer {ADAMS}: must be torch_dist or "
            f"torch; remove the flag to get torch_dist"
        )
    # Megatron's own parser keeps these as text or dtype before validation: compare the text.
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "main_params_dtype", "main_grads_dtype"):
        value = str(getattr(args, name))
        if value not in ("fp32", "torch.float32"):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} with --optimizer {ADAMS}: must be fp32; "
                f"remove the flag"
            )
    if args.adam_beta2 >= 0.99:
        warnings.warn(
            f"--adam-beta2 {args.adam_beta2} with --optimizer {ADAMS}: the update's bound grows "
            f"as sqrt(1 / (1 - beta2)); 0.95 is the paper's value",
            stacklevel=2,
        )


def wrap_get_megatron_optimizer_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Carry adams's own arguments into the optimizer configuration."""

    def get_megatron_optimizer_config(args: Any) -> tuple[OptimizerConfig, Any]:
        config, overrides = original(args)
        if config.optimizer == ADAMS:
            config = AdamSOptimizerConfig.from_config(
                config,
                adams_bias_correction=args.adams_bias_correction,
                adams_kernel=args.adams_kernel,
            )
        return config, overrides

    return get_megatron_optimizer_config


def wrap_compute_weight_and_optimizer_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Report AdamS's bytes: 4 a parameter (of the dp shard) less than Adam's."""

    def compute_weight_and_optimizer_memory(args: Any, verbose: bool = False) -> float:
        adam_bytes: float = original(args, verbose=verbose)
        if args.optimizer != ADAMS:
            return adam_bytes
        if not args.use_distributed_optimizer:
            return adam_bytes * 14 / 18
        # Megatron's estimate is 18 bytes a parameter without sharding, 6 + 12 / dp with it
        # (theoretical_memory_usage.py, 0.19): of the 12 sharded bytes AdamS has 8.
        unsharded = argparse.Namespace(**{**vars(args), "use_distributed_optimizer": False})
        num_params = original(unsharded) / 18
        return adam_bytes - (adam_bytes - 6 * num_params) * 4 / 12

    return compute_weight_and_optimizer_memory
