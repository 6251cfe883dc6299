"""The passes over memory that AdamS.step takes over from Megatron: unscale, clip and copy.

Megatron (0.19) multiplies all gradients in place by 1 / loss scale, and then by the clip
coefficient. After the step, it copies the main params to the model params. AdamS.step takes one
factor for the gradients instead, and only reads them. It writes the model params together with the
main params. The bits are the same: a loss scale that is a power of two changes no rounding above
fp32's smallest normal number, and Megatron's copy rounds as the step does.

Megatron's own passes are kept where something needs them: see `why_gradients_are_scaled` and
`FusedStepOptimizer.why_params_are_copied`. The classes in distributed.py derive from these.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_adams.megatron import cuda_graph
from megatron_adams.megatron.inner import InnerAdamS
from megatron_adams.megatron.refusals import check_graph_chain
from megatron_adams.megatron.versions import ExpAvgOptimizer, norm_skips_no_step
from megatron_adams.optimizer import AdamS, fp8_memory

logger = logging.getLogger(__name__)

_NOT_DISTRIBUTED = "the optimizer is not a distributed one"


class FusedStepOptimizer(ExpAvgOptimizer):
    """Megatron's DistributedOptimizer (0.19), whose inner step also scales and copies.

    An existing object is assigned this class, so there is no constructor. `prepare_step` is called
    once the inner optimizer is in place.
    """

    optimizer: InnerAdamS
    # What the gradients have still to be multiplied by, while a step leaves that to the inner
    # optimizer.
    _grad_scale: float | Tensor | None = None
    # True while a step runs whose inner optimizer writes the model params.
    _params_are_written = False
    # For each fp32 param of this rank: (its shard of the model's param buffer, its main param).
    _fp32_params: Sequence[tuple[Tensor, Tensor]] = ()

    def prepare_step(self) -> None:
        """Tell the inner optimizer which model param belongs to each main param."""
        self.optimizer.register_step_pre_hook(self._add_grad_scale)
        if self.has_main_params_inside():
            for buffer in self.buffers:
                for model_param in buffer.params:
                    # Megatron leaves None there, and then --log-params-norm would skip the param.
                    vars(model_param).pop("main_param", None)
        if self.why_params_are_copied() is None and not self.has_main_params_inside():
            assert isinstance(self.optimizer, AdamS)
            # These tensors live as long as the model: where Megatron offloads param buffers or main
            # params to the CPU, it exchanges the memory behind them.
            self.optimizer.model_params = {
                main_param: self._param_buffer_shard(model_param)
                for model_param, main_param in _pairs(
                    self.model_float16_groups, self.shard_fp32_from_float16_groups
                )
            }
            self._fp32_params = [
                (self._param_buffer_shard(model_param), main_param)
                for model_param, main_param in _pairs(
                    self.model_fp32_groups, self.shard_fp32_groups
                )
            ]

    def why_params_are_copied(self) -> str | None:
        """Return why Megatron's own pass must write the model params, or None."""
        if self.has_main_params_inside():
            return None
        # 4 bits came with 0.17.
        if self.ddp_config.fp8_param_gather or getattr(self.ddp_config, "fp4_param_gather", False):
            return "the model params are quantized from the main params"
        return None

    def has_main_params_inside(self) -> bool:
        """Whether the inner optimizer steps the model params, and keeps the main params itself.

        This is so with the precision-aware optimizer. Megatron then has no main params to copy.
        """
        return bool(self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)

    def inv_scale(self) -> float:
        """Return 1 / loss scale; 1.0 without a loss scale."""
        return float(self.grad_scaler.inv_scale) if self.grad_scaler else 1.0

    def _param_buffer_shard(self, model_param: Tensor) -> Tensor:
        """Return the part of the param buffer that `_copy_main_params_to_model_params` writes."""
        world_range = self._get_model_param_range_map(model_param)["gbuf_world_in_bucket"]
        gbuf_index, _, bucket_id = self.model_param_gbuf_map[model_param]
        param_data = self.buffers[gbuf_index].buckets[bucket_id].param_data
        return param_data.view(-1)[world_range.start : world_range.end]

    def _add_grad_scale(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._grad_scale is None:
            return None
        return args, {**kwargs, "grad_scale": self._grad_scale}

    def _unscale_main_grads_and_check_for_nan(self) -> bool:
        """Return whether any rank's gradient is inf or NaN. Upstream also scales them."""
        if self._grad_scale is None:
            return super()._unscale_main_grads_and_check_for_nan()
        grads = [] if self.is_stub_optimizer else self._collect_main_grad_data_for_unscaling()
        # The maximum norm is finite exactly if all gradients are: it cannot overflow.
        largest = torch.nn.utils.get_total_norm(grads, norm_type=math.inf)
        self.found_inf.copy_(~largest.isfinite())
        torch.distributed.all_reduce(
            self.found_inf,
            op=torch.distributed.ReduceOp.MAX,
            group=self.get_grad_stats_parallel_group(),
        )
        return self.found_inf.item() > 0

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step as upstream does, but do not copy main params that the inner step has written."""
        self._params_are_written = (
            not self.is_stub_optimizer
            and self.why_params_are_copied() is None
            # False after Megatron's offload_to_cpu and restore_from_cpu, which give an fp32 shard
            # memory of its own.
            and all(shard.data_ptr() == param.data_ptr() for shard, param in self._fp32_params)
        )
        try:
            return super().step_with_ready_grads()
        finally:
            self._params_are_written = False

    def _copy_main_params_to_model_params(self) -> None:
        if self.has_main_params_inside() and self.ddp_config.fp8_param_gather:
            self._share_fp8_scaling()
        if not self._params_are_written:
            super()._copy_main_params_to_model_params()

    def _share_fp8_scaling(self) -> None:
        """Set scale_inv of the fp8 params that this rank owns no part of.

        The inner step sets that of this rank's own params. The bytes of the others come from their
        owners, which scaled them by the scale that all ranks have. Upstream would read them with an
        old scale_inv.
        """
        for buffer in self.buffers:
            for param in buffer.params:
                if (fp8 := fp8_memory(param)) is not None:
                    _, scaling = fp8
                    scaling.scale_inv.copy_(1 / scaling.scale)


class FusedStepChain(ChainedOptimizer):
    """Megatron's ChainedOptimizer (0.19), but the gradients are left unscaled if possible.

    An existing object is assigned this class, as with the parts.
    """

    # Set with --optimizer-cuda-graph.
    _captured: cuda_graph.Captured | None = None

    def prepare_cuda_graph(self) -> None:
        """Prepare the step for being captured.

        Raises:
            ValueError: it cannot be captured.
        """
        check_graph_chain(
            len(self.chained_optimizers),
            shares_groups=self.grads_states_parallel_group_is_shared(),
        )
        self._captured = cuda_graph.Captured()
        for part in self.chained_optimizers:
            if not part.is_stub_optimizer:
                part.optimizer.register_step_pre_hook(cuda_graph.GradKeeper())

    @property
    def is_captured(self) -> bool:
        """Whether the step is, or will be, captured into a CUDA graph."""
        return self._captured is not None

    @torch.no_grad()
    def step(self) -> Any:
        """Step as upstream does. The functions that it calls are wrapped below."""
        if self._captured is not None:
            self._captured.note(self.param_groups)
            with norm_skips_no_step(self.chained_optimizers):
                return self._step_with_own_passes()
        return self._step_with_own_passes()

    def _step_with_own_passes(self) -> Any:
        with cuda_graph.norm_on_device(self.is_captured):
            if why_gradients_are_scaled(self) is not None:
                return super().step()
            with _deferred(self.chained_optimizers):
                return super().step()

    def describe_passes(self) -> str:
        """Say which of Megatron's passes the step takes over, and why not the others."""
        scaled = why_gradients_are_scaled(self)
        copied = next(filter(None, map(_why_params_are_copied, self.chained_optimizers)), None)
        return (
            f"gradients are clipped and unscaled {_where(scaled)}, model params are written "
            f"{_where(copied)}"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients. Every iteration begins with this, also one that replays."""
        if self._captured is not None:
            self._captured.check(self.param_groups)
        super().zero_grad(set_to_none)

    def _synchronize_steps(self) -> Any:
        """Give all groups one step. Upstream's has a bare assertion if they differ.

        Counts on the device are equal, because a CUDA graph contains every group's.
        """
        if self.is_captured:
            return None
        inners = [part.optimizer for part in self.chained_optimizers if part.optimizer is not None]
        return synchronize_steps([group for inner in inners for group in inner.param_groups])


def synchronize_steps(groups: Sequence[dict[str, Any]]) -> int | None:
    """Give every param group the same step, as Megatron's checkpoints want it, in place.

    A group without params on this rank follows those that have some. No step of AdamS makes these
    differ. If they do, all get the largest count.

    Returns:
        The step; None if no group has one.
    """
    counted = [group for group in groups if "step" in group]
    steps = {int(group["step"]) for group in counted if group.get("params", True)}
    steps = steps or {int(group["step"]) for group in counted}
    if not steps:
        return None
    step = max(steps)
    if len(steps) > 1:
        logger.warning(
            "param groups of adams have the steps %s; a checkpoint has one, and all get %d. With "
            "--adams-bias-correction the next updates of the others change by it.",
            sorted(steps),
            step,
        )
    for group in counted:
        group["step"] = step
    return step


def why_gradients_are_scaled(chain: ChainedOptimizer) -> str | None:
    """Return why Megatron must scale a chain's gradients in place; None if the step can do it.

    The answer is the same on all ranks, because the grad norm is summed over their gradients, which
    must be either all scaled or all unscaled.
    """
    parts = chain.chained_optimizers
    if not all(isinstance(part, FusedStepOptimizer) for part in parts):
        return _NOT_DISTRIBUTED
    if any(part.config.log_num_zeros_in_grad for part in parts):
        return "the zeros of scaled gradients are counted"
    inv_scales = {part.inv_scale() for part in parts}
    if len(inv_scales) != 1:
        return "dense parameters and experts have loss scales of their own, which differ"
    (inv_scale,) = inv_scales
    if not _is_power_of_two(inv_scale):
        # gradient * inv_scale would be rounded before it is clipped.
        return "the loss scale is not a power of two"
    return None


def _is_power_of_two(value: float) -> bool:
    mantissa, _ = math.frexp(value)
    return mantissa == 0.5


class _Deferral(NamedTuple):
    parts: Sequence[FusedStepOptimizer]
    inv_scale: float


# The step under way that leaves its gradients unscaled. Megatron's functions for gradients have no
# argument that says for which step they are called.
_deferral: ContextVar[_Deferral | None] = ContextVar("megatron_adams_deferral", default=None)


@contextmanager
def _deferred(parts: Sequence[FusedStepOptimizer]) -> Iterator[None]:
    inv_scale = parts[0].inv_scale()
    token = _deferral.set(_Deferral(parts, inv_scale))
    try:
        for part in parts:
            part._grad_scale = inv_scale
        yield
    finally:
        _deferral.reset(token)
        for part in parts:
            part._grad_scale = None


def wrap_get_grad_norm_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the norm that the gradients would have if Megatron had unscaled them."""

    def get_grad_norm_fp32(*args: Any, **kwargs: Any) -> float | Tensor:
        compute = cuda_graph.grad_norm if cuda_graph.norm_stays() else original
        norm: float | Tensor = compute(*args, **kwargs)
        deferral = _deferral.get()
        if deferral is None or deferral.inv_scale == 1:
            return norm
        return _unscaled_norm(norm, deferral.inv_scale)

    return get_grad_norm_fp32


def _unscaled_norm(norm: float | Tensor, inv_scale: float) -> float | Tensor:
    """Return, bit for bit, the norm that Megatron would compute of gradients * inv_scale.

    inv_scale is a power of two. Megatron computes an fp32 sum of squares. If the norm is a tensor,
    it is the sum's fp32 root, and scaling it is exact. If it is a float, it is the sum ** 0.5 in
    double, and scaling it is not exact: 3 in 10,000 differ in the last bit. So the sum is
    recovered, as the fp32 number nearest to the float's square, and scaled, which is exact.
    """
    if isinstance(norm, Tensor):
        return norm * inv_scale
    sum_of_squares = torch.tensor(norm**2, dtype=torch.float32, device="cpu").item()
    return float((sum_of_squares * inv_scale**2) ** 0.5)


def wrap_clip_grad_by_total_norm_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leave clipping to the inner step of the optimizer that the gradients belong to.

    The original still clips if it is given only some of an optimizer's parameters (those with a
    grad norm of their own), or another optimizer's.
    """

    def clip_grad_by_total_norm_fp32(
        parameters: Any, max_norm: float, total_norm: float | Tensor, *rest: Any, **kwargs: Any
    ) -> Any:
        part = _deferring_part(parameters)
        if part is None:
            clip = cuda_graph.clip if cuda_graph.norm_stays() else original
            return clip(parameters, max_norm, total_norm, *rest, **kwargs)
        # Upstream's computation, up to the multiplication.
        clip_coeff = max_norm / (total_norm + 1.0e-6)
        assert part._grad_scale is not None
        if isinstance(clip_coeff, Tensor):
            part._grad_scale = clip_coeff.clamp_max_(1.0) * part._grad_scale
        elif clip_coeff < 1.0:
            part._grad_scale = clip_coeff * part._grad_scale
        return None

    return clip_grad_by_total_norm_fp32


def _deferring_part(parameters: Sequence[Tensor]) -> FusedStepOptimizer | None:
    """Return the part of the step under way that has exactly these parameters, or None."""
    deferral = _deferral.get()
    if deferral is None:
        return None
    ids = [id(param) for param in parameters]
    for part in deferral.parts:
        if ids == [id(param) for param in part.get_parameters()]:
            return part
    return None


def _why_params_are_copied(part: Any) -> str | None:
    if not isinstance(part, FusedStepOptimizer):
        return _NOT_DISTRIBUTED
    return None if part.is_stub_optimizer else part.why_params_are_copied()


def _where(reason: str | None) -> str:
    return "in the step" if reason is None else f"by Megatron ({reason})"


def _pairs(
    groups: Sequence[Sequence[Tensor]], other_groups: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for group, other_group in zip(groups, other_groups, strict=True):
        yield from zip(group, other_group, strict=True)
