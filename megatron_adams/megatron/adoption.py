"""AdamS in Adam's place.

Megatron builds its optimizer for Adam, and what is inside is exchanged, before any state exists:
by `register()`'s wrapper of get_megatron_optimizer, or by register.py's `adopt`, which is for code
that builds its optimizer through other functions of Megatron's.
Imports megatron.core alone.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.utils import log_single_rank

from megatron_adams.checkpoint import continued_from_adam, is_adam_group, state_dict_from_adam
from megatron_adams.megatron.adamw_shadow import attach_shadow
from megatron_adams.megatron.callers import asks_for_adams, is_adams
from megatron_adams.megatron.config import AdamSOptimizerConfig, as_adams, built_as_adam
from megatron_adams.megatron.distributed import (
    AdamSChainedOptimizer,
    AdamSDistributedOptimizer,
    init_state,
)
from megatron_adams.megatron.fsdp import AdamSFsdpOptimizer
from megatron_adams.megatron.inner import InnerAdamS
from megatron_adams.megatron.names import ADAMS, dtype_name
from megatron_adams.megatron.offload import HybridAdamS
from megatron_adams.megatron.refusals import check_model, refusal
from megatron_adams.megatron.update_rms import connect_update_sums
from megatron_adams.optimizer import AdamS, local_part

logger = logging.getLogger(__name__)

# Hyperparameters that a param group can carry for both optimizers; Megatron's MuP sets eps.
_SHARED_WITH_ADAM = {"lr", "betas", "eps", "weight_decay"}
# AdamS's arguments that flags of adams's own set: --adams-bias-correction and so on.
_FORM = ("bias_correction", "nesterov", "cautious")


# Names of other optimizers in whose place adams is built: `take_over`.
_taken_over: set[str] = set()


def take_over(name: str) -> None:
    """Build adams from now on where a configuration asks for `name`.

    Raises:
        ValueError: it is not "adam".
    """
    if name != "adam":
        raise ValueError(
            f"replace={name!r}: must be 'adam', the one optimizer that is like {ADAMS}"
        )
    _taken_over.add(name)


def wrap_get_megatron_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build adams where the configuration asks for it."""

    def get_megatron_optimizer(
        config: Any, model_chunks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        # A MIMO model's optimizer is built module by module: each comes back here. Its
        # configuration can be of another class, without `optimizer`.
        if not _becomes_adams(config) or isinstance(model_chunks[0], MimoModel):
            return original(config, model_chunks, *args, **kwargs)
        if not asks_for_adams(config):
            _warn_of_take_over(config)
        config = as_adams(config)
        check_model(config, model_chunks)
        with built_as_adam(config):
            optimizer = original(config, model_chunks, *args, **kwargs)
        return _put_adams_in(optimizer, config)

    return get_megatron_optimizer


def _becomes_adams(config: Any) -> bool:
    return asks_for_adams(config) or getattr(config, "optimizer", None) in _taken_over


def _warn_of_take_over(config: Any) -> None:
    words = (
        f"{ADAMS} TAKES THE PLACE of optimizer={config.optimizer!r}, as MEGATRON_ADAMS_REPLACE or "
        f"register(replace={config.optimizer!r}) asks. lr={config.lr} is as it was: {ADAMS} wants "
        f"about half of Adam's"
    )
    log_single_rank(logger, logging.WARNING, words)


def wrap_builder_of_others(original: Callable[..., Any]) -> Callable[..., Any]:
    """Say why adams comes here: by Megatron's own `get_megatron_optimizer`, in spite of ours."""

    def build_other(config: Any, *args: Any, **kwargs: Any) -> Any:
        if asks_for_adams(config):
            raise RuntimeError(
                f"optimizer={ADAMS!r} reached Megatron's own get_megatron_optimizer, which the "
                f"caller took from megatron.core.optimizer before megatron_adams.register() was "
                f"called, and keeps where that does not find it (a closure, a partial, an "
                f"attribute); call megatron_adams.register() first"
            )
        return original(config, *args, **kwargs)

    return build_other


def adopt_built(optimizer: Any, config: Any) -> AdamSChainedOptimizer | AdamSFsdpOptimizer:
    """`adopt` of register.py, behind `register_core`."""
    if is_adams(optimizer):
        return optimizer
    config = as_adams(config)
    parts = _parts_of(optimizer)
    for part in parts:
        _check_part(part, config)
    if not isinstance(optimizer, ChainedOptimizer) and not _is_fsdp(optimizer):
        optimizer = ChainedOptimizer([optimizer])
    for part in parts:
        _set_hyperparameters(part.optimizer, config)
    for part in (optimizer, *parts):
        part.config = config
    return _put_adams_in(optimizer, config)


def _set_hyperparameters(adam: Any, config: AdamSOptimizerConfig) -> None:
    """Give param groups the configuration's betas and eps, where they have none of their own."""
    own = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    for group in adam.param_groups if adam is not None else ():
        for name, value in own.items():
            if group.get(name) == adam.defaults[name]:
                group[name] = value


def _parts_of(optimizer: Any) -> list[Any]:
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def _is_fsdp(part: Any) -> bool:
    return isinstance(part, DistributedOptimizer) and part.ddp_config.use_megatron_fsdp


def _check_part(part: Any, config: AdamSOptimizerConfig) -> None:
    """Refuse one of Megatron's optimizers in which AdamS cannot take the place of what is inside.

    Raises:
        ValueError: naming what is inside.
    """
    inner = part.optimizer
    if inner is None:  # no params on this rank
        return
    given = f"adopt() of a {type(part).__name__} with a {type(inner).__name__} inside"
    if isinstance(inner, HybridDeviceOptimizer) or "betas" not in inner.defaults:
        rule = "must be an Adam on the params' own device"
        raise refusal(given, rule, f"build it inside of `with built_as_adam(config)`, for {ADAMS}")
    if inner.state:
        rule = f"it has state of {len(inner.state)} params, which would be lost"
        raise refusal(
            given, rule, "adopt it before its first step, and before a checkpoint is loaded"
        )
    name = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"
    built, asked = getattr(part.config, name), getattr(config, name)
    if isinstance(part, DistributedOptimizer) and built != asked:
        rule = f"{name} was {built} when it was built, and is {asked} in the configuration"
        raise refusal(given, rule, "build it with the configuration that adopt() is given")


def _put_adams_in(
    optimizer: ChainedOptimizer | DistributedOptimizer, config: AdamSOptimizerConfig
) -> AdamSChainedOptimizer | AdamSFsdpOptimizer:
    """Put AdamS in the place of every Adam in what Megatron has just built.

    Args:
        optimizer: a chain, or with Megatron-FSDP an optimizer alone; no inner one has state yet.
        config: with `optimizer == "adams"`; the parts keep a reference to it.
    Returns:
        The same object.
    """
    parts = _parts_of(optimizer)
    for part in parts:
        # The subclasses add no attribute and no constructor: only their methods differ.
        if isinstance(part, DistributedOptimizer):
            part.__class__ = AdamSFsdpOptimizer if _is_fsdp(part) else AdamSDistributedOptimizer
        if part.optimizer is not None:
            part.optimizer = _adams_from(part.optimizer, config)
            part.init_state_fn = init_state
            if config.adams_log_adamw_rms is not None:
                attach_shadow(part.optimizer, config.adams_log_adamw_rms)
            if config.adams_from_adam:
                part.optimizer.register_load_state_dict_pre_hook(take_from_adam)
            part.optimizer.register_load_state_dict_pre_hook(keep_own_form)
            if isinstance(part, AdamSFsdpOptimizer):
                part.prepare_inner()
                connect_update_sums(part)
                part.optimizer.compile_kernels(part.grad_dtype(), counts_updates=True)
                continue
            if isinstance(part, AdamSDistributedOptimizer):
                part.prepare_step()
            connect_update_sums(part)
            decoupled = config.main_grads_dtype if part.optimizer.use_decoupled_grad else None
            # Steps that are logged count their updates, and the first one is logged.
            part.optimizer.compile_kernels(decoupled, counts_updates=True)
    if isinstance(optimizer, ChainedOptimizer):
        optimizer.__class__ = AdamSChainedOptimizer
    if config.optimizer_cuda_graph:
        optimizer.prepare_cuda_graph()
    words = f"{ADAMS}: {_describe_state(parts)}; {optimizer.describe_passes()}"
    log_single_rank(logger, logging.INFO, words)
    return optimizer


def _describe_state(parts: Sequence[Any]) -> str:
    """What the inner optimizers of this rank will keep, in which dtypes, in bytes."""
    num_params = 0
    num_bytes: dict[tuple[str, torch.dtype], int] = {}
    num_offloaded = 0
    for part in parts:
        if isinstance(part.optimizer, HybridAdamS):
            num_offloaded += part.optimizer.num_offloaded
        for param in part.get_parameters():
            numel = local_part(param).numel()
            num_params += numel
            for name, dtype in part.optimizer.state_dtypes(param).items():
                size = numel * dtype.itemsize
                num_bytes[name, dtype] = num_bytes.get((name, dtype), 0) + size
    kept = [
        f"{name} in {'16-bit remainders' if dtype == torch.int16 else dtype_name(dtype)} "
        f"({size} bytes)"
        for (name, dtype), size in num_bytes.items()
    ]
    where = f", {num_offloaded} of them on the CPU" if num_offloaded else ""
    return (
        f"state is {' and '.join(kept) or 'empty'} for the {num_params} parameters of this "
        f"rank{where}"
    )


def _adams_from(adam: torch.optim.Optimizer, config: AdamSOptimizerConfig) -> InnerAdamS:
    # Taken over as they are: the dp shards in them are views, which torch's add_param_group
    # refuses, and Megatron holds the group dicts' own keys (wd_mult, max_lr, ...).
    adam_only = set(adam.defaults) - _SHARED_WITH_ADAM
    for group in adam.param_groups:
        for key in adam_only & group.keys():
            del group[key]
    adams = AdamS.from_param_groups(
        adam.param_groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        adam_w_mode=config.decoupled_weight_decay,
        **{name: getattr(config, f"adams_{name}") for name in _FORM},
        kernel=config.adams_kernel,
        max_update_rms=config.adams_max_update_rms,
        match_update_rms=config.adams_match_rms,
        capturable=config.optimizer_cuda_graph,
        **_storage(config),
    )
    return HybridAdamS(adams, config, _storage(config)) if config.optimizer_cpu_offload else adams


def _storage(config: AdamSOptimizerConfig) -> dict[str, Any]:
    """The arguments that Megatron would give to TransformerEngine's FusedAdam for its state.

    Without the precision-aware optimizer `finalize` has left every dtype at fp32.
    """
    storage: dict[str, Any] = {"exp_avg_dtype": config.exp_avg_dtype}
    if config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        # The model params are the inner optimizer's, which keeps the main params.
        is_fp32 = config.main_params_dtype == torch.float32
        storage |= {
            "master_weights": True,
            "use_decoupled_grad": True,
            "master_weight_dtype": config.main_params_dtype,
            "store_param_remainders": config.store_param_remainders and is_fp32,
        }
    return storage


def keep_own_form(optimizer: AdamS, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of AdamS's load_state_dict: the form of the update is that of this run's flags.

    None of them needs state, so each can be changed at a resume. Without this hook the checkpoint's
    would be taken, and the flag dropped in silence.
    """
    own = {name: optimizer.defaults[name] for name in _FORM}
    changed = {
        f"{name} is {value} here and {group[name]} in the checkpoint"
        for group in state_dict["param_groups"]
        for name, value in own.items()
        if group.get(name, value) != value
    }
    if changed:
        words = f"{ADAMS}: {', '.join(sorted(changed))}; the update has the form that is asked here"
        log_single_rank(logger, logging.INFO, words)
    groups = [{**group, **own} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def take_from_adam(optimizer: AdamS, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of AdamS's load_state_dict: an Adam's state becomes its own.

    Raises:
        ValueError: a parameter has no momentum in the checkpoint.
    """
    saved = state_dict["param_groups"]
    if not any(map(is_adam_group, saved)):
        # AdamS's own, which Megatron also passes through here to have state allocated.
        return state_dict
    adam_w_mode = optimizer.defaults["adam_w_mode"]
    converted = state_dict_from_adam(state_dict, adam_w_mode=adam_w_mode)
    # The distributed optimizer passes its groups alone through here.
    if converted["state"]:
        params = [index for group in saved for index in group["params"]]
        if missing := sorted(set(params) - converted["state"].keys()):
            raise refusal(
                "--adams-from-adam",
                f"the checkpoint has no momentum of {len(missing)} of {len(params)} parameters "
                f"(number {missing[0]} and so on): {ADAMS} would start them anew",
                "train the same parameters as the run that saved it, or load the weights alone "
                "with --no-load-optim",
            )
        steps = [int(state["step"]) for state in state_dict["state"].values() if "step" in state]
        steps += [int(group["step"]) for group in saved if "step" in group]
        message = continued_from_adam(len(params), len(params), max(steps, default=0))
        log_single_rank(logger, logging.INFO, message)
    return converted
