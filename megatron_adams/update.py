"""The AdamS update on plain tensors: the formula, one operation after the other.

`adams_update_` is the oracle: every backend is tested against it. The package itself calls only the
helpers below it. This module imports only torch.

Source: Zhang, Wang, Chen 2025, arXiv:2505.16363, Algorithm 1. The optional bias correction is that
of the authors' released code.
"""

import math
from typing import overload

import torch
from torch import Tensor

# The unit that `count_squares` counts in, and the most units that one element counts for.
_SQUARE_UNIT = 2.0**-20
_LARGEST_SQUARE = 2.0**30 - 64


def adams_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    bias_correction: bool = False,
    decoupled_weight_decay: bool = True,
    nesterov: bool = False,
    cautious: bool = False,
    update_sums: Tensor | None = None,
    update_factor: float | Tensor = 1.0,
) -> None:
    """Apply one AdamS step to `param` and `exp_avg`, in place; call it under `torch.no_grad`.

        v_t = beta2 * m_{t-1}^2 + (1 - beta2) * g_t^2
        m_t = beta1 * m_{t-1} + (1 - beta1) * g_t
        p_t = p_{t-1} - lr * (m_t / (sqrt(v_t) + eps) + weight_decay * p_{t-1})

    v_t reads m_{t-1}, so it is computed before exp_avg moves. With `bias_correction`, m_{t-1} in
    v_t and m_t in p_t are both multiplied by 1 / (1 - beta1^t); the stored exp_avg is not. With
    `decoupled_weight_decay=False`, weight_decay * p_{t-1} is added to g_t instead (L2).

    Two changes of the numerator m_t are not in the paper. Neither needs state or a further pass:

        nesterov: n_t = beta1 * m_t + (1 - beta1) * g_t takes the place of m_t, so that the newest
            gradient counts more. Source: Dozat 2016, "Incorporating Nesterov momentum into Adam".
        cautious: the numerator is 0 where its product with g_t is not above 0. The element then
            moves by weight decay alone. Source: Liang et al. 2024, arXiv:2411.16085, without their
            rescaling of the other elements, which would need a sum over the tensor.

    Every operation below is rounded on its own (no fused multiply-add) and acts on each element
    alone, so any split of a tensor into shards gives the same bits. A kernel must keep this order:

        c = bias_correction ? 1 / (1 - beta1^step) : 1      # double
        g = grad                                            # L2: g += weight_decay * param
        a = c * exp_avg
        v = beta2 * (a * a) + (1 - beta2) * (g * g)
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        n = exp_avg                                         # nesterov: beta1 * n + (1 - beta1) * g
                                                            # cautious: 0, if n * g <= 0
        u = (c * n) / (sqrt(v) + eps)
        u = update_factor * u                               # decoupled: u += weight_decay * param
        param = param - lr * u

    param and grad are first converted to exp_avg's dtype, and the arithmetic is in that dtype.
    param is rounded once, to nearest even, when it is written. 1 - beta1, 1 - beta2 and c are
    computed in double. They and the other scalars are then rounded once to that dtype. If
    weight_decay is 0, its terms are left out.

    Args:
        param: any shape; fp32, bf16, fp16 or fp64.
        grad: param's shape; any floating dtype; never written.
        exp_avg: param's shape; fp64 for fp64 params, else fp32; zero before the first step.
        lr: a float, or a tensor with one element on param's device or on the CPU.
        beta1: in [0, 1).
        beta2: in (0, 1).
        eps: positive.
        weight_decay: the coefficient of weight decay; 0 turns it off.
        step: the number of this step, from 1; read only with `bias_correction`.
        bias_correction: the authors' released form (True) or the paper's (False).
        decoupled_weight_decay: AdamW's weight decay (True) or L2 (False).
        nesterov: the numerator looks ahead by one step; not together with `bias_correction`, whose
            factor does not fit it.
        cautious: an element stays where its update would move it against its gradient.
        update_sums: (2,) int64; `count_squares(u)` is added to it, for u before update_factor.
        update_factor: what u is multiplied by, in fp32; 1 changes no bit. See `update_factors`.

    Raises:
        ValueError: shapes differ, exp_avg has another dtype than `exp_avg_dtype(param)`, or
            `nesterov` is given with `bias_correction`.
    """
    check_numerator(nesterov=nesterov, bias_correction=bias_correction)
    if not param.shape == grad.shape == exp_avg.shape:
        raise ValueError(
            f"param {tuple(param.shape)}, grad {tuple(grad.shape)}, exp_avg "
            f"{tuple(exp_avg.shape)}: shapes must be equal"
        )
    dtype = exp_avg_dtype(param)
    if exp_avg.dtype != dtype:
        raise ValueError(
            f"exp_avg.dtype={exp_avg.dtype}: must be {dtype} for a {param.dtype} param"
        )

    # Only mul, add, sub, div and _sqrt are used, because each is correctly rounded. addcmul,
    # addcdiv, lerp and alpha= may be contracted in a vectorized loop but not in its tail. A shard's
    # bits would then depend on its alignment.
    old_param = param.to(dtype)
    grad = grad.to(dtype)
    if isinstance(lr, Tensor):
        # An fp64 lr would promote the arithmetic of a 0-dim param.
        lr = lr.to(dtype).reshape(())
    if weight_decay != 0 and not decoupled_weight_decay:
        grad = grad + old_param * weight_decay
    correction = bias_correction_factor(beta1, step) if bias_correction else 1.0

    old_exp_avg = exp_avg * correction
    v = (old_exp_avg * old_exp_avg).mul_(beta2).add_((grad * grad).mul_(1 - beta2))
    moved = grad * (1 - beta1)
    exp_avg.mul_(beta1).add_(moved)
    numerator = (exp_avg * beta1).add_(moved) if nesterov else exp_avg
    if cautious:
        numerator = keep_aligned(numerator, grad)
    update = (numerator * correction).div_(_sqrt(v).add_(eps))
    if update_sums is not None:
        update_sums.add_(count_squares(update))
    if isinstance(update_factor, Tensor):
        update_factor = update_factor.to(dtype).reshape(())
    update.mul_(update_factor)
    if weight_decay != 0 and decoupled_weight_decay:
        # Not `param *= 1 - lr * weight_decay`: if lr * weight_decay is near 1e-8, that factor is 1
        # in fp32.
        update.add_(old_param * weight_decay)
    param.copy_(old_param - update.mul_(lr))


def _sqrt(v: Tensor) -> Tensor:
    """Return sqrt(v), correctly rounded in fp32.

    On the CPU torch calls MKL's, which is an ulp off for 16% of fp32 values (torch 2.15, AVX-512).
    The double result is off, too, but by too little to round to another fp32 number.
    """
    return v.double().sqrt().to(v.dtype) if v.device.type == "cpu" else v.sqrt()


def keep_aligned(numerator: Tensor, grad: Tensor) -> Tensor:
    """Return the numerator, with 0 where it does not have the gradient's sign.

    Args:
        numerator: any shape, floating; a NaN stays, so that it is not hidden.
        grad: numerator's shape and dtype.
    """
    return torch.where(numerator * grad <= 0, 0.0, numerator)


def check_numerator(*, nesterov: bool, bias_correction: bool) -> None:
    """Refuse two changes of the numerator that do not fit each other.

    Raises:
        ValueError: both are given.
    """
    if nesterov and bias_correction:
        raise ValueError(
            "nesterov=True with bias_correction=True: must be one of the two, as the correction of "
            "exp_avg is not that of a numerator that looks ahead; leave one out"
        )


def count_squares(update: Tensor) -> Tensor:
    """Sum the squares of an update in integers, so that the order of the additions does not matter.

    A tensor's sum has the same bits on every device and for every division into shards. An element
    u counts as u * u in units of 2^-20, rounded to the nearest; each operation is in fp32. The
    error of a mean square is at most 2^-21: 6e-6 of an RMS of 0.2, and 0.3% of an RMS of 0.01. A
    magnitude below 7e-4 counts as 0. One above 32 counts as 32, but no update is larger with beta2
    up to 0.999, in either form (`update_bound`). The sum of 2^33 elements does not overflow.

    Args:
        update: any shape, floating; converted to fp32.
    Returns:
        (2,) int64: the sum, and the number of elements that are infinite or NaN.
    """
    update = update.to(torch.float32)
    scaled = (update * update) * (1 / _SQUARE_UNIT)
    # Not clamp: it keeps a NaN, whose conversion to an integer is not defined.
    fixed_point = torch.where(scaled < _LARGEST_SQUARE, scaled, _LARGEST_SQUARE).add_(0.5)
    not_finite = ~update.isfinite()
    return torch.stack((fixed_point.to(torch.int64).sum(), not_finite.sum()))


def update_rms(sums: Tensor, numels: Tensor) -> Tensor:
    """Return the root mean square of updates, from what `count_squares` has counted.

    Args:
        sums: (..., 2) int64; if a tensor is in parts, their sums added up.
        numels: (...) integers; how many elements were counted. The RMS of none is 0.
    Returns:
        (...) fp32; NaN where an element was not finite. Every operation is correctly rounded, so
        the bits are the same on every device.
    """
    # The divisor is a tensor, because torch on CUDA divides by a number through its reciprocal.
    mean = sums[..., 0].double() / (numels.clamp(min=1).double() * (1 / _SQUARE_UNIT))
    # Through fp32, for the reason in _sqrt.
    rms = mean.float().double().sqrt().float()
    return torch.where(sums[..., 1] == 0, rms, torch.nan)


def update_factors(
    rms: Tensor, *, max_rms: float | None = None, match_rms: float | None = None
) -> Tensor:
    """Return the factors that bring updates of these RMS to a cap or to a target.

    Args:
        rms: any shape, fp32; what `update_rms` returned.
        max_rms: the cap; the factor is min(1, max_rms / rms). Give this or match_rms.
        match_rms: the target; the factor is match_rms / rms.
    Returns:
        rms's shape, fp32. The factor is 1 where the RMS is 0 or NaN, so that the finite elements of
        a tensor with a NaN are updated as without a cap or target.
    """
    target = max_rms if match_rms is None else match_rms
    assert target is not None
    factors = torch.full_like(rms, target) / rms
    if match_rms is None:
        factors = factors.clamp(max=1.0)
    return torch.where((rms > 0) & factors.isfinite(), factors, 1.0)


def exp_avg_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a param's exp_avg and of its arithmetic: fp64 for fp64, else fp32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@overload
def bias_correction_factor(beta1: float, step: int) -> float: ...


@overload
def bias_correction_factor(beta1: float, step: Tensor) -> Tensor: ...


def bias_correction_factor(beta1: float, step: int | Tensor) -> float | Tensor:
    """Return 1 / (1 - beta1^step) in double: a float, or for an fp64 tensor a tensor on its device.

    It is a factor, not a divisor, because torch divides by a scalar through its reciprocal on CUDA
    but not on the CPU.
    """
    return 1 / (1 - beta1**step)


def update_bound(
    *,
    beta1: float,
    beta2: float,
    step: int = 1,
    bias_correction: bool = False,
    nesterov: bool = False,
) -> float:
    """Return the largest |n_t / (sqrt(v_t) + eps)| that any gradients can produce, in units of lr.

    n_t is m_t, or what `nesterov` makes of it. The bound follows from the Cauchy-Schwarz inequality
    for n_t and v_t. It is 1.026 for betas (0.9, 0.95), 3.29 for (0.9, 0.999), and 1.189 for (0.9,
    0.95) with `nesterov`. `step` matters only with `bias_correction`, which enlarges the first
    steps. `cautious` changes no bound. In fp32 the bound needs eps >= 2**-63, because smaller
    squares underflow.
    """
    check_numerator(nesterov=nesterov, bias_correction=bias_correction)
    correction = bias_correction_factor(beta1, step) if bias_correction else 1.0
    # How much of the numerator is m_{t-1}; the rest is g_t.
    old = beta1**2 if nesterov else beta1
    return math.sqrt(old**2 / beta2 + (correction * (1 - old)) ** 2 / (1 - beta2))
