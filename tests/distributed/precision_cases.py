"""What the ranks of test_precision.py run, see cases.py."""

import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_adams.megatron.fused_step import FusedStepOptimizer
from megatron_adams.megatron.optimizer import AdamSChainedOptimizer
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
    """Train; before one step rank 1 alone finds a NaN or an inf in a gradient of its shard.

    Returns:
        As `cases.train`, and "changed": for each step, whether params or state on this rank did.
    """
    changed: list[bool] = []
    step = AdamSChainedOptimizer.step

    def poisoned_step(chain: Any) -> Any:
        if len(changed) == POISONED_STEP and RANK == 1:
            part = chain.chained_optimizers[-1]
            param = next(iter(part.model_param_group_index_map))
            start = part._get_model_param_range_map(param)["param"].start
            param.main_grad.view(-1)[start] = float(value)
        before = _bytes(chain)
        outcome = step(chain)
        changed.append(before != _bytes(chain))
        return outcome

    AdamSChainedOptimizer.step = poisoned_step
    return {**cases.train(argv), "changed": changed}


def _bytes(chain: Any) -> list[bytes]:
    tensors: list[torch.Tensor] = []
    for part in chain.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                tensors += [param.detach(), *part.optimizer.state.get(param, {}).values()]
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


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
        for chunk in built[0]:
            for name, param in chunk.named_parameters():
                loaded[name] = param.detach().clone()
        return built

    training.setup_model_and_optimizer = recording_setup
    cases.train(argv)
    return loaded
