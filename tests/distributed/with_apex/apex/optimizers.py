"""FusedAdam and FusedSGD with Apex's constructors, param groups and state."""

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step is in the group and whose adam_w_mode is not, as in Apex."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad or capturable or master_weights:
            raise NotImplementedError("not in the stand-in")
        self.adam_w_mode = adam_w_mode
        self.set_grad_none = set_grad_none
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            correction1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
            correction2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                for key in ("exp_avg", "exp_avg_sq"):
                    if key not in state:
                        state[key] = torch.zeros_like(param, dtype=torch.float32)
                grad, decay = param.grad.float(), group["weight_decay"]
                if not self.adam_w_mode:
                    grad = grad + decay * param
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(grad * grad, 1 - beta2)
                denominator = (state["exp_avg_sq"] / correction2).sqrt() + group["eps"]
                update = state["exp_avg"] / correction1 / denominator
                if self.adam_w_mode:
                    update += decay * param
                param -= group["lr"] * update


class FusedSGD(torch.optim.SGD):
    """Imported by Megatron beside FusedAdam."""
