"""Steps of AdamS(capturable=True), captured and not, on a GPU or on a stand-in for CUDA graphs.

For tests/unit/test_capturable.py and tests/gpu/test_capturable.py.
"""

import math
from typing import Any

import torch

from megatron_adams import AdamS

RATES = [3e-4, 1e-3, 7e-4, 1.3e-4, 9e-4, 1e-5]
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "bias_correction": {"bias_correction": True},
    "foreach": {"bias_correction": True, "kernel": "foreach"},
    "bf16_remainders": {
        "dtype": torch.bfloat16,
        "master_weights": True,
        "store_param_remainders": True,
        "exp_avg_dtype": torch.bfloat16,
    },
    "bf16_fp8_exp_avg": {
        "dtype": torch.bfloat16,
        "master_weights": True,
        "exp_avg_dtype": torch.float8_e4m3fn,
    },
    "fp16_main_params": {
        "dtype": torch.bfloat16,
        "master_weights": True,
        "master_weight_dtype": torch.float16,
        "exp_avg_dtype": torch.float16,
    },
}


def build(
    capturable: bool,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[list[torch.nn.Parameter], AdamS]:
    """Three groups, one of them without params."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(size, generator=generator).to(device, dtype))
        for size in (5, 20000, 3)
    ]
    groups = [
        {"params": params[:2], "weight_decay": 0.1},
        {"params": [], "weight_decay": 0.0},
        {"params": params[2:], "weight_decay": 0.0},
    ]
    return params, AdamS(groups, capturable=capturable, **options)


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    """Write this step's gradients to where the last step's were."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(torch.randn(param.shape, generator=generator))


def set_rate(optimizer: AdamS, lr: float) -> None:
    """Set the rate in the way of Megatron's OptimizerParamScheduler and torch's schedulers."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def assert_same(
    mine: tuple[list[torch.nn.Parameter], AdamS], theirs: tuple[list[torch.nn.Parameter], AdamS]
) -> None:
    (my_params, my_optimizer), (their_params, their_optimizer) = mine, theirs
    for my_param, their_param in zip(my_params, their_params, strict=True):
        assert torch.equal(my_param, their_param)
        my_state, their_state = my_optimizer.state[my_param], their_optimizer.state[their_param]
        assert my_state.keys() == their_state.keys()
        for name in my_state:
            my_full = my_optimizer.get_unscaled_state(my_param, name)
            assert torch.equal(my_full, their_optimizer.get_unscaled_state(their_param, name))
    mine_saved, theirs_saved = my_optimizer.state_dict(), their_optimizer.state_dict()
    assert mine_saved["param_groups"] == theirs_saved["param_groups"]


def run_captured(
    params: list[torch.nn.Parameter], optimizer: AdamS, steps: range, **scalars: Any
) -> Any:
    """One step as it is, then the same captured and replayed."""
    graph = None
    for step in steps:
        set_rate(optimizer, RATES[step])
        set_grads(params, step)
        if step == steps[0]:
            optimizer.step(**scalars)
            continue
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step(**scalars)
        graph.replay()
    return graph


def run_eager(params: list[torch.nn.Parameter], optimizer: AdamS, steps: range) -> None:
    for step in steps:
        set_rate(optimizer, RATES[step])
        set_grads(params, step)
        optimizer.step()


def steps_until_one(beta1: float) -> list[int]:
    """All steps up to the one from which on the bias correction is 1 in fp32."""
    last = int(math.log(2.0**-26) / math.log(beta1)) + 2
    return list(range(1, last + 1))
