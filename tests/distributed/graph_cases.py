"""What the ranks of test_cuda_graph.py run: training whose optimizer step is captured."""

import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.optimizer_cuda_graph import OptimizerCudaGraphWrapper

from megatron_adams import AdamS
from megatron_adams.cpu_rehearsal import flags
from megatron_adams.megatron import cuda_graph
from megatron_adams.megatron.distributed import AdamSChainedOptimizer
from tests.distributed import cases, fused_cases, module_cases
from tests.harness import cuda_graph_stand_in

RANK = int(os.environ.get("RANK", "0"))


def train(argv: str, disturbance: str | None = None, setting: str | None = None) -> dict[str, Any]:
    """Train as `cases.train`, with a stand-in for CUDA graphs (see there).

    Args:
        disturbance: a name of DISTURBANCES, set up before training.
        setting: a name of fused_cases.SETTINGS.
    Returns:
        What `cases.train` returns, and "num_steps": how often Python has run the inner step;
        "rates": the learning rate after each iteration; "counts": every group's step at the end;
        "recorded", "num_replays": of the graph, if one was captured.
    """
    from megatron.training import training

    watched: dict[str, Any] = {"num_steps": 0, "rates": []}
    # It is refused in a rehearsal: a user's has no such stand-in.
    flags.REFUSED_FLAGS.pop("--optimizer-cuda-graph")
    if setting is not None:
        fused_cases.SETTINGS[setting]()
    if disturbance is not None:
        DISTURBANCES[disturbance]()
    step, train_step = AdamS.step, training.train_step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        watched["num_steps"] += 1
        return step(*args, **kwargs)

    def watched_train_step(*args: Any, **kwargs: Any) -> Any:
        outcome = train_step(*args, **kwargs)
        watched["rates"].append([float(group["lr"]) for group in args[3].param_groups])
        return outcome

    AdamS.step = watched_step  # type: ignore[method-assign]
    training.train_step = watched_train_step
    with cuda_graph_stand_in.installed():
        held = cases.train(argv)
    groups = [group for part in held["parts"] for group in part["groups"]]
    watched["counts"] = [int(group["step"]) for group in groups]
    for graph in cuda_graph_stand_in.captured:
        watched |= {"recorded": graph.recorded, "num_replays": graph.num_replays}
    return {**held, **watched}


def train_module(captures: bool, **settings: Any) -> dict[str, Any]:
    """Train as `module_cases.train`, by megatron.core's API and its wrapper of the step.

    Args:
        captures: the third step, and replay it.
        settings: of `module_cases.train`, without `fields`.
    Returns:
        What that returns, and "counts", "num_steps", "num_replays" as `train`'s.
    """
    watched: dict[str, Any] = {"num_steps": 0, "num_replays": 0}
    build, step = module_cases.get_megatron_optimizer, AdamSChainedOptimizer.step

    def build_and_wrap(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs)
        if captures:
            optimizer.step = OptimizerCudaGraphWrapper(optimizer.step, cuda_graph_warmup_steps=2)
        return optimizer

    def watched_step(chain: Any) -> Any:
        watched["num_steps"] += 1
        return step(chain)

    module_cases.get_megatron_optimizer = build_and_wrap
    AdamSChainedOptimizer.step = watched_step
    with cuda_graph_stand_in.installed():
        told = module_cases.train(fields={"optimizer_cuda_graph": captures}, **settings)
    watched["counts"] = [int(group["step"]) for group in told["groups"]]
    for graph in cuda_graph_stand_in.captured:
        watched["num_replays"] = graph.num_replays
    return {**told, **watched}


# --- disturbances ------------------------------------------------------------------------------


def read_the_norm() -> None:
    """A stray .item() in the middle of the step."""
    original = cuda_graph.grad_norm

    def reading(*args: Any, **kwargs: Any) -> torch.Tensor:
        norm = original(*args, **kwargs)
        print("norm", norm.item())
        return norm

    cuda_graph.grad_norm = reading


def use_megatrons_norm() -> None:
    """Leave the norm to Megatron's own code without TransformerEngine."""
    cuda_graph.norm_stays = lambda: False


def change_weight_decay() -> None:
    """A scheduler that does not keep weight decay, as a checkpoint's can be."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def growing(self: Any, param_group: Any = None) -> float:
        return 0.1 + 1e-3 * self.num_steps

    OptimizerParamScheduler.get_wd = growing


def reduce_in_bf16() -> None:
    """Gradients in the params' dtype, which megatron.core's API allows, and Megatron converts."""
    from megatron.core.distributed import DistributedDataParallelConfig

    original = DistributedDataParallelConfig.__post_init__

    def bf16_grads(config: Any) -> None:
        config.grad_reduce_in_fp32 = False
        original(config)

    DistributedDataParallelConfig.__post_init__ = bf16_grads


def forget_gradients() -> None:
    """The converted gradients stay where each step has put them."""
    cuda_graph.GradKeeper.__call__ = lambda *args: None  # type: ignore[method-assign]
    reduce_in_bf16()


DISTURBANCES: dict[str, Callable[[], None]] = {
    "read_the_norm": read_the_norm,
    "use_megatrons_norm": use_megatrons_norm,
    "change_weight_decay": change_weight_decay,
    "reduce_in_bf16": reduce_in_bf16,
    "forget_gradients": forget_gradients,
}
