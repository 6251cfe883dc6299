"""Megatron's hybrid optimizer with AdamS on a GPU and its CPU has the bits of AdamS on the GPU.

tests/distributed/test_offload.py shows the same where both devices are the CPU. Here there are
copies between them, pinned memory and streams.
"""

import pytest
import torch

pytest.importorskip("megatron.core", reason="not run: Megatron-Core is not installed")

from megatron_adams.megatron import AdamSOptimizerConfig
from megatron_adams.megatron.offload import HybridAdamS
from megatron_adams.optimizer import AdamS

STORAGES = {
    "fp32": (torch.float32, {}),
    "remainders": (torch.bfloat16, {"master_weights": True, "store_param_remainders": True}),
    "masters": (torch.float16, {"master_weights": True}),
}
SIZES = (5, 3_000_000, 0, 70_001, 128)


def groups(dtype):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(dtype).cuda() for size in SIZES]
    return [
        {"params": params[:2], "lr": 1e-3, "weight_decay": 0.1},
        {"params": params[2:], "lr": 2e-3, "weight_decay": 0.0},
    ]


def take_step(optimizer, step):
    """Start a step. Neither optimizer waits for its end before the next one is started."""
    generator = torch.Generator("cuda").manual_seed(step)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 / (1 + step)
        for param in group["params"]:
            grad = torch.randn(param.shape, generator=generator, device="cuda")
            # The copies to the CPU must wait for this.
            torch.cuda._sleep(1_000_000)
            param.decoupled_grad = grad * 2
    optimizer.step(grad_scale=torch.tensor(0.25, device="cuda"))


@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlapped"])
@pytest.mark.parametrize("fraction", [0.01, 1.0])
@pytest.mark.parametrize("storage", STORAGES)
def test_offloading_changes_no_bit(storage, fraction, overlap):
    dtype, options = STORAGES[storage]
    options = {**options, "use_decoupled_grad": True}
    config = AdamSOptimizerConfig(
        lr=1e-3,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=True,
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=fraction,
        overlap_cpu_optimizer_d2h_h2d=overlap,
    )
    # If its kernel cannot be compiled, it raises, and the hybrid's does not fall back, either.
    on_gpu = AdamS.from_param_groups(groups(dtype), kernel="cuda", **options)
    hybrid = HybridAdamS(AdamS.from_param_groups(groups(dtype), **options), config, options)
    hybrid.compile_kernels(torch.float32)
    for step in range(4):
        take_step(on_gpu, step)
        take_step(hybrid, step)
    copies = hybrid.gpu_params_map_cpu_copy
    assert copies and (fraction == 1) == (len(copies) == len(SIZES))
    for copy in copies.values():
        assert copy.device.type == "cpu"
        # An empty tensor has no memory that could be pinned.
        assert copy.numel() == 0 or (copy.is_pinned() and copy.decoupled_grad.is_pinned())
    for mine, theirs in zip(hybrid.param_groups, on_gpu.param_groups, strict=True):
        assert mine["step"] == theirs["step"] == 4
        for my_param, their_param in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(my_param, their_param)
            for name in ("exp_avg", "master_param"):
                state = hybrid.get_unscaled_state(my_param, name)
                assert (state.device.type == "cpu") == (my_param in copies)
                assert torch.equal(state.cuda(), on_gpu.get_unscaled_state(their_param, name))
    start = groups(dtype)
    assert not torch.equal(hybrid.param_groups[0]["params"][1], start[0]["params"][1])
