"""What the ranks of test_update_rms.py run: training whose updates are recorded, step by step."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer

from megatron_adams.kernels import select_backend
from megatron_adams.megatron.update_rms import UpdateStats
from tests.distributed import cases


def train_under(argv: str, dtype: str) -> dict[str, Any]:
    """Train as `cases.train`, in a program whose default dtype is another."""
    torch.set_default_dtype(getattr(torch, dtype))
    return cases.train(argv)


def train(argv: str, base: str = cases.TINY_GPT) -> dict[str, Any]:
    """Train as `cases.train`, with what the log is about.

    Returns:
        What `cases.train` returns; "stats": (rms, num_scaled, num_tensors) of each logged step;
        "scalars": what went to TensorBoard, {name: {iteration: value}}; "rms": of each step the
        RMS that the inner optimizers know of the whole params of their shards, by name, None where
        they did not count; "updates": of each step the update of each shard, in float64, before
        factor, lr and weight decay, with whether it counts once in the model: "counts";
        "num_late_kernels": how many kernels were chosen, and compiled, inside the steps.
    """
    from megatron.training import training

    from megatron_adams.megatron.training import writers

    held: dict[str, Any] = {"stats": [], "rms": [], "updates": [], "scalars": {}}
    held["num_late_kernels"] = 0

    class Writer:
        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            if name.startswith("adams/"):
                held["scalars"].setdefault(name, {})[iteration] = value

    class WandbWriter:
        def log(self, values: dict[str, float], iteration: int) -> None:
            for name, value in values.items():
                assert held["scalars"][name][iteration] == value
                held["num_wandb"] = held.get("num_wandb", 0) + 1

    of = UpdateStats.of
    train_step = training.train_step

    def recorded_of(chain: Any) -> UpdateStats:
        stats = of(chain)
        held["stats"].append((stats.rms, stats.num_scaled, stats.num_tensors))
        return stats

    def recorded_train_step(*args: Any, **kwargs: Any) -> Any:
        num_kernels = select_backend.cache_info().misses
        chain = args[3]
        parts = [part for part in chain.chained_optimizers if not part.is_stub_optimizer]
        updates: list[dict[str, Any]] = []
        before = []

        def record(optimizer: Any, _: Any, kwargs: dict[str, Any]) -> None:
            scale = kwargs.get("grad_scale", 1.0)
            for group in optimizer.param_groups:
                for param in group["params"]:
                    grad = param.decoupled_grad if optimizer.use_decoupled_grad else param.grad
                    exp_avg = optimizer.state.get(param, {}).get("exp_avg")
                    exp_avg = (
                        torch.zeros_like(param, dtype=torch.float32)
                        if exp_avg is None
                        else optimizer.get_unscaled_state(param, "exp_avg")
                    )
                    before.append((param, (grad.float() * scale).double(), exp_avg.double(), group))

        handles = [part.optimizer.register_step_pre_hook(record) for part in parts]
        outcome = train_step(*args, **kwargs)
        held["num_late_kernels"] += select_backend.cache_info().misses - num_kernels
        for handle in handles:
            handle.remove()
        owner = {param: part for part in parts for param in part.get_parameters()}
        for param, grad, exp_avg, group in before:
            beta1, beta2 = group["betas"]
            v = beta2 * exp_avg**2 + (1 - beta2) * grad**2
            update = (beta1 * exp_avg + (1 - beta1) * grad) / (v.sqrt() + group["eps"])
            part = owner[param]
            counts = not getattr(param, "shared", False) and (
                getattr(param, "tensor_model_parallel", False) or part.tp_group.rank() == 0
            )
            if not isinstance(part, DistributedOptimizer):
                # Its dp ranks have the same params.
                counts = counts and _dp_rank(param) == 0
            updates.append(
                {"sum": update.square().sum().item(), "numel": update.numel(), "counts": counts}
            )
        held["updates"].append(updates)
        held["rms"].append(_whole_rms(chain, parts))
        return outcome

    UpdateStats.of = recorded_of  # type: ignore[method-assign]
    training.train_step = recorded_train_step
    writers.get_tensorboard_writer = Writer
    writers.get_wandb_writer = WandbWriter
    try:
        held |= cases.train(argv, base=base)
    finally:
        UpdateStats.of = of  # type: ignore[method-assign]
    return held


def _dp_rank(param: Any) -> int:
    if getattr(param, "allreduce", True):
        return int(parallel_state.get_data_parallel_rank())
    return int(parallel_state.get_expert_data_parallel_rank())


def _whole_rms(chain: Any, parts: list[Any]) -> dict[str, torch.Tensor] | None:
    """The RMS and the factor of the whole of each param that this rank has a shard of, by name."""
    if not all(part.optimizer.is_counted for part in parts):
        return None
    names = {
        param: f"{index}.{name}"
        for index, chunk in enumerate(chain.model_chunks)
        for name, param in chunk.named_parameters()
    }
    known = {}
    for number, part in enumerate(parts):
        params = part.get_parameters()
        model_params = {
            part.optimizer.param_groups[group]["params"][order]: model_param
            for model_param, (group, order) in getattr(
                part, "model_param_group_index_map", {}
            ).items()
        }
        rms, factors = part.optimizer.update_rms(), part.optimizer.update_factors()
        for i, param in enumerate(params):
            kind = "" if getattr(param, "allreduce", True) else "experts."
            # Of other optimizers Megatron does not know the chunks.
            name = names.get(model_params.get(param, param), f"{kind}{number}.{i}")
            known[name] = torch.stack((rms[i], factors[i]))
    return known
