"""The GPU's instructions convert every number as the arithmetic of element.h does.

Tuning.hardware_conversions chooses between them; the payloads of NaNs may differ.
"""

import ctypes
from functools import cache

import pytest
import torch

from megatron_adams.kernels import compile
from megatron_adams.kernels.cuda import arch_of, call_driver
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.tuning import Tuning

# For each codec of element.h: the dtype of its storage, and a magnitude: infinity's or the largest.
CODECS = {
    "BF16": (torch.int16, 0x7FFF, 0x7F80),
    "F16": (torch.int16, 0x7FFF, 0x7C00),
    "E4M3": (torch.uint8, 0x7F, 0x7E),
    "E5M2": (torch.uint8, 0x7F, 0x7C),
}
SLICE = 2**27
BLOCK = 256
_KERNELS = """
extern "C" __global__ void encode_{codec}(unsigned first, long long count, void* stored) {{
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    using adams::{codec};
    const float number = adams::float_of(int(first + unsigned(i)));
    adams::write_word(static_cast<{codec}::Storage*>(stored)[i], {codec}::encode(number));
}}
extern "C" __global__ void decode_{codec}(unsigned first, long long count, void* numbers) {{
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    using adams::{codec};
    const {codec}::Storage stored = first + unsigned(i);
    static_cast<float*>(numbers)[i] = {codec}::decode(adams::word_of(stored));
}}
"""


def kernel_source():
    return compile.source_text("element.h") + "".join(_KERNELS.format(codec=c) for c in CODECS)


def compiled(arch, *, by_hardware):
    """Return a cubin of all conversions, by the GPU's instructions or by integer arithmetic."""
    mode = Mode("fp32", "fp32", "fp32", "none")  # of the step, which nobody calls here
    tuning = Tuning(hardware_conversions=by_hardware)
    return compile.compile_cuda(kernel_source(), {**mode.defines(), **tuning.defines()}, arch)


@cache
def module(by_hardware):
    torch.zeros(1, device="cuda")  # makes this thread's context
    return call_driver("cuModuleLoadData", compiled(arch_of(0), by_hardware=by_hardware))


def convert(name, first, out, *, by_hardware):
    """Fill `out` with the conversions of the bits from `first` on."""
    kernel = call_driver("cuModuleGetFunction", module(by_hardware), name.encode())
    values = (first, out.numel(), out.data_ptr())
    types = (ctypes.c_uint, ctypes.c_longlong, ctypes.c_void_p)
    grid, block = (-(-out.numel() // BLOCK), 1, 1), (BLOCK, 1, 1)
    stream = torch.cuda.current_stream().cuda_stream
    call_driver("cuLaunchKernel", kernel, *grid, *block, 0, stream, (values, types), 0)


def first_difference(a, b, is_nan):
    """Return the index of the first number that differs, or None. NaNs count as equal."""
    if torch.equal(a, b):
        return None
    wrong = (a != b) & ~(is_nan(a) & is_nan(b))
    return int(wrong.nonzero()[0, 0]) if wrong.any() else None


def test_both_forms_are_compiled_into_different_code():
    assert compiled(arch_of(0), by_hardware=True) != compiled(arch_of(0), by_hardware=False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("codec", CODECS)
def test_every_fp32_number_is_encoded_alike(codec):
    dtype, magnitude, largest = CODECS[codec]
    by_hardware, by_software = (torch.empty(SLICE, dtype=dtype, device="cuda") for _ in range(2))
    num_nans = 0
    for first in range(0, 2**32, SLICE):
        # So a number that a kernel does not write differs.
        by_hardware.fill_(1)
        by_software.fill_(2)
        convert(f"encode_{codec}", first, by_hardware, by_hardware=True)
        convert(f"encode_{codec}", first, by_software, by_hardware=False)
        wrong = first_difference(
            by_hardware, by_software, lambda stored: (stored & magnitude) > largest
        )
        assert wrong is None, (
            f"{first + wrong:#010x}: {by_hardware[wrong]:#x} and {by_software[wrong]:#x}"
        )
        num_nans += int(((by_software & magnitude) > largest).sum())
    # All NaNs of fp32 are NaNs, and nothing else is.
    assert num_nans == 2 * (2**23 - 1)


@pytest.mark.parametrize("codec", CODECS)
def test_every_stored_number_is_decoded_alike(codec):
    dtype, _, _ = CODECS[codec]
    count = 2 ** (8 * dtype.itemsize)
    by_hardware, by_software = (torch.full((count,), x, device="cuda") for x in (1.0, 2.0))
    convert(f"decode_{codec}", 0, by_hardware, by_hardware=True)
    convert(f"decode_{codec}", 0, by_software, by_hardware=False)
    bits = (by_hardware.view(torch.int32), by_software.view(torch.int32))
    wrong = first_difference(*bits, lambda numbers: numbers.view(torch.float32).isnan())
    assert wrong is None, f"{wrong:#x}: {by_hardware[wrong]} and {by_software[wrong]}"
