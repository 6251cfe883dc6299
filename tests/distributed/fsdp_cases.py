"""What the ranks of the Megatron-FSDP tests run."""

import sys
from typing import Any

import torch

from megatron_adams.optimizer import AdamS
from tests.distributed.cases import TINY_GPT, run_script
from tests.distributed.flag_cases import parse


def train(argv: str, base: str = TINY_GPT) -> dict[str, Any]:
    """Run the example's pretraining script and return what the optimizer did and holds.

    Returns:
        "losses", "grad_norms", "num_zeros", "skipped": as cases.train; "classes": Megatron's
        optimizer's and the inner one's; "backends": what the inner optimizer's last step ran on
        this rank; "keeps_tables": whether the next step can launch the same pointers; and as
        `held_by`.
    """
    held = run_script(argv, base)
    (model,), optimizer = held.pop("model"), held.pop("optimizer")
    inner = optimizer.optimizer
    held["classes"] = type(optimizer).__name__, type(inner).__name__
    if isinstance(inner, AdamS):
        plans = inner._plans.values()
        held["backends"] = {backend for plan in plans for backend, _ in plan.tables}
        held["keeps_tables"] = all(plan.signature is not None for plan in plans)
    return {**held, **held_by(model, inner)}


def held_by(model: Any, inner: torch.optim.Optimizer) -> dict[str, Any]:
    """What the inner optimizer holds.

    Returns:
        "params": each param by name, see `describe`; "groups": the param groups without params.
    """
    names = {
        id(param): name for name, param in model.param_and_grad_buffer.optimizer_named_parameters
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    params = {
        names[id(param)]: describe(param, inner)
        for group in inner.param_groups
        for param in group["params"]
    }
    return {"groups": groups, "params": params}


def describe(param: torch.Tensor, inner: torch.optim.Optimizer) -> dict[str, Any]:
    """A param of the inner optimizer.

    Returns:
        "param": in full, gathered from all ranks; "state": the same of each state tensor as it is
        stored (fp8 as uint8); "num_local": how many elements this rank has; "num_bytes": what all
        state tensors take on this rank; "placements": as text, of the param and
        of each state that is a DTensor.
    """
    if isinstance(inner, AdamS):
        # Allocated by the first step, on ranks that have a part of the param.
        inner.initialize_state(param)
    state = inner.state.get(param, {})
    return {
        "param": full(param),
        "state": {name: full(tensor) for name, tensor in state.items()},
        "num_local": param.to_local().numel(),
        "num_bytes": sum(local(tensor).nbytes for tensor in state.values()),
        "placements": [
            str(tensor.placements)
            for tensor in (param, *state.values())
            if isinstance(tensor, torch.distributed.tensor.DTensor)
        ],
    }


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def full(tensor: Any) -> torch.Tensor:
    """Gathered from the ranks of its mesh; every rank of the job calls this."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import uneven_dtensor

    tensor = tensor.detach()
    if not isinstance(tensor, torch.distributed.tensor.DTensor):
        return tensor.clone()
    part = tensor.to_local()
    if part.dtype.itemsize == 1:
        # Megatron allows no fp8 tensor to be unpickled.
        part = part.view(torch.uint8)
    # Megatron's uneven_dtensor_to_full_tensor needs a backend that gathers parts of unlike sizes.
    chunk = uneven_dtensor.gather_and_compute_chunk_metadata(tensor)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (chunk.offsets, part.clone()))
    gathered = torch.zeros(tensor.shape, dtype=part.dtype)
    for rank in tensor.device_mesh.mesh.flatten().tolist():
        offsets, part = parts[rank]
        places = zip(offsets, part.shape, strict=True)
        gathered[tuple(slice(start, start + size) for start, size in places)] = part
    return gathered


def state_after_load(argv: str) -> dict[str, Any]:
    """Load a checkpoint, and leave: "groups" and "params" as `train`."""
    from megatron.training import training

    setup = training.setup_model_and_optimizer
    told: dict[str, Any] = {}

    def setup_and_leave(*args: Any, **kwargs: Any) -> Any:
        (model,), optimizer, _ = setup(*args, **kwargs)
        told.update(held_by(model, optimizer.optimizer))
        raise _LoadedError

    training.setup_model_and_optimizer = setup_and_leave
    try:
        run_script(argv)
    except _LoadedError:
        return told
    sys.exit("Megatron did not set the model up")


class _LoadedError(Exception):
    """Everything is loaded, and has been looked at."""


def refusals_of_versions(argv: str) -> dict[str, str | None]:
    """What a command line is refused with, by the version of Megatron-FSDP that it asks for.

    Up to Megatron 0.19 there is no flag for it, so it is put among the arguments.
    """
    from megatron_adams.megatron.refusals import check_arguments

    args = parse(argv)
    answers: dict[str, str | None] = {}
    for version in (1, 2):
        args.optimizer, args.megatron_fsdp_version = "adams", version
        try:
            check_arguments(args)
        except ValueError as exc:
            answers[str(version)] = str(exc)
        else:
            answers[str(version)] = None
    return answers
