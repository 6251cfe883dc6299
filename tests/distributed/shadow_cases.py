"""What the ranks of test_adamw_shadow.py run: training, and beside it AdamW in float64."""

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_adams.megatron.adamw_shadow import shadow_of
from megatron_adams.megatron.update_rms import UpdateStats
from megatron_adams.optimizer import local_part
from tests.distributed import cases


def train(argv: str, base: str = cases.TINY_GPT) -> dict[str, Any]:
    """Train as `cases.train`, or with Megatron-FSDP, and compute AdamW's updates.

    Returns:
        "losses"; "model": for each param; "adamw_rms", "rms": of each logged step, as it is known
        to this rank; "exact": of each step the sum of the squares of AdamW's updates, in float64,
        and the number of elements, of the params that count on this rank; "scalars": what went to
        TensorBoard, {iteration: value}.
    """
    from megatron.training import training

    from megatron_adams.megatron.training import writers

    held: dict[str, Any] = {"adamw_rms": [], "rms": [], "exact": [], "scalars": {}}
    of, train_step = UpdateStats.of, training.train_step

    class Writer:
        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            if name == "adams/adamw-update-rms":
                held["scalars"][iteration] = value

    def recorded_of(chain: Any) -> UpdateStats:
        stats = of(chain)
        held["rms"].append(stats.rms)
        held["adamw_rms"].append(stats.adamw_rms)
        return stats

    moments: dict[Tensor, list[Tensor]] = {}

    def recorded_train_step(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[3]
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        parts = [part for part in parts if not part.is_stub_optimizer]
        total = [0.0, 0]

        def record(inner: Any, _: Any, kwargs: dict[str, Any]) -> None:
            for group in inner.param_groups:
                for param in group["params"]:
                    grad = param.decoupled_grad if inner.use_decoupled_grad else param.grad
                    if grad is None:
                        continue
                    grad = (local_part(grad).float() * kwargs.get("grad_scale", 1.0)).double()
                    zeros = [torch.zeros_like(grad) for _ in range(2)]
                    exp_avg, exp_avg_sq = moments.setdefault(param, zeros)
                    beta1, beta2 = group["betas"][0], 0.9
                    exp_avg.mul_(beta1).add_((1 - beta1) * grad)
                    exp_avg_sq.mul_(beta2).add_((1 - beta2) * grad**2)
                    step = len(held["exact"]) + 1
                    update = exp_avg / (1 - beta1**step)
                    update /= (exp_avg_sq / (1 - beta2**step)).sqrt() + group["eps"]
                    if _counts(param, owner[param]):
                        total[0] += update.square().sum().item()
                        total[1] += update.numel()

        owner = {param: part for part in parts for param in part.get_parameters()}
        handles = [part.optimizer.register_step_pre_hook(record) for part in parts]
        outcome = train_step(*args, **kwargs)
        held["exact"].append(tuple(total))
        for handle in handles:
            handle.remove()
        return outcome

    UpdateStats.of = recorded_of  # type: ignore[method-assign]
    training.train_step = recorded_train_step
    writers.get_tensorboard_writer = Writer
    try:
        run = cases.run_script(argv, base=base)
    finally:
        UpdateStats.of = of  # type: ignore[method-assign]
    optimizer, model = run.pop("optimizer"), run.pop("model")
    held["losses"] = run["losses"]
    held["model"] = {
        f"{index}.{name}": local_part(param.detach()).clone()
        for index, chunk in enumerate(model)
        for name, param in chunk.named_parameters()
    }
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    held["has_shadow"] = [shadow_of(part.optimizer) is not None for part in parts]
    return held


def _counts(param: Tensor, part: Any) -> bool:
    """Whether this rank's elements of a param count in the sum over all ranks."""
    if getattr(param, "shared", False):
        return False
    if not (getattr(param, "tensor_model_parallel", False) or part.tp_group.rank() == 0):
        return False
    is_sharded = hasattr(part, "data_parallel_group")
    return is_sharded or int(parallel_state.get_data_parallel_rank()) == 0
