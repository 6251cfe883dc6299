"""What the ranks of test_fsdp2.py run: torch's FSDP2 with AdamS, without Megatron."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from megatron_adams import AdamS

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
STORAGE: dict[str, dict[str, Any]] = {
    "fp32": {},
    "masters": {"master_weights": True},
    "small": {
        "master_weights": True,
        "store_param_remainders": True,
        "exp_avg_dtype": torch.bfloat16,
    },
}
NUM_STEPS = 6


def build_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Sizes that no number of ranks divides; the last bias leaves some of four ranks empty."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 14), nn.GELU(), nn.Linear(14, 3)).to(dtype)


def shard(model: nn.Sequential, mesh: Any = None) -> nn.Sequential:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def batch_of(step: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Every rank sees the same batch: the mean over 1, 2 or 4 ranks is exact."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        model(batch_of(step).to(dtype)).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.dtype == torch.int16:
        tensor = tensor.int()  # gloo gathers no int16
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, and the state as it is stored, in full."""
    held = {}
    for name, param in model.named_parameters():
        held[name] = whole(param)
        for key, state in optimizer.state[param].items():
            held[f"{name}.{key}"] = whole(state)
    return held


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def sharded_beside_whole(storage: str) -> dict[str, Any]:
    """Train a sharded model, and the same one unsharded.

    Returns:
        "differences": names of the tensors whose bits differ; "num_states": how many there are.
    """
    dist.init_process_group("gloo")
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    held = []
    for place in (shard, lambda model: model):
        model = place(build_model(dtype=dtype))
        optimizer = AdamS(model.parameters(), **OPTIONS, **STORAGE[storage])
        train(model, optimizer, range(NUM_STEPS))
        held.append(held_by(model, optimizer))
    return {"differences": differences(*held), "num_states": len(held[0]) - 4}


def save(folder: str, storage: str) -> dict[str, Tensor]:
    """Train half of the steps, save, go on; return what is held at the end."""
    dist.init_process_group("gloo")
    model, optimizer = _build(storage, seed=0)
    train(model, optimizer, range(NUM_STEPS // 2))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, range(NUM_STEPS // 2, NUM_STEPS))
    return held_by(model, optimizer)


def resume(folder: str, storage: str) -> dict[str, Any]:
    """Load what `save` saved into another model, and train the other half.

    Returns:
        "held": as `save`; "group": the param group, without params.
    """
    dist.init_process_group("gloo")
    model, optimizer = _build(storage, seed=9)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    train(model, optimizer, range(NUM_STEPS // 2, NUM_STEPS))
    (group,) = optimizer.param_groups
    return {
        "held": held_by(model, optimizer),
        "group": {key: value for key, value in group.items() if key != "params"},
    }


def _build(storage: str, *, seed: int) -> tuple[nn.Module, AdamS]:
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    model = shard(build_model(seed, dtype))
    return model, AdamS(model.parameters(), **OPTIONS, **STORAGE[storage])


def spread_whole_state() -> list[str]:
    """Gather model and optimizer on rank 0, and spread them over the ranks of another model.

    Returns:
        The names of tensors that differ after it.
    """
    (source, target), options = _gathered_on_rank_0(AdamS)
    set_model_state_dict(target[0], source["weights"], options=options)
    set_optimizer_state_dict(*target, source["state"], options=options)
    return differences(source["held"], held_by(*target))


def spread_whole_state_in_one_call() -> None:
    """The same by torch's `set_state_dict`, and with torch's AdamW."""
    (source, target), options = _gathered_on_rank_0(torch.optim.AdamW)
    set_state_dict(
        *target,
        model_state_dict=source["weights"],
        optim_state_dict=source["state"],
        options=options,
    )
    # Where one rank has left, the other one waits for it: it now fails.
    dist.destroy_process_group()


def _gathered_on_rank_0(optimizer_class: Callable[..., Any]) -> tuple[Any, StateDictOptions]:
    dist.init_process_group("gloo")
    model, other = shard(build_model(0)), shard(build_model(9))
    optimizer, target = (optimizer_class(each.parameters(), **OPTIONS) for each in (model, other))
    train(model, optimizer, range(2))
    gathering = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=gathering)
    assert bool(weights) == (dist.get_rank() == 0)
    source = {"weights": weights, "state": state, "held": held_by(model, optimizer)}
    spreading = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    return (source, (other, target)), spreading


# --- the update RMS -----------------------------------------------------------------------------

GRADS = ((0.5, 2.0), (-1.5, 0.25), (3.0, -0.125))
"""The gradient of each step, as a factor of the param before training, and a summand."""


def _over_all(model: nn.Sequential) -> nn.Sequential:
    return shard(model, init_device_mesh("cpu", (4,)))


def _with_copies(model: nn.Sequential) -> nn.Sequential:
    return shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))


def _with_tensor_parallelism(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    return shard(model, mesh["dp"])


LAYOUTS = {
    "shard": _over_all,
    "hsdp": _with_copies,
    "tensor_parallel": _with_tensor_parallelism,
}


def guarded_steps(layout: str, guard: dict[str, float]) -> list[dict[str, Any]]:
    """Take steps with a cap or a target of the update's RMS, or with neither.

    Args:
        layout: of `LAYOUTS`.
        guard: AdamS's arguments.
    Returns:
        For the sharded params, and for the same ones unsharded: "start", "params": before the first
        step and after the last, in full; "rms", "factors": of the last step.
    """
    dist.init_process_group("gloo")
    found = []
    for place in (LAYOUTS[layout], lambda model: model):
        params = [*place(build_model()).parameters()]
        starts = [param.detach().clone() for param in params]
        optimizer = AdamS(params, **OPTIONS, **guard)
        optimizer.wants_update_rms = True
        for factor, summand in GRADS:
            for param, start in zip(params, starts, strict=True):
                # Elementwise, and each operation rounds once: no layout changes a bit.
                param.grad = start * factor + summand
            optimizer.step()
        found.append(
            {
                "start": [whole(start) for start in starts],
                "params": [whole(param) for param in params],
                "rms": optimizer.update_rms(),
                "factors": optimizer.update_factors(),
            }
        )
    return found
