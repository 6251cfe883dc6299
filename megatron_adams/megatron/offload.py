"""--optimizer-cpu-offload: AdamS in Megatron's HybridDeviceOptimizer, on the GPU and on the CPU.

Megatron (0.19) knows two classes of sub-optimizers: Adam and, for every other name, SGD. Here both
are AdamS, in the precisions of the run. An offloaded param has a copy in host memory. AdamS updates
the copy, with the CPU's kernel, as it would have updated the param, so offloading changes no bit.
adoption.py builds it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_adams.megatron.config import AdamSOptimizerConfig
from megatron_adams.megatron.inner import params_of
from megatron_adams.optimizer import AdamS


def sub_kernels(kernel: str) -> tuple[str, str]:
    """Return the `kernel` arguments for the CPU's and the GPU's part, given the user's.

    A kernel for one device applies to that device only; the other uses its default.
    """
    return "auto" if kernel == "cuda" else kernel, "auto" if kernel == "host" else kernel


class HybridAdamS(HybridDeviceOptimizer):
    """Megatron's HybridDeviceOptimizer (0.19), whose sub-optimizers are AdamS.

    Upstream keeps fp32 copies of all params, and entries of state in addition to those of the
    sub-optimizers. Here the sub-optimizer on the GPU steps the params themselves, and the one on
    the CPU steps copies of the same dtype. All state is AdamS's own, and `state[param]` has it for
    the params given. The class has AdamS's methods for Megatron's checkpoints.

    Args:
        adams: an AdamS without state. Its param groups are taken over, and the sub-optimizers have
            its storage options.
        config: its fields for the flags of --optimizer-cpu-offload are used.
        storage: the storage options that `adams` was built with.
    """

    def __init__(self, adams: AdamS, config: AdamSOptimizerConfig, storage: dict[str, Any]) -> None:
        # It has the groups, loads and saves them, and never has state.
        self._groups_owner = adams
        self.wants_update_rms = False
        self.reduce_update_sums: Callable[[Tensor], None] | None = None
        self._whole_numels: dict[Tensor, int] = {}
        self.use_decoupled_grad = adams.use_decoupled_grad
        self.store_param_remainders = adams.store_param_remainders
        cpu_kernel, gpu_kernel = sub_kernels(config.adams_kernel)
        build = partial(
            AdamS.from_param_groups,
            max_update_rms=adams.max_update_rms,
            match_update_rms=adams.match_update_rms,
            **storage,
        )
        # Built without params, because torch's constructor refuses shards that are views. It also
        # writes everything that it is given into the groups, which are saved.
        super().__init__(
            [{"params": []}],
            offload_fraction=config.optimizer_offload_fraction,
            cpu_optimizer_cls=partial(build, kernel=cpu_kernel),
            gpu_optimizer_cls=partial(build, kernel=gpu_kernel),
            param_update_in_fp32=False,
            pin_cpu_grads=config.pin_cpu_grads,
            pin_cpu_params=config.pin_cpu_params,
            overlap_cpu_optimizer_d2h_h2d=config.overlap_cpu_optimizer_d2h_h2d,
        )
        self.param_groups = adams.param_groups
        self._init_sub_optimizers()

    def _init_sub_optimizers(self) -> None:
        super()._init_sub_optimizers()
        # inner param -> the sub-optimizer that has it
        self._owners = {
            param: optimizer
            for optimizer in self.sub_optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        }

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """Assign params to the CPU, from the first on, until the fraction is reached.

        The copies are pinned only if the flag says so. Upstream pins all of them, and makes
        another, unpinned copy for an fp32 main param.

        Returns:
            CPU groups, GPU groups, param -> CPU copy, CPU copy -> param, param -> fp32 copy (none).
        """
        threshold = offload_fraction * sum(param.numel() for param in params_of(self))
        num_offloaded = 0
        copies: dict[Tensor, Tensor] = {}
        cpu_groups: list[dict[str, Any]] = []
        gpu_groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            cpu_params, gpu_params = [], []
            for param in group["params"]:
                if num_offloaded < threshold:
                    num_offloaded += param.numel()
                    copies[param] = _like_on_cpu(param, pinned=self.pin_cpu_params)
                    cpu_params.append(copies[param])
                else:
                    gpu_params.append(param)
            for groups, own in ((cpu_groups, cpu_params), (gpu_groups, gpu_params)):
                if own:
                    groups.append({**group, "params": own})
        return cpu_groups, gpu_groups, copies, {copy: p for p, copy in copies.items()}, {}

    @property
    def num_offloaded(self) -> int:
        """The number of elements that are updated on the CPU."""
        return sum(param.numel() for param in self.gpu_params_map_cpu_copy)

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_scale: float | Tensor = 1.0) -> None:
        """Step as upstream does, with gradients that are multiplied by `grad_scale`.

        Args:
            closure: must be None, because each sub-optimizer would evaluate it.
            grad_scale: as in `AdamS.step`.
        """
        assert closure is None
        for param in params_of(self):
            self.initialize_state(param)
        for optimizer in self.sub_optimizers:
            optimizer.wants_update_rms = self.wants_update_rms
        # Pass on the scheduler's lr and weight decay, and the step, which is counted here.
        self._sync_hdo_param_groups_to_sub_optimizers()
        self._d2h_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._d2h_stream):
            self._set_sub_optimizer_grads()
        if self._groups_owner.scales_updates:
            self._count_on_both_devices(grad_scale)
        if self.gpu_optimizer is not None:
            self.gpu_optimizer.step(grad_scale=grad_scale)
        # If it is a tensor, this waits for the GPU. The GPU's own step has been launched by now.
        scale_on_cpu = float(grad_scale)
        for optimizer in self.cpu_optimizers:
            self._cpu_optimizer_map_data_event.pop(optimizer).synchronize()
            optimizer.step(grad_scale=scale_on_cpu)
        for group in self.param_groups:
            group["step"] += 1

    @property
    def is_counted(self) -> bool:
        """See InnerAdamS. All sub-optimizers take the same steps."""
        return all(optimizer.is_counted for optimizer in self.sub_optimizers)

    def forget_update_rms(self) -> None:
        """See InnerAdamS."""
        for optimizer in self.sub_optimizers:
            optimizer.forget_update_rms()

    def update_sums(self) -> Tensor:
        """See InnerAdamS. The result is for the params given, on the CPU."""
        sums = [optimizer.update_sums() for optimizer in self.sub_optimizers]
        return self._in_order(sums, torch.zeros(0, 2, dtype=torch.int64, device="cpu"))

    def update_factors(self) -> Tensor:
        """See InnerAdamS. The result is for the params given, on the CPU."""
        factors = [optimizer.update_factors() for optimizer in self.sub_optimizers]
        return self._in_order(factors, torch.ones(0, dtype=torch.float32, device="cpu"))

    def _in_order(self, values: Sequence[Tensor], empty: Tensor) -> Tensor:
        """Put the sub-optimizers' values for their params into the order of the params given."""
        of_inner: dict[Tensor, Tensor] = {}
        for optimizer, own in zip(self.sub_optimizers, values, strict=True):
            of_inner.update(zip(params_of(optimizer), own.cpu(), strict=True))
        rows = [of_inner[self.param_to_inner_param[param]] for param in params_of(self)]
        return torch.stack(rows) if rows else empty

    @property
    def whole_numels(self) -> dict[Tensor, int]:
        """See InnerAdamS."""
        return self._whole_numels

    @whole_numels.setter
    def whole_numels(self, numels: dict[Tensor, int]) -> None:
        self._whole_numels = numels
        for param, numel in numels.items():
            optimizer, inner = self._home(param)
            optimizer.whole_numels[inner] = numel

    def _count_on_both_devices(self, grad_scale: float | Tensor) -> None:
        """Tell all sub-optimizers the updates of whole params before any of them goes on.

        If a param is sharded, one rank's part can be on its GPU and another's on its CPU.
        """
        scale_on_cpu = float(grad_scale)
        for optimizer in self.sub_optimizers:
            if optimizer is self.gpu_optimizer:
                optimizer.begin_step(grad_scale=grad_scale)
            else:
                self._cpu_optimizer_map_data_event[optimizer].synchronize()
                optimizer.begin_step(grad_scale=scale_on_cpu)
        sums = self.update_sums()
        if self.reduce_update_sums is not None:
            self.reduce_update_sums(sums)
        inner_params = [self.param_to_inner_param[param] for param in params_of(self)]
        of_inner = dict(zip(inner_params, sums, strict=True))
        for optimizer in self.sub_optimizers:
            whole = torch.stack([of_inner[inner] for inner in params_of(optimizer)])
            optimizer.reduce_update_sums = _replacing_by(whole)

    def _set_sub_optimizer_grads(self) -> None:
        """Copy the offloaded params' gradients to the CPU, in their own dtype.

        Upstream converts them to the param's dtype. AdamS reads those of GPU params where they are.
        """
        for optimizer in self.cpu_optimizers:
            for group in optimizer.param_groups:
                for copy in group["params"]:
                    grad = getattr(self.cpu_copys_map_gpu_param[copy], "decoupled_grad", None)
                    copy.decoupled_grad = None
                    if grad is None:
                        continue
                    if copy not in self.cpu_copy_map_grad:
                        self.cpu_copy_map_grad[copy] = _like_on_cpu(grad, pinned=self.pin_cpu_grads)
                    copy.decoupled_grad = self.cpu_copy_map_grad[copy]
                    copy.decoupled_grad.copy_(grad, non_blocking=True)
            self._cpu_optimizer_map_data_event[optimizer] = self._d2h_stream.record_event()

    def _home(self, param: Tensor) -> tuple[AdamS, Tensor]:
        """Return the sub-optimizer of a param, and the param that it steps."""
        inner = self.param_to_inner_param[param]
        return self._owners[inner], inner

    def state_dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        """See InnerAdamS."""
        return self._groups_owner.state_dtypes(param)

    @torch.no_grad()
    def initialize_state(self, param: Tensor) -> None:
        """See AdamS. A CPU copy starts from its param here, which has been loaded by now."""
        if param in self.state:
            return
        optimizer, inner = self._home(param)
        if inner is not param:
            inner.copy_(param)
        optimizer.initialize_state(inner)
        # A copy of the dict: Megatron adds entries to it, and moves its tensors to the GPU
        # (optimizer.py:MegatronOptimizer.restore_from_cpu, 0.19).
        self.state[param] = dict(optimizer.state[inner])

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """See InnerAdamS."""
        optimizer, inner = self._home(param)
        return optimizer.get_unscaled_state(inner, name)

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, state: Tensor) -> None:
        """See AdamS. If storing a main param changes the param, both devices get the change."""
        self.initialize_state(param)
        optimizer, inner = self._home(param)
        if inner is not param:
            inner.copy_(param)
        optimizer.set_scaled_state(inner, name, state.to(inner.device))
        if inner is not param:
            param.copy_(inner)

    def dummy_step(self) -> None:
        """Do nothing. Upstream takes a random step here if there is no state before a load.

        In this class only ranks without params have no state then. A guarded step of theirs would
        wait for the other ranks.
        """

    def compile_kernels(
        self, grad_dtype: torch.dtype | None = None, *, counts_updates: bool = False
    ) -> None:
        """See InnerAdamS. Compiles for both devices."""
        for optimizer in self.sub_optimizers:
            optimizer.compile_kernels(grad_dtype, counts_updates=counts_updates)

    @contextmanager
    def state_left_out(self) -> Iterator[None]:
        """See AdamS. Here it always is, because Megatron saves the state by other functions."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Return the param groups as AdamS does, and no state."""
        return self._groups_owner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the param groups, as AdamS does."""
        with self._groups_owner.state_left_out():
            self._groups_owner.load_state_dict({**state_dict, "state": {}})
        self.param_groups = self._groups_owner.param_groups
        # If Megatron finds TransformerEngine or Apex, it has put a step there for torch's Adam.
        for state in self.state.values():
            state.pop("step", None)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """See torch. The hook is given the optimizer whose groups are loaded."""
        return self._groups_owner.register_load_state_dict_pre_hook(hook, prepend)

    def _register_load_state_dict_hooks(self) -> None:
        """Register none: upstream's would rebuild the sub-optimizers from the rounded params."""

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Do nothing. Megatron calls it after `set_scaled_state` has stored loaded state."""


def _replacing_by(whole: Tensor) -> Callable[[Tensor], None]:
    """A `reduce_update_sums` for sums that have been reduced already."""

    def replace(sums: Tensor) -> None:
        sums.copy_(whole)

    return replace


def _like_on_cpu(tensor: Tensor, *, pinned: bool) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
