"""`--optimizer adams` in Megatron's command line: its arguments, defaults, checks and reports.

Wraps functions of megatron.training; used through `register()`. What a wrapper sees of other
optimizers passes through unchanged.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from typing_extensions import Self

from megatron_adams.megatron.callers import asks_for_adams
from megatron_adams.megatron.config import (
    NO_PRECISION,
    OWN_FLAGS,
    AdamSOptimizerConfig,
    stated_as_adam,
)
from megatron_adams.megatron.names import (
    ADAMS,
    ADAMW_BETA2,
    DEFAULT_BETA2,
    KERNELS,
    dtype_name,
)
from megatron_adams.megatron.refusals import (
    check_arguments,
    check_own_flags,
    exp_avg_sq_refusal,
    fsdp_too_old,
    yaml_refusal,
)
from megatron_adams.megatron.training import gpu_memory
from megatron_adams.megatron.versions import TAKES_FSDP
from megatron_adams.update import update_bound

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class _Unset(float):
    """A default of --adam-beta2 that can be told from the same number given by the user.

    A copy is one, too; pickled it is the number, which can be loaded without this package.
    """

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


class _UnsetText(str):
    """The same for the default of --exp-avg-sq-dtype."""

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


# Megatron's own that say whose learning rates a resumed run has.
_SCHEDULER_FLAGS = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")


def _own(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name, default) for name, default in OWN_FLAGS.items()}


def wrap_add_megatron_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Add adams to the choices of --optimizer, and the flags that only adams has."""

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        optimizer = parser._option_string_actions["--optimizer"]
        optimizer.choices = [*(optimizer.choices or ()), ADAMS]
        beta2 = parser._option_string_actions["--adam-beta2"]
        beta2.default = _Unset(beta2.default)
        beta2.help = f"{beta2.help} (default for --optimizer {ADAMS}: {DEFAULT_BETA2})"
        exp_avg_sq = parser._option_string_actions["--exp-avg-sq-dtype"]
        exp_avg_sq.default = _UnsetText(exp_avg_sq.default)
        group = parser.add_argument_group(title=ADAMS)
        group.add_argument(
            "--adams-bias-correction",
            action="store_true",
            help="Divide the old and the new exp_avg by 1 - beta1^step, as the authors' released "
            "code does; the paper, and the default, has no bias correction.",
        )
        group.add_argument(
            "--adams-cautious",
            action="store_true",
            help="Leave an element of a parameter where it is, but for weight decay, if its update "
            "would move it against its gradient. Not in the paper; costs no state and no pass.",
        )
        group.add_argument(
            "--adams-from-adam",
            action="store_true",
            help="Resume from a checkpoint of --optimizer adam: momentum, main params, step and "
            "scheduler go on, exp_avg_sq is dropped. It may stay for later resumes, from adams's "
            "own checkpoints, which it leaves as they are.",
        )
        group.add_argument(
            "--adams-kernel",
            choices=KERNELS,
            default=KERNELS[0],
            help="What computes the step: a CUDA kernel, the same kernel compiled for the CPU, or "
            "PyTorch operations; auto is the first of them that the parameters' device has.",
        )
        group.add_argument(
            "--adams-log-adamw-rms",
            type=float,
            nargs="?",
            const=ADAMW_BETA2,
            metavar="BETA2",
            help="Log, beside the update RMS, that of the update that AdamW would make of the same "
            "gradients: for megatron-adams tune. Keeps AdamW's exp_avg_sq for it, which takes "
            "4 bytes a parameter, sharded as the optimizer's state, and a pass over the gradients. "
            f"BETA2 is AdamW's; by default {ADAMW_BETA2}.",
        )
        group.add_argument(
            "--adams-match-rms",
            type=float,
            metavar="RMS",
            help="Scale the update of every tensor to this RMS, before learning rate and weight "
            "decay; AdamW's is 0.2 to 0.4. Costs a pass over gradients and exp_avg.",
        )
        group.add_argument(
            "--adams-max-update-rms",
            type=float,
            metavar="RMS",
            help="Scale the update of a tensor down to this RMS where it is larger. Costs a pass "
            "over gradients and exp_avg.",
        )
        group.add_argument(
            "--adams-nesterov",
            action="store_true",
            help="Let the numerator of updates look ahead by one step: beta1 * exp_avg + "
            "(1 - beta1) * gradient. Not in the paper; costs no state and no pass.",
        )
        group.add_argument(
            "--adams-no-param-remainders",
            action="store_true",
            help="Keep fp32 main params as they are. The precision-aware optimizer keeps of a bf16 "
            "param's main param the 16 bits that the param lacks, and loses nothing.",
        )
        gpu_memory.add_argument(group)
        return parser

    return add_megatron_arguments


def wrap_validate_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Validate adams as Megatron validates adam.

    megatron.training.arguments.validate_args (0.19) takes every optimizer but adam and sgd for a
    layer-wise one and drops --use-distributed-optimizer.
    """

    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        beta2 = getattr(args, "adam_beta2", None)
        exp_avg_sq_dtype = getattr(args, "exp_avg_sq_dtype", None)
        # Saved with the checkpoint: as they are without the plugin.
        if isinstance(beta2, _Unset):
            args.adam_beta2 = float(beta2)
        if isinstance(exp_avg_sq_dtype, _UnsetText):
            args.exp_avg_sq_dtype = str(exp_avg_sq_dtype)
        if not asks_for_adams(args):
            check_own_flags(args, OWN_FLAGS)
            return original(args, *rest, **kwargs)
        vars(args).update(_own(args))
        if isinstance(beta2, _Unset):
            args.adam_beta2 = DEFAULT_BETA2
        if isinstance(exp_avg_sq_dtype, str) and not isinstance(exp_avg_sq_dtype, _UnsetText):
            # Text: from the command line. Only other values than fp32 are refused as a dtype.
            raise exp_avg_sq_refusal(exp_avg_sq_dtype)
        if args.use_megatron_fsdp and not TAKES_FSDP:
            raise fsdp_too_old()
        check_arguments(args)
        _warn_of_beta2(args)
        with stated_as_adam(args), _printed_as_adams(args):
            return original(args, *rest, **kwargs)

    return validate_args


def wrap_validate_yaml(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse adams in a YAML configuration, which never passes `validate_args`."""

    def validate_yaml(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if asks_for_adams(args):
            raise yaml_refusal()
        return original(args, *rest, **kwargs)

    return validate_yaml


# The namespace whose validation is under way: `_print_args` is called from inside it.
_being_validated: ContextVar[argparse.Namespace | None] = ContextVar(
    "megatron_adams_being_validated", default=None
)


@contextmanager
def _printed_as_adams(args: argparse.Namespace) -> Iterator[None]:
    token = _being_validated.set(args)
    try:
        yield
    finally:
        _being_validated.reset(token)


def wrap_print_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Print the optimizer's own name in Megatron's argument dump."""

    def print_args(title: str, args: argparse.Namespace) -> Any:
        if args is _being_validated.get():
            args = argparse.Namespace(**{**vars(args), "optimizer": ADAMS})
        return original(title, args)

    return print_args


def _warn_of_beta2(args: argparse.Namespace) -> None:
    if args.adam_beta2 >= 0.99:
        nesterov = args.adams_nesterov
        bound = update_bound(beta1=args.adam_beta1, beta2=args.adam_beta2, nesterov=nesterov)
        usual = update_bound(beta1=args.adam_beta1, beta2=DEFAULT_BETA2, nesterov=nesterov)
        warnings.warn(
            f"--adam-beta2 {args.adam_beta2} with --optimizer {ADAMS}: an element's update can be "
            f"{bound:.3g} times the learning rate, {usual:.3g} times at {DEFAULT_BETA2}, which is "
            f"the paper's value",
            stacklevel=2,
        )


def wrap_get_megatron_optimizer_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Carry adams's own arguments into the optimizer configuration."""

    def get_megatron_optimizer_config(args: Any) -> tuple[OptimizerConfig, Any]:
        if not asks_for_adams(args):
            return original(args)
        # Megatron's OptimizerConfig takes precisions for adam alone, with TransformerEngine.
        plain = copy.copy(args)
        # Up to 0.17 it refuses names that it does not know.
        vars(plain).update(NO_PRECISION, optimizer="adam")
        config, overrides = original(plain)
        own = _own(args)
        config = AdamSOptimizerConfig.from_config(
            config,
            optimizer=ADAMS,
            **{name: getattr(args, name, False) for name in _SCHEDULER_FLAGS},
            store_param_remainders=not own.pop("adams_no_param_remainders"),
            **own,
            **{name: getattr(args, name, value) for name, value in NO_PRECISION.items()},
        )
        config.finalize()
        return config, overrides

    return get_megatron_optimizer_config


def wrap_compute_weight_and_optimizer_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Report AdamS's bytes, in the precisions that it keeps them in."""

    def compute_weight_and_optimizer_memory(args: Any, verbose: bool = False) -> float:
        adam_bytes: float = original(args, verbose=verbose)
        if not asks_for_adams(args):
            return adam_bytes
        # Megatron's estimate is 18 bytes a parameter without sharding, 6 + 12 / dp with it, for
        # a 16-bit param and an fp32 gradient (theoretical_memory_usage.py, 0.19).
        unsharded = argparse.Namespace(**{**vars(args), "use_distributed_optimizer": False})
        num_params = original(unsharded) / 18
        part = 1.0
        if args.use_distributed_optimizer:
            part = (adam_bytes / num_params - 6) / 12
        precision: dict[str, Any] = {
            name: getattr(args, name, value) for name, value in NO_PRECISION.items()
        }
        exp_avg, main_param = _BYTES[dtype_name(precision["exp_avg_dtype"])], 4
        # With other fp8 recipes than delayed scaling, fp32 main params stay with Megatron.
        is_precision_aware = precision["use_precision_aware_optimizer"]
        if is_precision_aware and getattr(args, "fp8_recipe", None) in (None, "delayed"):
            is_bf16 = getattr(args, "bf16", False)
            keeps_fp32 = _own(args)["adams_no_param_remainders"] or not is_bf16
            is_fp32 = dtype_name(precision["main_params_dtype"]) == "fp32"
            main_param = 4 if keeps_fp32 and is_fp32 else 2
        grad = _BYTES[dtype_name(precision["main_grads_dtype"])]
        return num_params * (2 + grad + (exp_avg + main_param) * part)

    return compute_weight_and_optimizer_memory
