"""Layer norm under Apex's name: Megatron requires it wherever it finds Apex."""

from typing import Any

import torch


class FusedLayerNormAffineFunction:
    """Called as an autograd function is; autograd differentiates PyTorch's own."""

    @staticmethod
    def forward(*args: Any) -> None:
        """Megatron looks at this signature alone."""
        raise NotImplementedError

    @staticmethod
    def apply(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        shape: torch.Size,
        eps: float,
    ) -> torch.Tensor:
        return torch.nn.functional.layer_norm(input, shape, weight, bias, eps)
