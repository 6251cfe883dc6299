"""The GPU gives the host kernel's bits for all kinds of numbers, also subnormals and NaNs."""

import pytest
import torch

from megatron_adams.kernels import PointerTable, cuda, foreach, host
from megatron_adams.kernels.modes import ALL_MODES, GUARDED_MODES, Mode
from tests.kernels.checks import (
    DTYPES,
    SCALARS,
    copy_batch,
    differences,
    make_batch,
    scalar_cases,
    with_guards,
)
from tests.kernels.test_backends import REPRESENTATIVES

_NARROW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# Larger for a mode that stands for others.
_NUMEL = {True: 2**22 + 5, False: 50_003}


def random_bits(mode, numel, seed):
    """Make a batch of two tensors with random bits.

    The second one's gradient and state, which scales are made for, are in the range of training.
    """
    batch = make_batch(mode, (numel, numel), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, column in batch.columns():
        for index, tensor in enumerate(column or ()):
            if index == 1 and name in ("grads", "exp_avgs"):
                continue
            width = tensor.dtype.itemsize
            bits = torch.randint(
                -(2 ** (8 * width - 1)), 2 ** (8 * width - 1), (numel,), generator=generator
            )
            tensor.view(_NARROW[width]).copy_(bits.to(_NARROW[width]))
    return batch


def check_against_host(batch, scalars, device_scalars, **options):
    on_gpu = copy_batch(batch, "cuda")
    for _ in range(2):
        host.run(batch, scalars, PointerTable(), **options)
        cuda.run(on_gpu, device_scalars, PointerTable(), cuda.CudaDriver(), **options)
        assert not differences(on_gpu, batch)


@pytest.mark.parametrize("mode", ALL_MODES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_mode_gives_the_bits_of_the_host_kernel(mode):
    batch = random_bits(mode, _NUMEL[mode in REPRESENTATIVES], seed=1)
    case = "bias_correction" if mode in REPRESENTATIVES else "device_scalars"
    check_against_host(batch, scalar_cases()[case], scalar_cases("cuda")[case])


@pytest.mark.parametrize("mode", GUARDED_MODES[::7], ids=lambda mode: mode.name)
@pytest.mark.parametrize("only_count", [True, False])
@torch.no_grad()
def test_guarded_modes_give_the_bits_of_the_host_kernel(mode, only_count):
    batch = random_bits(mode._replace(is_guarded=False), _NUMEL[False], seed=2)
    batch = with_guards(batch, sums=True, factors=not only_count)
    check_against_host(batch, SCALARS, SCALARS, only_count=only_count)


@pytest.mark.parametrize("case", ["decoupled", "l2", "device_scalars"])
@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_foreach_gives_the_bits_of_the_kernel(mode, case):
    batch = random_bits(mode, _NUMEL[False], seed=3)
    by_kernel, by_foreach = copy_batch(batch, "cuda"), copy_batch(batch, "cuda")
    scalars = scalar_cases("cuda")[case]
    cuda.run(by_kernel, scalars, PointerTable(), cuda.CudaDriver())
    foreach.run(by_foreach, scalars)
    assert not differences(by_foreach, by_kernel)


def test_random_bits_hold_numbers_of_every_kind():
    batch = random_bits(Mode("fp32", "bf16", "fp32", "fp32"), 50_003, seed=1)
    for tensor in (batch.grads[0], batch.main_params[0], batch.params[0].float()):
        tiny = torch.finfo(torch.float32).tiny
        assert tensor.isnan().any() and ((tensor.abs() < tiny) & (tensor != 0)).any()
    assert {tensor.dtype for tensor in batch.params} == {DTYPES["bf16"]}
    assert batch.grads[1].isfinite().all()
