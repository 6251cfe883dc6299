"""One AdamS step on many tensors at once: one signature, three backends.

- cuda: one kernel launch for any number of tensors (cuda.py);
- host: the same source, compiled for the CPU, on OpenMP threads (host.py);
- foreach: torch operations, for other devices and for machines without a compiler (foreach.py).

A kernel is what cuda and host compile for one mode, that is, for one combination of dtypes. (The
argument `kernel` of AdamS, and --adams-kernel, name a backend.) All backends give the bits that
`megatron_adams.update` gives on the CPU. cuda and host compile the same element function
(source/element.h). Called by optimizer/; imports torch, precision.py and update.py, never
Megatron.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_adams.kernels import foreach, host
from megatron_adams.kernels.batch import (
    Batch,
    Fp8Scaling,
    Scalars,
    correction_of,
    is_dense,
    mode_of,
)
from megatron_adams.kernels.compile import INSTALL_NVRTC, CompileError
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import PointerTable

__all__ = [
    "BACKENDS",
    "Batch",
    "CompileError",
    "Fp8Scaling",
    "Mode",
    "PointerTable",
    "Scalars",
    "correction_of",
    "is_dense",
    "launch",
    "mode_of",
    "multi_tensor_adams",
    "own_backend",
    "run",
    "select_backend",
]

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "host", "foreach")
# The backend that reads each kind of device's memory.
_OWN_BACKENDS = {"cuda": "cuda", "cpu": "host"}


def multi_tensor_adams(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    main_params: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    bias_correction: bool | Tensor = False,
    decoupled_weight_decay: bool = True,
    nesterov: bool = False,
    cautious: bool = False,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    main_scales: Sequence[Tensor] | None = None,
    fp8_scaling: Sequence[Fp8Scaling] | None = None,
    update_sums: Sequence[Tensor] | None = None,
    update_factors: Sequence[Tensor] | None = None,
    backend: str,
    table: PointerTable | None = None,
) -> None:
    """Apply one AdamS step to every tensor, in place; call it under `torch.no_grad`.

    For each element this is `adams_update_` in fp32 (fp64 for fp64 params, with foreach): its
    gradient is grad * grad_scale, and its param is the main param. What is stored in another dtype
    is rounded once, when it is written, to nearest even. With remainders, the bf16 param is rounded
    with ties away from zero. The gradients are only read.

    All tensors are on one device. The tensors of one list have one dtype. The tensors with one
    index have the same shape and the same strides, without holes.

    Args:
        params: fp32, bf16, fp16 or, with main_params, fp8. With main_params, params are their copy
            for the model, which is only written. Without, the step reads and writes params.
        grads: fp32, bf16 or fp16.
        exp_avgs: fp32, bf16 or, with exp_avg_scales, fp16 or float8_e4m3fn.
        main_params: fp32; fp16 with main_scales; or int16, the remainders of bf16 params
            (`megatron_adams.precision.split_master`). None: params are the main params.
        lr: a number or a tensor with one element. Here and below, such a tensor is read on the
            device when the kernel runs.
        beta1, beta2, eps, weight_decay, step, decoupled_weight_decay, nesterov, cautious: as in
            `adams_update_`.
        bias_correction: as in `adams_update_`, or a one-element fp32 tensor that holds
            1 / (1 - beta1^step). CUDA graphs need the tensor, because they cannot count steps.
        grad_scale: the gradients are multiplied by it: the loss scale's inverse times the clip
            coefficient.
        found_inf: one fp32 element; if it is not 0, nothing is written. It is copied if it is on
            another device.
        exp_avg_scales, main_scales: one-element fp32 tensors, one per tensor; read and written.
        fp8_scaling: one per fp8 param.
        update_sums: (2,) int64 per tensor; `count_squares` of its update is added to it.
        update_factors: one-element fp32 tensors, one per tensor; its update is multiplied by it
            before weight decay is added.
        backend: "cuda", "host" or "foreach"; `select_backend` chooses one.
        table: this call site's table, which the next step uses again. None: one is made for this
            call.

    Raises:
        ValueError: lists have different lengths, shapes or strides differ, no kernel exists for the
            dtypes, or the backend cannot read the tensors.
        CompileError: the kernel cannot be compiled.
    """
    batch = Batch(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        main_params=main_params,
        exp_avg_scales=exp_avg_scales,
        main_scales=main_scales,
        fp8_scaling=fp8_scaling,
        update_sums=update_sums,
        update_factors=update_factors,
    )
    scalars = Scalars(
        lr=lr,
        grad_scale=grad_scale,
        correction=correction_of(bias_correction, beta1, step),
        found_inf=found_inf,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        nesterov=nesterov,
        cautious=cautious,
    )
    run(batch, scalars, backend, PointerTable() if table is None else table)


def run(
    batch: Batch,
    scalars: Scalars,
    backend: str,
    table: PointerTable,
    *,
    only_count: bool = False,
) -> None:
    """Do what `multi_tensor_adams` does, for a batch and scalars that exist already.

    Args:
        only_count: only add the squares of the updates to the batch's update_sums.
    """
    batch.check()
    scalars.check()
    if backend == "foreach":
        foreach.run(batch, scalars, only_count=only_count)
        return
    _check_device(backend, batch.device)
    batch.check_layout()
    if backend == "cuda":
        from megatron_adams.kernels import cuda

        cuda.run(batch, scalars, table, cuda.CudaDriver(), only_count=only_count)
    else:
        host.run(batch, scalars, table, only_count=only_count)


def launch(
    table: PointerTable,
    scalars: Scalars,
    backend: str,
    *,
    grads: list[int],
    only_count: bool = False,
) -> None:
    """Repeat the last `run` with this table, with other scalars and gradients.

    Args:
        table: the table of that run. Its tensors, except the gradients, must still be where they
            were.
        scalars: the scalars of this step.
        backend: the backend of that run, "cuda" or "host".
        grads: the addresses of the gradients. Their dtypes, shapes and strides are those of that
            run.
        only_count: as in that run.
    Raises:
        ValueError: a scalar is refused, as in `run`.
        RuntimeError: a gradient has moved while a CUDA graph is being captured.
    """
    scalars.check()
    if backend == "cuda":
        from megatron_adams.kernels import cuda

        cuda.repeat(table, scalars, cuda.CudaDriver(), grads=grads, only_count=only_count)
    else:
        host.repeat(table, scalars, grads=grads, only_count=only_count)


@functools.cache
def select_backend(device: torch.device, mode: Mode, requested: str = "auto") -> str:
    """Choose the backend for tensors of a mode, compile its kernel, and log the choice once.

    Args:
        device: where the tensors are.
        mode: their dtypes.
        requested: "auto" or one of BACKENDS.
    Returns:
        One of BACKENDS. With "auto" it is the device's own, or foreach if the device has none or
        the kernel cannot be compiled. In the last case there is one warning.
    Raises:
        ValueError: the backend asked for by name belongs to another device.
        CompileError: the backend asked for by name has no compiler, or the compiler fails.
    """
    if requested == "foreach" or (requested == "auto" and device.type not in _OWN_BACKENDS):
        backend = "foreach"
    else:
        if requested != "auto":
            _check_device(requested, device)
        backend = _OWN_BACKENDS[device.type]
        try:
            _load(backend, mode, device)
        except CompileError as error:
            if requested == backend:
                raise
            _warn_of_fallback(str(error))
            backend = "foreach"
    _log_choice(backend, device.type)
    return backend


def _load(backend: str, mode: Mode, device: torch.device) -> None:
    if backend == "host":
        host.load(mode)
        return
    try:
        from megatron_adams.kernels import cuda
    except ImportError as exc:
        raise CompileError(
            f"the CUDA kernel is launched through cuda.bindings, which cannot be imported ({exc}): "
            f"the CUDA builds of torch 2.10 and later bring it; or {INSTALL_NVRTC}"
        ) from exc
    cuda.load(mode, device)


def own_backend(device: torch.device) -> str | None:
    """Return the backend whose kernel reads a device's memory, or None."""
    return _OWN_BACKENDS.get(device.type)


def _check_device(backend: str, device: torch.device) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"kernel={backend!r}: must be one of {('auto', *BACKENDS)}")
    if _OWN_BACKENDS.get(device.type) != backend:
        raise ValueError(
            f"kernel={backend!r} for tensors on {device}: must be "
            f"{_OWN_BACKENDS.get(device.type, 'foreach')!r}, 'foreach' or 'auto'"
        )


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    logger.warning(
        "AdamS runs in plain torch operations, several times slower than its kernel: %s", reason
    )


@functools.cache
def _log_choice(backend: str, device_type: str) -> None:
    logger.info("AdamS: %s backend for tensors on %s", backend, device_type)
