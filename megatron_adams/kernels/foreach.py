"""The foreach backend: torch operations, for other devices and machines without a compiler.

It is slower than a kernel. Its temporary tensors are several times as large as the tensors that it
works on, so it splits a batch into parts. The operations, and therefore the bits, are those of
`megatron_adams.update`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_adams.kernels.batch import Batch, Scalars
from megatron_adams.precision import read_stored, to_fp8, write_stored_
from megatron_adams.update import count_squares, exp_avg_dtype, keep_aligned

Tensors = list[Tensor] | tuple[Tensor, ...]

# Elements of a part; each temporary list then takes 64 MiB.
_PART = 2**24


def run(batch: Batch, scalars: Scalars, *, only_count: bool = False) -> None:
    """Update `batch`, or only count the squares of its updates. Waits for a found_inf on a GPU."""
    if scalars.found_inf is not None and scalars.found_inf.item() != 0:
        return
    for indices in _parts(batch.params):
        _update(batch, indices, scalars, only_count)


def _parts(params: Sequence[Tensor]) -> Iterator[list[int]]:
    part: list[int] = []
    size = 0
    for index, param in enumerate(params):
        if part and size + param.numel() > _PART:
            yield part
            part, size = [], 0
        part.append(index)
        size += param.numel()
    yield part


def _update(batch: Batch, indices: list[int], scalars: Scalars, only_count: bool) -> None:
    dtype = exp_avg_dtype(batch.params[0])
    lr, grad_scale, correction = (
        value.to(dtype).reshape(()) if isinstance(value, Tensor) else value
        for value in (scalars.lr, scalars.grad_scale, scalars.correction)
    )
    beta1, beta2 = scalars.beta1, scalars.beta2
    masters: Tensors = [_read_master(batch, i, dtype) for i in indices]
    exp_avgs: Tensors = [
        read_stored(batch.exp_avgs[i], scale=_exp_avg_scale(batch, i)) for i in indices
    ]

    decay: Tensors | None = None
    if scalars.weight_decay != 0:
        decay = torch._foreach_mul(masters, scalars.weight_decay)
    grads: Tensors = torch._foreach_mul([batch.grads[i].to(dtype) for i in indices], grad_scale)
    if decay is not None and not scalars.decoupled_weight_decay:
        grads = torch._foreach_add(grads, decay)
    v = torch._foreach_mul(exp_avgs, correction)
    v = torch._foreach_mul(v, v)
    torch._foreach_mul_(v, beta2)
    squares = torch._foreach_mul(grads, grads)
    torch._foreach_mul_(squares, 1 - beta2)
    torch._foreach_add_(v, squares)
    moved = torch._foreach_mul(grads, 1 - beta1)
    exp_avgs = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, moved)
    numerators: Tensors = exp_avgs
    if scalars.nesterov:
        numerators = torch._foreach_mul(exp_avgs, beta1)
        torch._foreach_add_(numerators, moved)
    if scalars.cautious:
        numerators = [keep_aligned(n, g) for n, g in zip(numerators, grads, strict=True)]
    updates = torch._foreach_mul(numerators, correction)
    torch._foreach_div_(updates, _denominators(v, scalars.eps))
    if batch.update_sums is not None:
        for i, update in zip(indices, updates, strict=True):
            batch.update_sums[i].add_(count_squares(update))
    if only_count:
        return
    if batch.update_factors is not None:
        factors = [batch.update_factors[i].to(dtype).reshape(()) for i in indices]
        torch._foreach_mul_(updates, factors)
    if decay is not None and scalars.decoupled_weight_decay:
        torch._foreach_add_(updates, decay)
    torch._foreach_mul_(updates, lr)
    masters = torch._foreach_sub(masters, updates)

    for i, master, exp_avg in zip(indices, masters, exp_avgs, strict=True):
        _write_master(batch, i, master)
        write_stored_(batch.exp_avgs[i], exp_avg, scale=_exp_avg_scale(batch, i))


def _denominators(v: Tensors, eps: float) -> Tensors:
    if v[0].device.type == "cpu" and v[0].dtype == torch.float32:
        # torch's sqrt is not correctly rounded on the CPU: see megatron_adams.update.
        roots = tuple(x.double().sqrt().to(x.dtype) for x in v)
    else:
        roots = torch._foreach_sqrt(v)
    torch._foreach_add_(roots, eps)
    return roots


def _read_master(batch: Batch, i: int, dtype: torch.dtype) -> Tensor:
    if batch.main_params is None:
        return batch.params[i].to(dtype)
    return read_stored(batch.main_params[i], scale=_main_scale(batch, i), param=batch.params[i])


def _write_master(batch: Batch, i: int, master: Tensor) -> None:
    param = batch.params[i]
    if batch.main_params is None:
        param.copy_(master)
        return
    main = batch.main_params[i]
    write_stored_(main, master, scale=_main_scale(batch, i), param=param)
    if main.dtype == torch.int16:
        return
    if batch.fp8_scaling is None:
        param.copy_(master)
        return
    fp8 = batch.fp8_scaling[i]
    param.copy_(to_fp8(master * fp8.scale, param.dtype))
    if master.numel():
        fp8.amax.copy_(torch.maximum(fp8.amax, master.abs().max().reshape(fp8.amax.shape)))
        fp8.scale_inv.copy_(1 / fp8.scale)


def _main_scale(batch: Batch, i: int) -> Tensor | None:
    return None if batch.main_scales is None else batch.main_scales[i]


def _exp_avg_scale(batch: Batch, i: int) -> Tensor | None:
    return None if batch.exp_avg_scales is None else batch.exp_avg_scales[i]
