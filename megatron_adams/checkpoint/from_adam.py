"""Adam's groups and state as AdamS's.

Both optimizers keep the same exp_avg, beta1 * exp_avg + (1 - beta1) * grad, so that AdamS goes on
from Adam's; exp_avg_sq is dropped. Imports torch alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

DROPPED_STATE = ("exp_avg_sq", "max_exp_avg_sq")
# What torch's, TransformerEngine's and Apex's Adam have in a param group, and Megatron has not. The
# run that loads it has hyperparameters of its own.
_KEYS_OF_ADAM = (
    "amsgrad",
    "betas",
    "bias_correction",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "eps",
    "foreach",
    "fused",
    "maximize",
    "weight_decay",
)
# The mark of AdamS's groups: no Adam has it there.
_MARK = "adam_w_mode"


def is_adam_group(group: Mapping[str, Any]) -> bool:
    """Whether an Adam has written this param group of a checkpoint."""
    return _MARK not in group and {"betas", "eps"} <= group.keys()


def group_from_adam(group: Mapping[str, Any], *, adam_w_mode: bool | None = None) -> dict[str, Any]:
    """A param group for AdamS from Adam's.

    Kept are the params, the step, the learning rate, and what others have put there (Megatron's
    wd_mult, max_lr, ...). AdamS takes its betas, eps and weight decay from the run that loads it.

    Args:
        group: of a checkpoint; left as it is.
        adam_w_mode: whether weight decay is decoupled. None: the group's own flag if it has one, as
            torch's Adam has; otherwise decoupled, which is Megatron's only mode.
    """
    kept = {name: value for name, value in group.items() if name not in _KEYS_OF_ADAM}
    if adam_w_mode is None:
        adam_w_mode = group.get("decoupled_weight_decay", True)
    return {**kept, _MARK: adam_w_mode}


def state_dict_from_adam(
    state_dict: Mapping[str, Any], *, adam_w_mode: bool | None = None
) -> dict[str, Any]:
    """A state dict for `AdamS.load_state_dict` from that of an Adam.

    Args:
        state_dict: of torch's, TransformerEngine's or Apex's Adam, or AdamW; left as it is.
        adam_w_mode: as `group_from_adam`.
    Raises:
        ValueError: it is no Adam's, or a parameter with state has no exp_avg.
    """
    groups = state_dict["param_groups"]
    if not all(map(is_adam_group, groups)):
        raise ValueError(
            "this state dict was not written by Adam: each param group must have betas and eps, "
            f"and not {_MARK}, which AdamS's have"
        )
    for index, state in state_dict["state"].items():
        if "exp_avg" not in state:
            raise ValueError(
                f"the state of parameter {index} has {sorted(state)}: must have exp_avg, Adam's "
                "momentum, which AdamS goes on from"
            )
    converted: dict[str, Any] = without_adam(dict(state_dict), adam_w_mode=adam_w_mode)
    return converted


def continued_from_adam(num_restored: int, num_params: int, step: int) -> str:
    """The line of the log that says what a run has taken from Adam."""
    return (
        f"adams: goes on from Adam's step {step}: momentum and main params of {num_restored} of "
        f"{num_params} parameters of this rank restored, exp_avg_sq dropped"
    )


def without_adam(tree: Any, *, adam_w_mode: bool | None = None) -> Any:
    """A copy of nested dicts and lists with AdamS's param groups, and without exp_avg_sq."""
    if isinstance(tree, dict):
        if is_adam_group(tree):
            return group_from_adam(tree, adam_w_mode=adam_w_mode)
        return {
            key: without_adam(value, adam_w_mode=adam_w_mode)
            for key, value in tree.items()
            if key not in DROPPED_STATE
        }
    if isinstance(tree, list):
        return [without_adam(entry, adam_w_mode=adam_w_mode) for entry in tree]
    return tree


def unfit_for_adams(args: Any) -> str | None:
    """Why AdamS cannot go on from a checkpoint as from Adam's, None if it can.

    Args:
        args: see `saved_arguments`.
    """
    optimizer = getattr(args, "optimizer", None)
    if optimizer == "adams":
        return "was saved with --optimizer adams; must be adam's, and this one needs no conversion"
    if optimizer != "adam":
        return f"was saved with --optimizer {optimizer}; must be adam's"
    if getattr(args, "no_save_optim", False):
        return "was saved with --no-save-optim: there is no momentum to go on from"
    return None


def contradict(weights: Tensor, main_params: Tensor) -> bool:
    """Whether weights cannot be main params that were rounded, because most of them differ.

    Main params that stock Adam saved as fully_reshardable are shifted, and so belong to other
    weights, wherever a bucket is padded at its end and another follows (Megatron 0.19:
    DistributedOptimizer.get_parameter_state_dp_zero drops the padding that param_index_map counts).

    Args:
        weights: floating, what the model computes with.
        main_params: fp32, of the same shape.
    """
    main_params = main_params.to(weights.device)
    # Four times what rounding to fp8 (e4m3) changes, as --fp8-param-gather does, and fp16's
    # smallest number. Of values that have nothing to do with each other four in five differ so.
    differ = (weights.float() - main_params).abs() > main_params.abs() / 4 + 2.0**-24
    return 2 * int(differ.sum()) > differ.numel()


def shifted_message(name: str) -> str:
    """What to say of a param that `contradict`s its main params."""
    return (
        f"the main params of {name} are not those of its weights. Megatron saves them wrong with "
        "--dist-ckpt-optim-fully-reshardable where buckets are padded: save the AdamW run without "
        "that flag, or load the weights alone with --no-load-optim"
    )
