"""The update that AdamW would have made, beside a run of AdamS: --adams-log-adamw-rms.

AdamW's exp_avg is AdamS's. Its exp_avg_sq is not, and is kept here for the log alone: the shadow
reads the gradients of each step and changes nothing of the run. It starts at zero with the
optimizer and is not saved. Imports torch, optimizer and update.py.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_adams.megatron.inner import InnerAdamS, params_of
from megatron_adams.optimizer import local_part
from megatron_adams.update import count_squares


def adamw_update(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    num_squares: int,
) -> Tensor:
    """Return AdamW's update before lr and weight decay (Loshchilov and Hutter, arXiv:1711.05101).

        u = m / (1 - beta1^step) / (sqrt(s / (1 - beta2^num_squares)) + eps)

    Each operation is rounded on its own and acts on each element alone, so that any split of a
    tensor gives the same bits. The factors are computed in double and rounded once.

    Args:
        exp_avg, exp_avg_sq: m and s after the step; any shape, fp32 or fp64.
        step: how many gradients are in m, from 1.
        num_squares: how many are in s, from 1; fewer than `step` where s has started later.
    Returns:
        exp_avg's shape and dtype.
    """
    numerator = exp_avg * (1 / (1 - beta1**step))
    # The root in double: torch's fp32 root on a CPU is not correctly rounded (update.py).
    root = (exp_avg_sq * (1 / (1 - beta2**num_squares))).double().sqrt().to(exp_avg.dtype)
    return numerator.div_(root.add_(eps))


class AdamWShadow:
    """AdamW's exp_avg_sq of the params of an AdamS, and the squares of AdamW's updates.

    It costs 4 bytes for each element that this rank steps, and a pass over the gradients; steps
    that count read exp_avg, too.

    Args:
        optimizer: no step has been made yet, or it goes on from a checkpoint.
        beta2: AdamW's.
    """

    def __init__(self, optimizer: InnerAdamS, beta2: float) -> None:
        self.beta2 = beta2
        self.num_squares = 0
        self._exp_avg_sqs: dict[Tensor, Tensor] = {}
        self._sums: dict[Tensor, Tensor] = {}
        optimizer.register_step_post_hook(self._follow)

    def sums(self, optimizer: InnerAdamS, device: torch.device | int) -> Tensor:
        """Return what the last step that counted has of each param, (num_params, 2) int64.

        As AdamS.update_sums: of this rank's shards, in `count_squares`'s units.
        """
        nothing = torch.zeros(2, dtype=torch.int64, device=device)
        rows = [self._sums.get(param, nothing).to(device) for param in params_of(optimizer)]
        return torch.stack(rows) if rows else nothing.new_zeros(0, 2)

    @torch.no_grad()
    def _follow(self, optimizer: Any, _: Any, kwargs: dict[str, Any]) -> None:
        """Add the gradients of the step that has just been made, and count if it has counted."""
        self.num_squares += 1
        self._sums = {}
        grad_scale = kwargs.get("grad_scale", 1.0)
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = param.decoupled_grad if optimizer.use_decoupled_grad else param.grad
                if grad is None:
                    continue
                # As the step: first to fp32, and then scaled.
                grad = local_part(grad).to(torch.float32) * grad_scale
                self._add(param, grad)
                if optimizer.wants_update_rms:
                    self._sums[param] = self._count(optimizer, group, param)

    def _add(self, param: Tensor, grad: Tensor) -> None:
        exp_avg_sq = self._exp_avg_sqs.get(param)
        if exp_avg_sq is None:
            exp_avg_sq = self._exp_avg_sqs[param] = torch.zeros_like(grad)
        # No addcmul: its vectorized loop and its tail can round differently (update.py).
        exp_avg_sq.mul_(self.beta2).add_((grad * grad).mul_(1 - self.beta2))

    def _count(self, optimizer: Any, group: dict[str, Any], param: Tensor) -> Tensor:
        update = adamw_update(
            local_part(optimizer.get_unscaled_state(param, "exp_avg")).to(torch.float32),
            self._exp_avg_sqs[param],
            beta1=group["betas"][0],
            beta2=self.beta2,
            eps=group["eps"],
            step=group["step"],
            num_squares=self.num_squares,
        )
        return count_squares(update)


_shadows: WeakKeyDictionary[Any, AdamWShadow] = WeakKeyDictionary()


def attach_shadow(optimizer: InnerAdamS, beta2: float) -> None:
    """Have a shadow follow the steps of an optimizer.

    Args:
        beta2: AdamW's; in (0, 1).
    """
    _shadows[optimizer] = AdamWShadow(optimizer, beta2)


def shadow_of(optimizer: InnerAdamS) -> AdamWShadow | None:
    """Return the shadow that follows an optimizer, None if none does."""
    return _shadows.get(optimizer)
