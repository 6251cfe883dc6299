"""--optimizer-cuda-graph: Megatron's whole optimizer step, captured once and replayed.

Megatron (0.19, core/optimizer/optimizer_cuda_graph.py) calls the step of its chain of optimizers
for --cuda-graph-warmup-steps iterations, captures the next one, and from then on replays what the
device was told to do: no line of Python runs any more. So all that a step computes has to be
computed on the device, from tensors that stay where they are. What it does otherwise is refused at
start (refusals.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from torch import Tensor

from megatron_adams.megatron.refusals import GRAPH_FLAG, refusal
from megatron_adams.optimizer import AdamS

# What a step takes from a param group as a number: a graph repeats that of the capture.
_CAPTURED = ("weight_decay", "betas", "eps", "bias_correction", "adam_w_mode", "maximize")


class GradKeeper:
    """A hook before AdamS's step: gradients stay at the address of the first step.

    Megatron's fp32 gradients are views of its grad buffer, which stays. Those in other dtypes are
    converted to a new tensor at each step, and the kernel's table of pointers cannot be written
    while a graph is captured: their values are copied to the first step's tensor. The tensors
    of the capture itself belong to the graph's pool, and the copy out of them is part of the graph.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def __call__(self, optimizer: AdamS, args: Any, kwargs: Any) -> None:
        """Put the kept gradients in the place of those that moved."""
        name = "decoupled_grad" if optimizer.use_decoupled_grad else "grad"
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = getattr(param, name, None)
                if grad is None:
                    continue
                kept = self._kept.setdefault(param, grad)
                if kept.data_ptr() != grad.data_ptr():
                    kept.copy_(grad)
                    setattr(param, name, kept)


# Set while a step runs whose norm has to stay on the device, and Megatron would read it.
_norm_stays: ContextVar[bool] = ContextVar("megatron_adams_norm_stays", default=False)


@contextmanager
def norm_on_device(is_graph: bool) -> Iterator[None]:
    """Use `grad_norm` and `clip` instead of Megatron's functions if those wait for the norm.

    With TransformerEngine Megatron's own keep it on the device.
    """
    stays = is_graph and clip_grads.multi_tensor_scale_tensor_impl is None
    token = _norm_stays.set(stays)
    try:
        yield
    finally:
        _norm_stays.reset(token)


def norm_stays() -> bool:
    """Whether a step is under way that must not wait for the norm."""
    return _norm_stays.get()


def grad_norm(
    grads_for_norm: Sequence[Tensor] | Tensor,
    norm_type: float = 2,
    grad_stats_parallel_group: Any = None,
) -> Tensor:
    """Megatron's get_grad_norm_fp32 without TransformerEngine, with the norm left on the device.

    Returns:
        (1,) fp64 on the device: the root of the fp32 sum of squares is taken in double there, too.
    """
    assert norm_type == 2, norm_type
    grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else grads_for_norm
    total = torch.zeros(1, dtype=torch.float32, device=torch.cuda.current_device())
    if grads:
        norms = torch.stack([torch.norm(grad) for grad in grads])
        total = torch.norm(norms).to(torch.float32).reshape(1) ** 2.0
    torch.distributed.all_reduce(total, group=grad_stats_parallel_group)
    return total.double() ** 0.5


def clip(
    parameters: Sequence[Tensor],
    max_norm: float,
    total_norm: float | Tensor,
    use_decoupled_grad: bool = False,
) -> None:
    """As Megatron's clip_grad_by_total_norm_fp32, by the tensor of `grad_norm`."""
    assert isinstance(total_norm, Tensor)
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    clip_coeff = (max_norm / (total_norm + 1.0e-6)).clamp_max_(1.0).to(torch.float32)
    for param in parameters:
        if (grad := getattr(param, name, None)) is not None:
            grad.detach().mul_(clip_coeff)


class Captured:
    """What a graph has of the host, to be compared before each iteration that replays it."""

    def __init__(self) -> None:
        self._numbers: list[dict[str, Any]] | None = None

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Remember the numbers of the step under way, if it is being captured."""
        if torch.cuda.is_current_stream_capturing():
            self._numbers = _numbers_of(groups)

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse to go on by a graph that has other numbers.

        Raises:
            ValueError: one has changed since the capture.
        """
        if self._numbers is None:
            return
        for captured, now in zip(self._numbers, _numbers_of(groups), strict=True):
            for name, value in captured.items():
                if now[name] != value:
                    raise refusal(
                        f"{name}={now[name]} with {GRAPH_FLAG}",
                        f"must stay {value}, which the CUDA graph of the optimizer repeats",
                        "keep it constant (a checkpoint's scheduler can set it, too: "
                        f"--override-opt_param-scheduler), or remove {GRAPH_FLAG}",
                    )


def _numbers_of(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # lr is a tensor: its place counts, not its value.
    return [
        {**{name: group[name] for name in _CAPTURED}, "id(lr)": id(group["lr"])} for group in groups
    ]
