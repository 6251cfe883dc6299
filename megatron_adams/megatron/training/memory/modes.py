"""The ways to keep the optimizer's state that are compared for a job."""

import argparse
import copy
from typing import Any, NamedTuple

import torch

from megatron_adams.megatron.config import NO_PRECISION
from megatron_adams.megatron.names import ADAMS, DEFAULT_BETA2, dtype_name, flag_of


class StateMode(NamedTuple):
    """One way to keep the optimizer's state.

    Attributes:
        name: for JSON.
        optimizer: "adam" or "adams".
        settings: Megatron's arguments that make it.
    """

    name: str
    optimizer: str
    settings: dict[str, Any]


def _aware(**dtypes: torch.dtype) -> dict[str, Any]:
    return {**NO_PRECISION, "use_precision_aware_optimizer": True, **dtypes}


MODES = (
    StateMode("adamw", "adam", NO_PRECISION),
    StateMode("adams", ADAMS, NO_PRECISION),
    StateMode("adamw_precision_aware", "adam", _aware()),
    StateMode("adams_precision_aware", ADAMS, _aware()),
    StateMode(
        "adamw_precision_aware_bf16",
        "adam",
        _aware(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16),
    ),
    StateMode("adams_precision_aware_bf16", ADAMS, _aware(exp_avg_dtype=torch.bfloat16)),
    StateMode(
        "adamw_precision_aware_fp8",
        "adam",
        _aware(exp_avg_dtype=torch.uint8, exp_avg_sq_dtype=torch.uint8),
    ),
    StateMode("adams_precision_aware_fp8", ADAMS, _aware(exp_avg_dtype=torch.uint8)),
)
OWN = ("adams_no_param_remainders",)


def modes_of(args: argparse.Namespace) -> tuple[list[StateMode], str]:
    """The modes to compare for a job, and the name of the one that its flags ask for.

    The precision-aware modes need the distributed optimizer. A mode that the flags ask for and
    that is none of MODES comes last, as "as_given".
    """
    modes = [
        mode
        for mode in MODES
        if args.use_distributed_optimizer or not mode.settings["use_precision_aware_optimizer"]
    ]
    settings = {name: getattr(args, name) for name in NO_PRECISION}
    is_adam = args.optimizer == "adam"
    settings["exp_avg_sq_dtype"] = args.exp_avg_sq_dtype if is_adam else torch.float32
    settings |= {name: getattr(args, name, False) for name in OWN}
    given = StateMode("as_given", args.optimizer, settings)
    for mode in modes:
        full = {
            **dict.fromkeys(OWN, False),
            "exp_avg_sq_dtype": torch.float32,
            **mode.settings,
        }
        # The gradients of the precision-aware modes are those of the job.
        if mode.settings["use_precision_aware_optimizer"]:
            full["main_grads_dtype"] = settings["main_grads_dtype"]
        if mode.optimizer == given.optimizer and full == given.settings:
            return modes, mode.name
    return [*modes, given], given.name


def in_mode(args: argparse.Namespace, mode: StateMode) -> argparse.Namespace:
    """The arguments of the same job in another mode, as validation would leave them."""
    other = copy.copy(args)
    vars(other).update(exp_avg_sq_dtype=torch.float32, **dict.fromkeys(OWN, False))
    vars(other).update(mode.settings)
    other.optimizer = mode.optimizer
    if mode.settings["use_precision_aware_optimizer"]:
        other.main_grads_dtype = args.main_grads_dtype
    elif args.bf16 and args.main_grads_dtype == torch.bfloat16 and not args.grad_reduce_in_bf16:
        # validate_args (megatron/training/arguments.py, 0.19): gradients in bf16 are the
        # precision-aware optimizer's.
        other.accumulate_allreduce_grads_in_fp32 = True
    other.adam_beta2 = DEFAULT_BETA2 if mode.optimizer == ADAMS else args.adam_beta2
    return other


def dtypes_of(args: argparse.Namespace, mode: StateMode) -> dict[str, str]:
    """What the kernel of a step of most params reads and writes, as Megatron names dtypes."""
    args = in_mode(args, mode)
    is_wide = args.params_dtype == torch.float32
    is_aware = args.use_precision_aware_optimizer
    main_param = "none" if is_wide else "fp32"
    if is_aware and not is_wide and getattr(args, "fp8_recipe", None) in (None, "delayed"):
        main_param = dtype_name(args.main_params_dtype)
        if main_param == "fp32" and args.bf16 and not args.adams_no_param_remainders:
            main_param = "remainder"
    in_fp32 = is_wide or args.accumulate_allreduce_grads_in_fp32
    return {
        "grad": "fp32" if in_fp32 else dtype_name(args.params_dtype),
        "param": dtype_name(args.params_dtype),
        "exp_avg": dtype_name(args.exp_avg_dtype),
        "main_param": main_param,
    }


def flags_of_mode(args: argparse.Namespace, mode: StateMode) -> str:
    """What a command line has to have for a mode, beside the rest of the job's flags."""
    is_aware = mode.settings["use_precision_aware_optimizer"]
    words = [f"--optimizer {mode.optimizer}"]
    if is_aware:
        words.append("--use-precision-aware-optimizer")
    dtypes = {**mode.settings, "main_grads_dtype": args.main_grads_dtype if is_aware else None}
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = dtypes.get(name) or torch.float32
        if dtype != torch.float32:
            words.append(f"{flag_of(name)} {dtype_name(dtype)}")
    if mode.settings.get("adams_no_param_remainders"):
        words.append("--adams-no-param-remainders")
    return " ".join(words)
