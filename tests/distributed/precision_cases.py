"""What the ranks of test_precision.py run, see cases.py."""

import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_adams.megatron.distributed import (
    AdamSChainedOptimizer,
    AdamSDistributedOptimizer,
    init_state,
)
from megatron_adams.megatron.fused_step import FusedStepOptimizer
from megatron_adams.precision import split_master
from tests.distributed import cases

RANK = int(os.environ.get("RANK", "0"))
POISONED_STEP = 2


def train_rounding_ties_away(argv: str) -> dict[str, Any]:
    """Train with fp32 main params, whose copies round as the params of remainders do."""

    def copy_main_params(self: FusedStepOptimizer) -> None:
        pairs = zip(self.model_float16_groups, self.shard_fp32_from_float16_groups, strict=True)
        for model_params, main_params in pairs:
            for model_param, main_param in zip(model_params, main_params, strict=True):
                self._param_buffer_shard(model_param).copy_(split_master(main_param.detach())[0])

    FusedStepOptimizer.why_params_are_copied = lambda self: "the test rounds them"
    FusedStepOptimizer._copy_main_params_to_model_params = copy_main_params
    return cases.train(argv)


def train_poisoned(argv: str, value: str) -> dict[str, Any]:
    """Train; in the backward pass of one step rank 1 alone gets a NaN or an inf in a gradient.

    Returns:
        As `cases.train`, and "changed": for each step, whether params or state on this rank did.
    """
    from megatron.training import training

    changed: list[bool] = []
    train_step = training.train_step

    def poison(grad: torch.Tensor) -> torch.Tensor:
        return grad.index_fill(0, torch.tensor([0]), float(value))

    def poisoned_train_step(
        step_func: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **kw: Any
    ) -> Any:
        hooks = []
        if len(changed) == POISONED_STEP and RANK == 1:
            hooks.append(next(model[0].parameters()).register_hook(poison))
        before = _bytes(optimizer)
        outcome = train_step(step_func, data, model, optimizer, *rest, **kw)
        changed.append(before != _bytes(optimizer))
        for hook in hooks:
            hook.remove()
        return outcome

    training.train_step = poisoned_train_step
    return {**cases.train(argv), "changed": changed}


def _bytes(chain: Any) -> list[bytes]:
    tensors: list[torch.Tensor] = []
    for part in chain.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                tensors += [param.detach(), *part.optimizer.state.get(param, {}).values()]
    return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def train_reloading(argv: str) -> dict[str, Any]:
    """Train; after the first step the model params are doubled and reloaded as main params.

    Returns:
        As `cases.train`, and "reloaded": is every main param then its model param.
    """
    told: list[bool] = []
    step = AdamSChainedOptimizer.step

    def reloading_step(chain: Any) -> Any:
        outcome = step(chain)
        if not told:
            for part in chain.chained_optimizers:
                for param in part.model_param_group_index_map:
                    param.data.mul_(2)
            chain.reload_model_params()
            for part in chain.chained_optimizers:
                for param in part.model_param_group_index_map:
                    inner = part._inner_param(param)
                    main = part.optimizer.get_unscaled_state(inner, "master_param")
                    told.append(torch.equal(main, inner.detach().float()))
        return outcome

    AdamSChainedOptimizer.step = reloading_step
    return {**cases.train(argv), "reloaded": told}


def params_after_load(argv: str) -> dict[str, torch.Tensor]:
    """Load a checkpoint, and return the model's params before the first forward pass."""
    from megatron.training import training

    loaded: dict[str, torch.Tensor] = {}
    setup: Callable[..., Any] = training.setup_model_and_optimizer

    def recording_setup(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        for chunk_index, chunk in enumerate(built[0]):
            for name, param in chunk.named_parameters():
                loaded[f"{chunk_index}.{name}"] = param.detach().clone()
        return built

    training.setup_model_and_optimizer = recording_setup
    cases.train(argv)
    return loaded


def params_after_load_halfway(argv: str) -> dict[str, Any]:
    """Load a checkpoint whose main params all seem to lie half way between two bf16 numbers.

    Returns:
        "params": the model's before the first forward pass; "rounded": how many params of this
        rank's shards differ from their main params, rounded to even.
    """
    from megatron.training import training

    told: dict[str, Any] = {"params": {}, "rounded": 0}
    setup: Callable[..., Any] = training.setup_model_and_optimizer
    set_state = AdamSDistributedOptimizer._set_main_param_and_optimizer_states

    def set_halfway(part: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        bits = tensors["param"].view(torch.int32) & ~0xFFFF | 0x8000
        tensors = {**tensors, "param": bits.view(torch.float32)}
        set_state(part, model_param, tensors)
        to_even = tensors["param"].to(torch.bfloat16)
        told["rounded"] += int((part._inner_param(model_param) != to_even).sum())

    def recording_setup(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        for name, param in built[0][0].named_parameters():
            told["params"][name] = param.detach().clone()
        return built

    AdamSDistributedOptimizer._set_main_param_and_optimizer_states = set_halfway
    training.setup_model_and_optimizer = recording_setup
    cases.train(argv)
    return told


def pointers_over_load(argv: str) -> list[tuple[list[int], list[int]]]:
    """Load a checkpoint; return for each optimizer where its state was before, and is after."""
    told: list[tuple[list[int], list[int]]] = []
    load = AdamSDistributedOptimizer.load_state_dict

    def pointers(part: Any) -> list[int]:
        states = part.optimizer.state.values()
        return [tensor.data_ptr() for state in states for tensor in state.values()]

    def watched_load(part: Any, state_dict: Any) -> None:
        init_state(part.optimizer)
        before = pointers(part)
        load(part, state_dict)
        told.append((before, pointers(part)))

    AdamSDistributedOptimizer.load_state_dict = watched_load
    cases.train(argv)
    return told
