"""What the ranks of test_offload.py run, see cases.py."""

from typing import Any

import torch

from megatron_adams.cpu_rehearsal import stand_ins
from megatron_adams.megatron.offload import HybridAdamS
from megatron_adams.optimizer import AdamS
from tests.distributed import cases, checkpoint_cases


def train(argv: str) -> dict[str, Any]:
    """Train with --optimizer-cpu-offload.

    Returns:
        As `cases.train`, and "offload": of each part what `_describe` returns; "rates": for every
        step and param, in the sub-optimizers' order, the lr and the weight decay that its
        sub-optimizer had, and its step before; "order": what happened in the first step, see
        `_record_order`; "pinned": whether pinned memory was asked for, each time, outside of and
        in the first step.
    """
    told: dict[str, Any] = {"rates": [], "order": [], "pinned": ([], [])}
    _record_pinning(told["pinned"])
    captured = checkpoint_cases.capture_setup()
    step = AdamS.step

    def recorded_step(optimizer: AdamS, *args: Any, **kwargs: Any) -> Any:
        told["rates"] += [
            (group["lr"], group["weight_decay"], group["step"])
            for group in optimizer.param_groups
            for _ in group["params"]
        ]
        return step(optimizer, *args, **kwargs)

    AdamS.step = recorded_step
    _record_order(told["order"])
    held = cases.train(argv)
    parts = [part for part in captured[1].chained_optimizers if part.optimizer is not None]
    return {**held, **told, "offload": [_describe(part.optimizer) for part in parts]}


def _describe(hybrid: HybridAdamS) -> dict[str, Any]:
    """Where a hybrid optimizer's params are.

    Returns:
        "params": of each, in order, its size and "cpu" or "gpu"; "kernels", "classes": of the
        sub-optimizers on either side; "num_cpu_optimizers"; "detached": has each CPU copy memory
        of its own; "equal": and the param's values; "grad_dtypes": of the gradients on the CPU;
        "state_keys": of the sub-optimizers, after Megatron has put an entry into the hybrid
        optimizer's; "saved_state": what state its own state dict has.
    """
    homes = {}
    for side, optimizers in _sides(hybrid).items():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                homes.update(dict.fromkeys(group["params"], side))
    params = [param for group in hybrid.param_groups for param in group["params"]]
    inner = {param: hybrid.param_to_inner_param[param] for param in params}
    for state in hybrid.state.values():
        state["of_megatron"] = 0
    copies = [(param, copy) for param, copy in inner.items() if homes[copy] == "cpu"]
    return {
        "params": [(param.numel(), homes[inner[param]]) for param in params],
        "kernels": {side: {o.kernel for o in subs} for side, subs in _sides(hybrid).items()},
        "classes": {type(optimizer).__name__ for optimizer in hybrid.sub_optimizers},
        "num_cpu_optimizers": len(hybrid.cpu_optimizers),
        "detached": all(param.data_ptr() != copy.data_ptr() for param, copy in copies),
        "equal": all(torch.equal(param.detach(), copy.detach()) for param, copy in copies),
        "grad_dtypes": {copy.decoupled_grad.dtype for _, copy in copies},
        "saved_state": hybrid.state_dict()["state"],
        "state_keys": {k for o in hybrid.sub_optimizers for s in o.state.values() for k in s},
    }


def _sides(hybrid: HybridAdamS) -> dict[str, list[AdamS]]:
    on_gpu = [] if hybrid.gpu_optimizer is None else [hybrid.gpu_optimizer]
    return {"cpu": hybrid.cpu_optimizers, "gpu": on_gpu}


def _record_pinning(pinned: tuple[list[bool], list[bool]]) -> None:
    """Record what `torch.empty` is asked for where it is asked for host memory."""
    empty = torch.empty

    def recording_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "pin_memory" in kwargs and kwargs.get("device") == "cpu":
            pinned[_is_stepping[0]].append(kwargs["pin_memory"])
        return empty(*args, **kwargs)

    torch.empty = recording_empty


_is_stepping = [False]


def _record_order(order: list[str]) -> None:
    """Record the first step's waits, copies and sub-optimizer steps.

    "d2h waits", "copies" (gradients to the CPU are asked for), "synchronize" (the CPU waits for
    them), "cpu step", "gpu step".
    """
    step, copy_grads = HybridAdamS.step, HybridAdamS._set_sub_optimizer_grads
    sub_step = AdamS.step
    synchronize, wait_stream = stand_ins._Event.synchronize, stand_ins._Stream.wait_stream
    under_way: list[HybridAdamS] = []

    def note(what: str) -> None:
        if _is_stepping[0]:
            order.append(what)

    def noted_step(hybrid: HybridAdamS, *args: Any, **kwargs: Any) -> Any:
        _is_stepping[0] = not under_way
        under_way.append(hybrid)
        try:
            return step(hybrid, *args, **kwargs)
        finally:
            _is_stepping[0] = False

    def noted_copies(hybrid: HybridAdamS) -> None:
        note("copies")
        copy_grads(hybrid)

    def noted_sub_step(optimizer: AdamS, *args: Any, **kwargs: Any) -> Any:
        note("gpu step" if optimizer is under_way[0].gpu_optimizer else "cpu step")
        return sub_step(optimizer, *args, **kwargs)

    def noted_synchronize(event: Any) -> None:
        note("synchronize")
        synchronize(event)

    def noted_wait_stream(stream: Any, other: Any) -> None:
        if under_way and stream is under_way[0]._d2h_stream:
            note("d2h waits")
        wait_stream(stream, other)

    HybridAdamS.step, HybridAdamS._set_sub_optimizer_grads = noted_step, noted_copies
    AdamS.step = noted_sub_step
    stand_ins._Event.synchronize = noted_synchronize
    stand_ins._Stream.wait_stream = noted_wait_stream
