"""What Megatron's side of adams calls on the optimizer inside one of Megatron's optimizers.

Two classes are such an optimizer: AdamS, and HybridAdamS of offload.py, which is one AdamS on the
GPU and others on the CPU. Imports torch alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class InnerAdamS(Protocol):
    """AdamS, as Megatron's optimizers hold it in `optimizer`.

    Its params are what Megatron gives it: this rank's shards of main params, or with the
    precision-aware optimizer of model params. AdamS documents each member in full.

    Attributes:
        param_groups: Megatron's own dicts.
        use_decoupled_grad: gradients are in `param.decoupled_grad`.
        store_param_remainders: main params of bf16 params are kept as remainders.
        wants_update_rms: the next step counts its updates.
        reduce_update_sums: turns the sums of this rank's shards into those of whole params, in
            place; None: the params are whole.
        whole_numels: param -> how many elements its whole has.
    """

    param_groups: list[dict[str, Any]]
    use_decoupled_grad: bool
    store_param_remainders: bool
    wants_update_rms: bool
    reduce_update_sums: Callable[[Tensor], None] | None

    @property
    def whole_numels(self) -> dict[Tensor, int]: ...

    @whole_numels.setter
    def whole_numels(self, numels: dict[Tensor, int]) -> None: ...

    @property
    def is_counted(self) -> bool:
        """Whether the last step has counted its updates."""

    def forget_update_rms(self) -> None:
        """Make `is_counted` False until the next step that counts."""

    def update_sums(self) -> Tensor:
        """Return what the last step has counted of each param, (num_params, 2) int64."""

    def update_factors(self) -> Tensor:
        """Return what the updates of the last step were multiplied by, (num_params,) fp32."""

    def compile_kernels(
        self, grad_dtype: torch.dtype | None = None, *, counts_updates: bool = False
    ) -> None:
        """Compile, before the first step, the kernels that it needs."""

    def state_dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        """Return the dtypes in which the state of a param is stored, by its names."""

    def initialize_state(self, param: Tensor) -> None:
        """Allocate the state of a param where there is none."""

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return "exp_avg" or "master_param" of a param in full, on the device where it is kept."""

    def set_scaled_state(self, param: Tensor, name: str, state: Tensor) -> None:
        """Store what `get_unscaled_state` returned, in the dtype that it is kept in."""

    def state_left_out(self) -> AbstractContextManager[None]:
        """While this is active, `state_dict` returns no state and `load_state_dict` leaves it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the param groups and, unless it is left out, the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Register a function that is called before each step, as in torch."""

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Register a function that is called after each step, as in torch."""

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Register a function that is called with what is about to be loaded, as in torch."""


def params_of(optimizer: Any) -> list[Tensor]:
    """Return the params of an optimizer's groups, in their order."""
    return [param for group in optimizer.param_groups for param in group["params"]]
