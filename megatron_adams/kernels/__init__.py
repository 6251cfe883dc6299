"""One AdamS step on many tensors at once: one signature, three implementations.

- cuda: one kernel launch for any number of tensors (cuda.py);
- host: the same source, compiled for the CPU, on OpenMP threads (host.py);
- foreach: torch operations, for other devices and machines without a compiler (foreach.py).

All give the bits of `megatron_adams.update` on the CPU; cuda and host compile the same element
function (source/element.h). Called by optimizer/. Imports torch, precision.py and update.py, never
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
from megatron_adams.kernels.compile import CompileError
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

    For each element, in fp32 (fp64 for fp64 params, with foreach): grad * grad_scale is what
    `adams_update_` takes as the gradient; the master weight is what it takes as param. Whatever is
    stored in another dtype is rounded once, when it is written: to nearest even, and to the param
    of a remainder half away from zero. The gradients are only read.

    The tensors of a list have one dtype each, and lie on one device; those with one index have one
    shape and the same strides, without holes.

    Args:
        params: fp32, bf16, fp16 or, beside main_params, fp8; the master weights where there are no
            main_params, otherwise their copy for the model, only written.
        grads: fp32, bf16 or fp16.
        exp_avgs: fp32, bf16 or, with exp_avg_scales, fp16 or float8_e4m3fn.
        main_params: the master weights: fp32; with main_scales, fp16; or int16, the remainders of
            bf16 params (`megatron_adams.precision.split_master`). None: params are the masters.
        lr: a number or, as every `float | Tensor` here, a tensor with one element, which is read
            on the device when the kernel runs.
        beta1, beta2, eps, weight_decay, step, decoupled_weight_decay: as `adams_update_`.
        bias_correction: as `adams_update_`; or a one-element fp32 tensor that holds
            1 / (1 - beta1^step), for CUDA graphs, which cannot count.
        grad_scale: the gradients are multiplied by it: loss scale's inverse, clip coefficient.
        found_inf: one fp32 element; where it is not 0, nothing is written. On another device, it
            is copied.
        exp_avg_scales, main_scales: a one-element fp32 tensor per tensor, read and written.
        fp8_scaling: one per param, with fp8 params.
        update_sums: (2,) int64 per tensor; what `count_squares` says of its update is added to it.
        update_factors: a one-element fp32 tensor per tensor; what its update is multiplied by,
            before weight decay.
        backend: "cuda", "host" or "foreach"; `select_backend` chooses one.
        table: of this call site, to be reused by the next step; None: made for this call.

    Raises:
        ValueError: lists of different lengths, unequal shapes or strides, dtypes that no kernel
            is for, tensors that the backend cannot read.
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
    """As `multi_tensor_adams`, which gives names to what a batch and its scalars are made of.

    Args:
        only_count: add the squares of the updates to the batch's update_sums, and write nothing
            else.
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
        table: its tensors, but for the gradients, must still be where they were.
        scalars: of this step.
        backend: of that run, "cuda" or "host".
        grads: where the gradients are; their dtypes, shapes and strides are those of that run.
        only_count: of that run.
    Raises:
        ValueError: as `run`, of the scalars.
        RuntimeError: a gradient has moved, and a CUDA graph is being captured.
    """
    scalars.check()
    if backend == "cuda":
        from megatron_adams.kernels import cuda

        cuda.repeat(table, scalars, cuda.CudaDriver(), grads=grads, only_count=only_count)
    else:
        host.repeat(table, scalars, grads=grads, only_count=only_count)


@functools.cache
def select_backend(device: torch.device, mode: Mode, requested: str = "auto") -> str:
    """Choose the backend for a kind of tensors, compile its kernel, and log the choice, once.

    Args:
        device: where the tensors are.
        mode: their dtypes.
        requested: "auto" or one of BACKENDS.
    Returns:
        One of BACKENDS. With "auto", the device's own, and foreach where it has none or the kernel
        cannot be compiled; the latter is said in one warning.
    Raises:
        ValueError: another device's backend was asked for by name.
        CompileError: the backend asked for by name has no compiler, or it fails.
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
            "torch's CUDA builds bring it; or pip install cuda-core[cu13], [cu12] for CUDA 12"
        ) from exc
    cuda.load(mode, device)


def own_backend(device: torch.device) -> str | None:
    """The backend whose kernel reads the memory of a device; None: there is none."""
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
