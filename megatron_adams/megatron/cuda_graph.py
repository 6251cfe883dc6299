"""--optimizer-cuda-graph: Megatron's whole optimizer step, captured once and replayed.

Megatron (0.19, core/optimizer/optimizer_cuda_graph.py) calls the step of its chain of optimizers
for --cuda-graph-warmup-steps iterations and captures the next one. From then on it replays what the
device was told to do, and no line of Python runs. So the device must compute everything in a step,
from tensors that stay where they are. Settings that need the host are refused at start
(refusals.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from megatron_adams.megatron.refusals import GRAPH_FLAG, refusal
from megatron_adams.megatron.versions import norm_is_read
from megatron_adams.optimizer import SWITCHES, AdamS

# The numbers that a step takes from a param group. A graph repeats those of the capture.
_CAPTURED = ("weight_decay", "betas", "eps", *SWITCHES)


class GradKeeper:
    """A hook before AdamS's step that keeps gradients at the addresses of the first step.

    Megatron's fp32 gradients are views of its grad buffer, which does not move. Gradients in other
    dtypes are converted to a new tensor at each step, and the kernel's table of pointers cannot be
    written while a graph is captured. So their values are copied to the first step's tensor. The
    new tensors of the captured step belong to the graph's pool, and the graph contains the copy.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def __call__(self, optimizer: AdamS, args: Any, kwargs: Any) -> None:
        """Replace the gradients that have moved by the kept ones."""
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


# True while a step is under way whose norm must stay on the device, but which Megatron would read.
_norm_stays: ContextVar[bool] = ContextVar("megatron_adams_norm_stays", default=False)


@contextmanager
def norm_on_device(is_graph: bool) -> Iterator[None]:
    """Use `grad_norm` and `clip` instead of Megatron's functions if those wait for the norm.

    With TransformerEngine, Megatron's own functions keep the norm on the device.
    """
    stays = is_graph and norm_is_read()
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
    """Megatron's get_grad_norm_fp32 without TransformerEngine, but the norm stays on the device.

    Returns:
        (1,) fp64 on the device: as in Megatron, the root of the fp32 sum of squares is in double.
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
    """Megatron's clip_grad_by_total_norm_fp32, for a norm in a tensor as `grad_norm` returns."""
    assert isinstance(total_norm, Tensor)
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    clip_coeff = (max_norm / (total_norm + 1.0e-6)).clamp_max_(1.0).to(torch.float32)
    for param in parameters:
        if (grad := getattr(param, name, None)) is not None:
            grad.detach().mul_(clip_coeff)


class Captured:
    """The host's numbers in a graph. They are compared before each iteration that replays it."""

    def __init__(self) -> None:
        self._numbers: list[dict[str, Any]] | None = None

    def note(self, groups: Sequence[dict[str, Any]]) -> None:
        """Remember the numbers of the step under way, if it is being captured."""
        if torch.cuda.is_current_stream_capturing():
            self._numbers = _numbers_of(groups)

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse to replay a graph that contains other numbers.

        Raises:
            ValueError: a number has changed since the capture.
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
    # lr must stay the same tensor. Its value may change.
    return [
        {**{name: group[name] for name in _CAPTURED}, "id(lr)": id(group["lr"])} for group in groups
    ]
