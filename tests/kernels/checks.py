"""Cases for the kernels and their oracle: what update.py and precision.py say, tensor by tensor.

A backend under test is a function of (Batch, Scalars). Used by the tests of every backend, by the
mutation check and, with another device, by tests/gpu.
"""

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_adams.kernels import Mode
from megatron_adams.kernels.batch import Batch, Fp8Scaling, Scalars
from megatron_adams.kernels.modes import ALL_MODES
from megatron_adams.kernels.table import CHUNK
from megatron_adams.precision import (
    decode_scaled,
    encode_scaled,
    join_master,
    split_master,
    to_fp8,
)
from megatron_adams.update import adams_update_

Run = Callable[[Batch, Scalars], None]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
# Every param, exp_avg and main with one gradient, another each time.
THIRD = tuple(mode for i, mode in enumerate(ALL_MODES) if (i // 3 + i) % 3 == 0)
# Around a vector, a block's stride and a chunk; nothing at all; a chunk and a tail.
SIZES = (0, 1, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 1023, 4096, 0, CHUNK - 1, CHUNK, CHUNK + 5, 0)
# Offsets that align the tensors of one index in different ways.
MISALIGNED = (1, 0, 3, 2, 0)

# The step that a bias correction in `scalar_cases` is the one of.
STEP = 3
SCALARS = Scalars(
    lr=1e-2,
    grad_scale=1.0,
    correction=1.0,
    found_inf=None,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decoupled_weight_decay=True,
)


def scalar_cases(device: str = "cpu") -> dict[str, Scalars]:
    """The ways in which a step can be asked for."""

    def one(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=device)

    return {
        "decoupled": SCALARS,
        "no_decay": replace(SCALARS, weight_decay=0.0),
        "l2": replace(SCALARS, decoupled_weight_decay=False),
        "bias_correction": replace(SCALARS, correction=1 / (1 - 0.9**STEP)),
        "grad_scale": replace(SCALARS, grad_scale=0.123),
        "device_scalars": replace(
            SCALARS,
            lr=one(3e-3),
            grad_scale=one(0.37),
            correction=one(1 / (1 - 0.9**STEP)),
            found_inf=one(0.0),
        ),
        "fp64_lr": replace(SCALARS, lr=one(3e-3, torch.float64).squeeze()),
        "large_eps_betas": replace(SCALARS, eps=0.5, beta1=0.0, beta2=0.999, lr=1.0),
        "found_inf": replace(SCALARS, found_inf=one(1.0)),
    }


# The forms of the update that are not the paper's.
FORMS = {
    "nesterov": replace(SCALARS, nesterov=True),
    "cautious": replace(SCALARS, cautious=True, decoupled_weight_decay=False),
    "nesterov_cautious": replace(SCALARS, nesterov=True, cautious=True, grad_scale=0.123),
}


def in_form_of(mode: Mode, scalars: Scalars) -> Scalars:
    """The same step in the form that a mode's kernel has."""
    return replace(scalars, nesterov=mode.is_nesterov, cautious=mode.is_cautious)


def make_batch(
    mode: Mode,
    sizes: Sequence[int] = SIZES,
    *,
    seed: int = 0,
    device: str = "cpu",
    offsets: Sequence[int] = (0,),
    special: bool = False,
) -> Batch:
    """Random tensors of a mode.

    Args:
        mode: the dtypes.
        sizes: elements of each tensor.
        seed: of the numbers.
        device: where they are put.
        offsets: elements of a storage before its tensor, for one tensor after another, again and
            again. A storage ends where its tensor ends, so that a sanitizer sees what goes beyond.
        special: zeros, subnormals, huge numbers, infinities and NaNs among them.
    """
    generator = torch.Generator().manual_seed(seed)
    next_offset = itertools.cycle(offsets)

    def place(values: Tensor) -> Tensor:
        offset = next(next_offset)
        storage = values.new_empty(values.numel() + offset).to(device)
        view = storage[offset:]
        view.view(_bits_dtype(values)).copy_(values.view(_bits_dtype(values)))
        return view

    def random(size: int, scale: float) -> Tensor:
        # Six orders of magnitude, as gradients have.
        spread = 10.0 ** (torch.rand(size, generator=generator) * 6 - 4)
        values = torch.randn(size, generator=generator) * spread * scale
        if special and size:
            places = torch.rand(size, generator=generator) < 0.2
            pick = torch.randint(len(_SPECIAL), (size,), generator=generator)
            values = torch.where(places, torch.tensor(_SPECIAL)[pick], values)
        return values

    grads, params, exp_avgs, mains = [], [], [], []
    exp_avg_scales, main_scales, fp8 = [], [], []
    for size in sizes:
        grads.append(place(random(size, 1.0).to(DTYPES[mode.grad])))
        exp_avg = random(size, 0.3)
        if mode.exp_avg in ("fp16", "e4m3"):
            stored, scale = encode_scaled(exp_avg, DTYPES[mode.exp_avg])
            exp_avgs.append(place(stored))
            exp_avg_scales.append(scale.clone().to(device))
        else:
            exp_avgs.append(place(exp_avg.to(DTYPES[mode.exp_avg])))
        master = random(size, 2.0)
        if mode.main == "remainder":
            high, low = split_master(master)
            params.append(place(high))
            mains.append(place(low))
            continue
        param = to_fp8(master, DTYPES[mode.param]) if mode.param[0] == "e" else master
        params.append(place(param.to(DTYPES[mode.param])))
        if mode.main == "fp32":
            mains.append(place(master))
        elif mode.main == "fp16":
            stored, scale = encode_scaled(master, torch.float16)
            mains.append(place(stored))
            main_scales.append(scale.clone().to(device))
        if mode.param[0] == "e":
            values = (2.0 ** torch.randint(-3, 6, (), generator=generator).item(), 0.5, 7.0)
            fp8.append(Fp8Scaling(*(torch.tensor([x], device=device) for x in values)))
    return Batch(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        main_params=mains or None,
        exp_avg_scales=exp_avg_scales or None,
        main_scales=main_scales or None,
        fp8_scaling=fp8 or None,
    )


_SPECIAL = (
    *(0.0, -0.0, 1e-45, -3e-39, 1.17549435e-38, 6e-8, 6.1e-5, 65504.0, 65520.0, 3.3895314e38),
    *(3.4028235e38, -3.4028235e38, float("inf"), float("-inf"), float("nan")),
    # A NaN of ones, which rounding would carry into the sign.
    struct.unpack("<d", b"\xff" * 7 + b"\x7f")[0],
    *(448.0, 464.0, 57344.0),
)


def with_guards(batch: Batch, *, sums: bool = False, factors: bool = False) -> Batch:
    """The same batch, whose updates are counted, or multiplied by factors, 1 among them."""
    num_tensors, device = len(batch.params), batch.device
    # Not zeros: what is counted is added.
    counted = torch.full((num_tensors, 2), 5, dtype=torch.int64, device=device)
    factor = torch.tensor([0.37, 1.0, 3.0, 1e-3], device=device).repeat(num_tensors)[:num_tensors]
    return replace(
        batch,
        update_sums=list(counted) if sums else None,
        update_factors=list(factor) if factors else None,
    )


def expected(batch: Batch, scalars: Scalars, *, only_count: bool = False) -> Batch:
    """What the step makes of a copy of `batch`, by adams_update_ and precision.py, on the CPU."""
    batch = copy_batch(batch, "cpu")
    if scalars.found_inf is not None and scalars.found_inf.item() != 0:
        return batch
    lr, grad_scale = (
        value.cpu() if isinstance(value, Tensor) else value
        for value in (scalars.lr, scalars.grad_scale)
    )
    for i, param in enumerate(batch.params):
        main = None if batch.main_params is None else batch.main_params[i]
        exp_avg, master = exp_avg_of(batch, i).clone(), master_of(batch, i).clone()
        adams_update_(
            master,
            batch.grads[i].float() * grad_scale,
            exp_avg,
            lr=lr,
            beta1=scalars.beta1,
            beta2=scalars.beta2,
            eps=scalars.eps,
            weight_decay=scalars.weight_decay,
            step=STEP,
            bias_correction=scalars.correction != 1.0,
            decoupled_weight_decay=scalars.decoupled_weight_decay,
            nesterov=scalars.nesterov,
            cautious=scalars.cautious,
            update_sums=None if batch.update_sums is None else batch.update_sums[i],
            update_factor=1.0 if batch.update_factors is None else batch.update_factors[i],
        )
        if only_count:
            continue
        if batch.exp_avg_scales is None:
            batch.exp_avgs[i].copy_(exp_avg)
        else:
            _put_scaled(batch.exp_avgs[i], batch.exp_avg_scales[i], exp_avg)
        if main is None:
            param.copy_(master)
        elif main.dtype == torch.int16:
            for target, half in zip((param, main), split_master(master), strict=True):
                target.copy_(half)
        else:
            if batch.main_scales is None:
                main.copy_(master)
            else:
                _put_scaled(main, batch.main_scales[i], master)
            if batch.fp8_scaling is None:
                param.copy_(master)
            elif param.numel():
                fp8 = batch.fp8_scaling[i]
                param.copy_(to_fp8(master * fp8.scale, param.dtype))
                fp8.amax.copy_(torch.maximum(fp8.amax, master.abs().max()))
                fp8.scale_inv.copy_(1 / fp8.scale)
    return batch


def _put_scaled(stored: Tensor, scale: Tensor, values: Tensor) -> None:
    encoded, new_scale = encode_scaled(values, stored.dtype)
    stored.copy_(encoded)
    scale.copy_(new_scale)


def exp_avg_of(batch: Batch, i: int) -> Tensor:
    """The fp32 exp_avg of tensor i."""
    if batch.exp_avg_scales is None:
        return batch.exp_avgs[i].float()
    return decode_scaled(batch.exp_avgs[i], batch.exp_avg_scales[i])


def master_of(batch: Batch, i: int) -> Tensor:
    """The fp32 master weight of tensor i."""
    if batch.main_params is None:
        return batch.params[i].float()
    main = batch.main_params[i]
    if main.dtype == torch.int16:
        return join_master(batch.params[i], main)
    return main if batch.main_scales is None else decode_scaled(main, batch.main_scales[i])


def copy_batch(batch: Batch, device: str) -> Batch:
    """The same numbers in new tensors, aligned, on a device."""

    def copies(column: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if column is None else [tensor.clone().to(device) for tensor in column]

    return Batch(
        **{name: copies(column) for name, column in batch.columns()},
        exp_avg_scales=copies(batch.exp_avg_scales),
        main_scales=copies(batch.main_scales),
        fp8_scaling=None
        if batch.fp8_scaling is None
        else [Fp8Scaling(*copies(scaling)) for scaling in batch.fp8_scaling],
        update_sums=copies(batch.update_sums),
        update_factors=copies(batch.update_factors),
    )


@dataclass(frozen=True)
class Difference:
    """Where a batch is not what it should be."""

    column: str
    tensor: int
    element: int
    got: float
    want: float


def differences(got: Batch, want: Batch) -> list[Difference]:
    """Compare two batches bit for bit, but for the payloads of NaNs; the first of each tensor."""
    found = []
    columns = zip(
        (*got.columns(), *got.scale_columns(), *got.guard_columns()),
        (*want.columns(), *want.scale_columns(), *want.guard_columns()),
        strict=True,
    )
    for (name, mine), (_, theirs) in columns:
        for index, (a, b) in enumerate(zip(mine or (), theirs or (), strict=True)):
            a, b = a.detach().cpu().reshape(-1), b.detach().cpu().reshape(-1)
            bits = _bits_dtype(a)
            unequal = a.view(bits) != b.view(bits)
            if a.dtype.is_floating_point:
                unequal &= ~(a.float().isnan() & b.float().isnan())
            if unequal.any():
                element = int(unequal.nonzero()[0, 0])
                found.append(
                    Difference(
                        name,
                        index,
                        element,
                        a.float()[element].item(),
                        b.float()[element].item(),
                    )
                )
    return found


def _bits_dtype(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]


def check(run: Run, batch: Batch, scalars: Scalars, steps: int = 2) -> list[Difference]:
    """Run a backend on `batch` and return where it differs from the oracle; gradients included."""
    return check_all({"": run}, lambda: batch, scalars, steps).get("", [])


def check_all(
    runs: Mapping[str, Run], make: Callable[[], Batch], scalars: Scalars, steps: int = 2
) -> dict[str, list[Difference]]:
    """Run backends, each on a batch that `make` returns, and return where each is wrong, by name.

    What the oracle makes of a batch is computed once for all of them.
    """
    batches = {name: make() for name in runs}
    want = next(iter(batches.values()))
    for _ in range(steps):
        want = expected(want, scalars)
        found = {}
        for name, run in runs.items():
            run(batches[name], scalars)
            if wrong := differences(batches[name], want):
                found[name] = wrong
        if found:
            return found
    return {}
