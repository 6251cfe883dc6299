"""The optimizers that the study compares.

AdamS is this package's, with or without a change. AdamW without a change is torch's. AdamW with a
change is written here from its formulas, as tensor operations.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from schedule import EPS, WEIGHT_DECAY, Variant
from torch import Tensor
from torch.optim import AdamW, Optimizer

from megatron_adams import AdamS


@torch.no_grad()
def changed_update_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    cautious: bool,
    nesterov: bool,
    match_update_rms: float | None = None,
) -> None:
    """Apply one step of AdamW with changes to params and state in place.

        s_t = beta2 * s_{t-1} + (1 - beta2) * g_t^2
        v_t = s_t / (1 - beta2^t)
        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        n_t = m_t / (1 - beta1^t)
        nesterov: n_t = (beta1 * m_t + (1 - beta1) * g_t) / (1 - beta1^(t+1))
        u_t = n_t / (sqrt(v_t) + eps)
        cautious: u_t = 0 where u_t * g_t <= 0; other elements are not enlarged
        match_update_rms: u_t is scaled to this RMS; where it is 0, it stays
        p_t = p_{t-1} - lr * (u_t + weight_decay * p_{t-1})

    The divisors make the weights of the gradients in n_t and v_t add up to 1.

    Sources: Liang et al. 2024, arXiv:2411.16085 (cautious; they also rescale); Dozat 2016
    (nesterov).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length; tensors with one index have one
            shape, and are fp32 or fp64.
        step: the number of this step, from 1.
    """
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    v = torch._foreach_div(exp_avg_sqs, 1 - beta2**step)
    correction = 1 - beta1 ** (step + 1 if nesterov else step)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_sqrt_(v)
    torch._foreach_add_(v, eps)
    numerators = torch._foreach_lerp(exp_avgs, grads, 1 - beta1) if nesterov else exp_avgs
    updates = torch._foreach_div(numerators, v)
    torch._foreach_div_(updates, correction)
    if cautious:
        for update, grad in zip(updates, grads, strict=True):
            update.mul_(update * grad > 0)
    if match_update_rms is not None:
        for update in updates:
            norm = update.norm()
            update.mul_(match_update_rms * math.sqrt(update.numel()) / norm.where(norm > 0, 1.0))
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, updates, alpha=-lr)


class ChangedAdamW(Optimizer):
    """`changed_update_` as a torch optimizer.

    Args:
        params: param groups; "cautious" and "nesterov" in each say which change is on.
        match_update_rms: see `changed_update_`.
    """

    def __init__(
        self,
        params: Iterable[dict],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        match_update_rms: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(params, defaults | {"cautious": False, "nesterov": False})
        self.num_steps = 0
        self.match_update_rms = match_update_rms

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every param. Each must have a gradient."""
        self.num_steps += 1
        names = ("exp_avg", "exp_avg_sq")
        for group in self.param_groups:
            params = group["params"]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {name: torch.zeros_like(param) for name in names}
            beta1, beta2 = group["betas"]
            state = {name: [self.state[param][name] for param in params] for name in names}
            changed_update_(
                params,
                [param.grad for param in params],
                state["exp_avg"],
                state["exp_avg_sq"],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=self.num_steps,
                cautious=group["cautious"],
                nesterov=group["nesterov"],
                match_update_rms=self.match_update_rms,
            )


def build(variant: Variant, params_by_kind: dict[str, list[Tensor]], lr: float) -> Optimizer:
    """Build a variant's optimizer. Norms have no weight decay.

    Args:
        params_by_kind: a list of fp32 params for each of gpt.KINDS.
    """
    groups = [
        {
            "params": params,
            "weight_decay": 0.0 if kind == "norms" else WEIGHT_DECAY,
            "cautious": variant.cautious and kind in variant.cautious_kinds,
            "nesterov": variant.nesterov,
        }
        for kind, params in params_by_kind.items()
        if params  # a tied model has no head
    ]
    betas = (variant.beta1, variant.beta2)
    matched = variant.match_update_rms
    if variant.family == "adams":
        return AdamS(
            groups,
            lr=lr,
            betas=betas,
            eps=EPS,
            max_update_rms=variant.max_update_rms,
            match_update_rms=matched,
        )
    assert variant.max_update_rms is None  # AdamW's stays below what AdamS's is cut to
    if variant.cautious or variant.nesterov or matched is not None:
        return ChangedAdamW(groups, lr=lr, betas=betas, eps=EPS, match_update_rms=matched)
    is_cuda = groups[0]["params"][0].is_cuda
    return AdamW(groups, lr=lr, betas=betas, eps=EPS, fused=is_cuda)


class Shadow:
    """The exp_avg_sq that AdamW would have for the gradients of a run of AdamS.

    Args:
        params: the params of the run.
        beta1: the run's.
        beta2: AdamW's.
    """

    def __init__(self, params: Sequence[Tensor], beta1: float, beta2: float) -> None:
        self.params, self.beta1, self.beta2, self.num_steps = params, beta1, beta2, 0
        self.exp_avg_sqs = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def count(self) -> None:
        """Add the gradients of a step."""
        self.num_steps += 1
        grads = [param.grad for param in self.params]
        torch._foreach_mul_(self.exp_avg_sqs, self.beta2)
        torch._foreach_addcmul_(self.exp_avg_sqs, grads, grads, 1 - self.beta2)

    @torch.no_grad()
    def updates(self, optimizer: Optimizer) -> list[Tensor]:
        """Return what AdamW's last update would have been, with the run's own exp_avg."""
        first, second = 1 - self.beta1**self.num_steps, math.sqrt(1 - self.beta2**self.num_steps)
        return [
            optimizer.state[param]["exp_avg"] / first / (square.sqrt() / second + EPS)
            for param, square in zip(self.params, self.exp_avg_sqs, strict=True)
        ]
