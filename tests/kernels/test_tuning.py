"""The alternatives that the CUDA kernel can be compiled with: none of them shows in its results."""

import pytest
import torch

from megatron_adams.kernels import PointerTable, cuda
from megatron_adams.kernels.compile import CompileError, compile_cuda, source_text
from megatron_adams.kernels.tuning import Tuning
from tests.kernels.batteries import SMALL_SIZES
from tests.kernels.checks import (
    MISALIGNED,
    check,
    differences,
    expected,
    make_batch,
    scalar_cases,
    with_guards,
)
from tests.kernels.emulator import EmulatedDriver, load_emulator
from tests.kernels.test_backends import REPRESENTATIVES

# Hints for the caches and the GPU's own conversions are nothing that a CPU can execute: for those,
# tests/gpu compares the results.
ALTERNATIVES = (
    Tuning(group=4),
    Tuning(group=8),
    Tuning(group=4, unroll=2),
    Tuning(group=8, unroll=2, block=128),
    Tuning(group=16, block=512),
    Tuning(group=0, unroll=3, block=64),
)


@pytest.mark.parametrize("tuning", ALTERNATIVES, ids=str)
@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_layout_gives_the_bits_of_the_oracle(mode, tuning):
    library = load_emulator(mode, tuning=tuning)
    driver = EmulatedDriver(load=lambda _: library, constants=tuning)

    def run(batch, scalars):
        cuda.run(batch, scalars, PointerTable(), driver)

    for case, offsets, special in (("l2", MISALIGNED, False), ("decoupled", (0,), True)):
        batch = make_batch(mode, SMALL_SIZES, offsets=offsets, special=special, seed=1)
        assert not check(run, batch, scalar_cases()[case], steps=1)


@pytest.mark.parametrize("chunk_size", [16, 1024, 4096, 65536])
@torch.no_grad()
def test_every_chunk_size_gives_the_bits_of_the_oracle(chunk_size):
    scalars = scalar_cases()["decoupled"]
    for mode in (REPRESENTATIVES[0], REPRESENTATIVES[4]):
        guarded = with_guards(make_batch(mode, (0, 1, 5000, 16400, 17), seed=2), sums=True)
        for batch in (make_batch(mode, (0, 1, 5000, 16400, 17), seed=2), guarded):
            want = expected(batch, scalars)
            driver = EmulatedDriver()
            cuda.run(batch, scalars, PointerTable(chunk_size), driver)
            assert not differences(batch, want)
            chunks = sum(-(-size // chunk_size) for size in (0, 1, 5000, 16400, 17))
            assert max(launch.num_blocks for launch in driver.launches) == chunks


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(group=4, hardware_conversions=True),
        Tuning(group=8, load="no_allocate", store="streaming", hardware_conversions=True),
        Tuning(group=4, load="prefetch_256B"),
        Tuning(group=4, load="streaming", min_blocks=4),
    ],
    ids=str,
)
def test_what_no_cpu_can_execute_compiles(tuning, arch):
    for mode in REPRESENTATIVES[1:]:
        image = compile_cuda(source_text("device.cu"), {**mode.defines(), **tuning.defines()}, arch)
        assert image[:4] == b"\x7fELF"


def test_a_group_that_no_access_is_for_does_not_compile():
    tuning = Tuning(group=2)
    mode = REPRESENTATIVES[4]  # with a dtype of one byte
    with pytest.raises(CompileError):
        compile_cuda(source_text("device.cu"), {**mode.defines(), **tuning.defines()}, "sm_90")
