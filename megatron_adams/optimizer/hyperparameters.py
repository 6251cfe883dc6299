"""What a user may give to AdamS, and what is refused.

Each `check_...` raises a ValueError with the value, the rule and the remedy. Used by adams.py and
by megatron_adams.megatron. Imports torch, kernels and tensors.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_adams.kernels import BACKENDS
from megatron_adams.optimizer.tensors import is_quantized
from megatron_adams.update import check_numerator

SWITCHES = ("bias_correction", "adam_w_mode", "maximize", "nesterov", "cautious")
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", *SWITCHES)
# Below it, squares that underflow in fp32 are no longer covered by eps, and the update has no
# bound.
_MIN_EPS = 2.0**-63


class _Unsupported(NamedTuple):
    """An argument of torch's or TransformerEngine's Adam that AdamS takes at its default only."""

    default: Any
    rule: str
    remedy: str


UNSUPPORTED = {
    "amsgrad": _Unsupported(
        False, "AdamS keeps no second moment whose maximum it could take", "leave it out"
    ),
    "differentiable": _Unsupported(
        False, "the step writes its tensors in place, without autograd", "leave it out"
    ),
    "exp_avg_sq_dtype": _Unsupported(torch.float32, "AdamS has no exp_avg_sq", "leave it out"),
    "set_grad_none": _Unsupported(
        None, "AdamS takes it at zero_grad", "call zero_grad(set_to_none=...)"
    ),
}
# TransformerEngine's and Megatron's name of fp8 is uint8.
EXP_AVG_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
    torch.float8_e4m3fn: torch.float8_e4m3fn,
    torch.uint8: torch.float8_e4m3fn,
}
# State of these dtypes is stored with a scale per tensor.
SCALED_DTYPES = (torch.float16, torch.float8_e4m3fn)


def check_guards(max_update_rms: float | None, match_update_rms: float | None) -> None:
    """Refuse bounds of the update RMS that are none.

    Raises:
        ValueError: one is not a finite number above 0, or both are given.
    """
    for name, value in (
        ("max_update_rms", max_update_rms),
        ("match_update_rms", match_update_rms),
    ):
        if value is not None:
            words = "finite and > 0; leave it out for updates as they are"
            _check_number(name, value, lambda x: 0 < x < math.inf, words)
    if max_update_rms is not None and match_update_rms is not None:
        raise ValueError(
            f"max_update_rms={max_update_rms}, match_update_rms={match_update_rms}: must be one of "
            "the two, as an update that is matched has that RMS already; leave one out"
        )


def check_storage(
    *,
    exp_avg_dtype: torch.dtype,
    master_weights: bool,
    master_weight_dtype: torch.dtype,
    store_param_remainders: bool,
) -> None:
    """Refuse dtypes of state that AdamS does not have; the arguments are the constructor's.

    Raises:
        ValueError: a dtype is not supported, or the options contradict each other.
    """
    if exp_avg_dtype not in EXP_AVG_DTYPES:
        raise ValueError(
            f"exp_avg_dtype={exp_avg_dtype}: must be one of "
            f"{', '.join(str(dtype) for dtype in EXP_AVG_DTYPES)}"
        )
    is_kept, dtype, as_remainders = master_weights, master_weight_dtype, store_param_remainders
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"master_weight_dtype={dtype}: must be torch.float32 or torch.float16; with fp32, "
            "store_param_remainders=True keeps the same 16 bits and loses nothing"
        )
    if not is_kept and (as_remainders or dtype != torch.float32):
        raise ValueError(
            f"master_weight_dtype={dtype}, store_param_remainders={as_remainders} without master "
            "weights: must be torch.float32 and False; add master_weights=True"
        )
    if as_remainders and dtype != torch.float32:
        raise ValueError(
            f"store_param_remainders=True with master_weight_dtype={dtype}: must be torch.float32, "
            "as a remainder is the lower half of an fp32 number; leave one of them out"
        )


def refuse_unsupported(options: Mapping[str, Any]) -> None:
    """Refuse arguments, or entries of a param group, that AdamS takes at their default only.

    Raises:
        ValueError: one has another value.
    """
    for name, (default, rule, remedy) in UNSUPPORTED.items():
        if options.get(name, default) != default:
            raise ValueError(f"{name}={options[name]}: must be {default}, as {rule}; {remedy}")


def check_kernel(kernel: str, *, foreach: bool | None, fused: bool | None) -> None:
    """Refuse a choice of the implementation that says two things.

    Raises:
        ValueError: an unknown kernel, or arguments that contradict each other.
    """
    if kernel not in ("auto", *BACKENDS):
        raise ValueError(f"kernel={kernel!r}: must be one of {('auto', *BACKENDS)}")
    if fused and foreach:
        raise ValueError(
            "fused=True, foreach=True: must be one of the two, as in torch; leave one out"
        )
    if fused and kernel == "foreach":
        raise ValueError(
            "fused=True with kernel='foreach': must be 'auto', 'cuda' or 'host'; leave one out"
        )
    if foreach and kernel not in ("auto", "foreach"):
        raise ValueError(f"foreach=True with kernel={kernel!r}: must be 'foreach'; leave one out")


def check_capturable(params: Sequence[Tensor]) -> None:
    """Refuse a group that a CUDA graph cannot step.

    Raises:
        ValueError: its params lie on several devices, or one is quantized.
    """
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(
            f"capturable=True with parameters of one group on {sorted(map(str, devices))}: must "
            "be on one device, as the group's lr is; give each device a group of its own"
        )
    if any(map(is_quantized, params)):
        raise ValueError(
            "capturable=True with quantized parameters: must be floating ones, as with FusedAdam; "
            "step outside the CUDA graph"
        )


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Refuse numbers outside their range, and switches that do not fit each other, in a group.

    Args:
        group: lr, betas, eps and weight_decay, and the switches that it has.
    Raises:
        ValueError: naming the first of them.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr={lr}: a tensor must have one element")
        lr = lr.item()
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas}: must be two numbers, (beta1, beta2)")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"betas[{index}]={beta}: a tensor must have one element")
    beta1, beta2 = map(_plain_number, betas)
    _check_number("lr", lr, lambda x: 0 <= x < math.inf, "finite and >= 0")
    _check_number("beta1", beta1, lambda x: 0 <= x < 1, "in [0, 1)")
    _check_number(
        "beta2", beta2, lambda x: 0 < x < 1, "in (0, 1): at 0 and 1 the update has no bound"
    )
    _check_number(
        "eps",
        group["eps"],
        lambda x: _MIN_EPS <= x < math.inf,
        "finite and >= 2**-63 = 1.1e-19: a coordinate without gradients ends at 0 / (0 + eps)",
    )
    _check_number(
        "weight_decay", group["weight_decay"], lambda x: 0 <= x < math.inf, "finite and >= 0"
    )
    check_numerator(
        nesterov=group.get("nesterov", False), bias_correction=group.get("bias_correction", False)
    )


def _check_number(name: str, value: object, rule: Callable[[float], bool], words: str) -> None:
    if not isinstance(value, Real):
        raise ValueError(
            f"{name}={value!r}: must be a number, and is a {type(value).__name__}; give a float"
        )
    # A rule says what is right, not what is wrong: NaN satisfies none.
    if not rule(float(value)):
        raise ValueError(f"{name}={value}: must be {words}")


def take_plain_numbers(group: dict[str, Any]) -> None:
    """Turn numbers and bools of other types (NumPy's) into Python's, which torch.load accepts.

    Betas become a tuple of numbers; as in torch, their tensors are read once. lr and step may be
    tensors.
    """
    for name, value in group.items():
        if name != "params" and not isinstance(value, Tensor):
            group[name] = bool(value) if name in SWITCHES else _plain_number(value)
    if "betas" in group:
        group["betas"] = tuple(map(_plain_number, group["betas"]))


def _plain_number(value: Any) -> Any:
    """Return the int or float of a tensor or of another number type; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item()
    kind: type = type(value)
    if not isinstance(value, Real) or kind in (bool, int, float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def move_numbers_to_device(
    group: dict[str, Any], other_groups: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Make a group's lr and step tensors on its device, where a CUDA graph finds them again.

    Args:
        group: its "lr" becomes fp64 unless it is a tensor, its "step" int64.
        other_groups: where `group` has no params, the device is that of theirs.
    Raises:
        ValueError: lr is a tensor on another device.
    """
    params = chain(group["params"], *(other["params"] for other in other_groups))
    if (param := next(params, None)) is not None:
        device = param.device
    else:
        # A dp rank that owns no parameter counts on the device as the others do.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.empty(0, dtype=torch.int64, device=device).device
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device != device:
        raise ValueError(
            f"lr is a tensor on {lr.device} with capturable=True: must be on {device}, where "
            "the parameters are; give it as a number, or move it"
        )
    # Not fp32: a scheduler's rate is in a checkpoint what it is without a graph.
    if not isinstance(lr, Tensor):
        group["lr"] = torch.tensor(float(lr), dtype=torch.float64, device=device)
    group["step"] = torch.tensor(int(group["step"]), dtype=torch.int64, device=device)


def read_group(
    where: str,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    last_step: int | None,
    *,
    capturable: bool,
) -> dict[str, Any]:
    """Return a checkpoint's param group, completed from the current one and checked.

    Args:
        where: its name in the error.
        saved, current: the group in the checkpoint and the one that it is loaded into.
        last_step: the step where `saved` has none; None: that is unknown.
        capturable: as AdamS's.
    Raises:
        ValueError: another optimizer wrote it, a hyperparameter is outside its range, or there is
            no step.
    """
    # Adam's state is empty before its first step, and Megatron passes exp_avg alone; its
    # groups show it nevertheless: torch's have amsgrad, and no Adam's have adam_w_mode.
    refuse_other_optimizer(where, {"amsgrad"} & set(saved), set(current))
    if "adam_w_mode" not in saved:
        raise _written_by_another(f"{where} has no 'adam_w_mode'")
    group = {**{name: current[name] for name in HYPERPARAMETERS}, **saved}
    if "step" not in group:
        if last_step is None:
            raise ValueError(
                f"{where} of the checkpoint has state and no 'step': must be "
                "the number of steps taken; set it before loading"
            )
        group["step"] = last_step
    group["step"] = int(group["step"])
    check_hyperparameters(group)
    take_plain_numbers(group)
    # TransformerEngine's FusedAdam saves a tensor with capturable=True.
    if isinstance(group["lr"], Tensor) and (capturable or not isinstance(current["lr"], Tensor)):
        group["lr"] = group["lr"].item()
    return group


def refuse_other_optimizer(where: str, keys: set[str], known: set[str]) -> None:
    """Refuse a part of a checkpoint with keys that AdamS does not know.

    Raises:
        ValueError: there are some.
    """
    if unknown := sorted(keys - known):
        raise _written_by_another(f"{where} has {unknown}")


def _written_by_another(evidence: str) -> ValueError:
    return ValueError(
        f"this checkpoint was written by Adam or another optimizer: {evidence}, and "
        "AdamS keeps exp_avg alone; go on from Adam's momentum (Megatron: --adams-from-adam; "
        "elsewhere: megatron_adams.checkpoint.state_dict_from_adam), or load the model's weights "
        "only and let the optimizer start anew (Megatron: --no-load-optim, or --finetune)"
    )
