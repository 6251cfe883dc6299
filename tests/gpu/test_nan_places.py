"""A gradient that is not finite is found wherever it is. Skipping a step relies on that.

The plugin replaces Megatron's check by one pass (megatron/fused_step.py):
`torch.nn.utils.get_total_norm` with the norm inf.
"""

import math

import pytest
import torch

# One number, more numbers than a block or a chunk of torch's kernels has, and ten million.
SIZES = (1, 65_537, 10_000_000)
PLACES = (0, 1, 65_535, 65_536, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_norms_show_one_number_that_is_not_finite(dtype, value):
    grads = [torch.randn(size, device="cuda").to(dtype) for size in SIZES]
    assert torch.nn.utils.get_total_norm(grads, norm_type=math.inf).isfinite()
    for grad in grads:
        for place in PLACES:
            if place >= grad.numel():
                continue
            before = grad[place].clone()
            grad[place] = value
            of_each = torch._foreach_norm(grads, math.inf)
            total = torch.nn.utils.get_total_norm(grads, norm_type=math.inf)
            assert not total.isfinite(), (grad.numel(), place)
            finite = [bool(norm.isfinite()) for norm in of_each]
            assert finite == [other is not grad for other in grads], (grad.numel(), place)
            grad[place] = before
