"""AdamS on a GPU has the bits of AdamS on the CPU, wherever it is called from."""

import copy
import io

import pytest
import torch

from megatron_adams.kernels.table import POINTERS
from megatron_adams.optimizer import AdamS

SIZES = ((1000,), (3,), (0,), (64, 50), (70_001,))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTERS = {
    "no_master": {},
    "fp32_master": {"master_weights": True},
    "fp16_master": {"master_weights": True, "master_weight_dtype": torch.float16},
    "remainders": {"master_weights": True, "store_param_remainders": True},
}
EXP_AVGS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
STORAGES = {
    f"{dtype}-{master}-{exp_avg}": (
        DTYPES[dtype],
        {**MASTERS[master], "exp_avg_dtype": EXP_AVGS[exp_avg]},
    )
    for dtype, masters in (
        ("fp32", ("no_master",)),
        ("bf16", tuple(MASTERS)),
        ("fp16", ("no_master", "fp32_master", "fp16_master")),
    )
    for master in masters
    for exp_avg in EXP_AVGS
}
KERNELS = {"cpu": "host", "cuda": "cuda"}
# A tenth of a second in clock cycles: long enough for the host to be far ahead.
A_WHILE = 200_000_000


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(device, dtype=torch.float32, seed=0, **options):
    """Return params, with the same numbers on every device, and an optimizer of two groups."""
    params = [
        torch.nn.Parameter(random(shape, seed + index, dtype).to(device))
        for index, shape in enumerate(SIZES)
    ]
    groups = [{"params": params[:2], "weight_decay": 0.1, "lr": 3e-3}, {"params": params[2:]}]
    return params, AdamS(groups, lr=1e-3, kernel=KERNELS[device], **options)


def set_grads(params, step):
    """Set gradients in new tensors, so that the table of addresses has to be written again."""
    for index, param in enumerate(params):
        param.grad = random(param.shape, 1000 * step + index, param.dtype).to(param.device)


def take_step(params, optimizer, step, **scalars):
    set_grads(params, step)
    optimizer.step(**scalars)


def assert_same(mine, theirs):
    """Compare the bits of params and state; `mine` may be on another device."""
    for my_param, their_param in zip(mine[0], theirs[0], strict=True):
        assert torch.equal(my_param.detach().cpu(), their_param.detach().cpu())
        state = theirs[1].state[their_param]
        assert mine[1].state[my_param].keys() == state.keys()
        for name in state:
            my_state = mine[1].get_unscaled_state(my_param, name)
            their_state = theirs[1].get_unscaled_state(their_param, name)
            assert torch.equal(my_state.cpu(), their_state.cpu()), name
    assert [g["step"] for g in mine[1].param_groups] == [g["step"] for g in theirs[1].param_groups]


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_has_the_bits_of_the_cpu(storage):
    dtype, options = STORAGES[storage]
    both = [build(device, dtype, **options) for device in KERNELS]
    for step in range(4):
        for params, optimizer in both:
            device = params[0].device
            scalars = {
                "grad_scale": torch.tensor(0.37, device=device),
                "found_inf": torch.tensor([float(step == 2)], device=device),
            }
            take_step(params, optimizer, step, **scalars)
    assert_same(both[1], both[0])
    before = build("cpu", dtype, **options)[0]
    assert not torch.equal(before[4], both[0][0][4])


@pytest.mark.parametrize("storage", ["fp32-no_master-fp32", "bf16-remainders-fp8"])
@pytest.mark.parametrize("source", KERNELS)
def test_a_saved_state_goes_on_on_the_gpu(storage, source):
    dtype, options = STORAGES[storage]
    saved, reference = build(source, dtype, **options), build("cpu", dtype, **options)
    for step in range(2):
        take_step(*saved, step)
        take_step(*reference, step)
    file = io.BytesIO()
    torch.save((saved[0], saved[1].state_dict()), file)
    file.seek(0)
    values, state_dict = torch.load(file, weights_only=True)
    loaded = build("cuda", dtype, seed=50, **options)
    with torch.no_grad():
        for param, value in zip(loaded[0], values, strict=True):
            param.copy_(value)
    loaded[1].load_state_dict(state_dict)
    for step in range(2, 4):
        take_step(*loaded, step)
        take_step(*reference, step)
    assert_same(loaded, reference)


def test_a_deep_copy_takes_its_own_steps():
    original, reference = build("cuda"), build("cuda")
    take_step(*original, 0)
    copied = copy.deepcopy(original)
    for step in range(1, 3):
        take_step(*copied, step)
    take_step(*reference, 0)
    assert_same(original, reference)
    for step in range(1, 3):
        take_step(*reference, step)
    assert_same(copied, reference)


def test_foreach_on_the_gpu_has_the_bits_of_the_kernel():
    by_kernel = build("cuda", bias_correction=True)
    params, _ = build("cuda")
    groups = [{"params": params[:2], "weight_decay": 0.1, "lr": 3e-3}, {"params": params[2:]}]
    by_foreach = params, AdamS(groups, lr=1e-3, bias_correction=True, kernel="foreach")
    for step in range(3):
        take_step(*by_kernel, step)
        take_step(*by_foreach, step)
    assert_same(by_foreach, by_kernel)


def test_a_table_of_another_stream_outlives_the_step():
    on_cpu, on_gpu = build("cpu"), build("cuda")
    for step in range(3):
        take_step(*on_cpu, step)
    params, optimizer = on_gpu
    side = torch.cuda.Stream()
    take_step(params, optimizer, 0)  # writes the table, on this stream
    set_in_place(params, 1)
    side.wait_stream(torch.cuda.current_stream())
    # The caller is responsible for these.
    kept_grads = [param.grad for param in params]
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        optimizer.step()  # takes the same table, later
        take_step(params, optimizer, 2)  # writes another
    # If memory of the first table is free, this takes it and writes to it at once.
    num_rows = 2 + len(POINTERS)
    garbage = [
        torch.full((num_rows, num_tensors), -1, device="cuda")
        for num_tensors in range(1, 6)
        for _ in range(64)
    ]
    torch.cuda.synchronize()
    del garbage, kept_grads
    assert_same(on_gpu, on_cpu)


def set_in_place(params, step):
    for index, param in enumerate(params):
        param.grad.copy_(random(param.shape, 1000 * step + index, param.dtype))


def test_a_side_stream_steps_right_after_its_table_was_written():
    on_cpu, on_gpu = build("cpu"), build("cuda")
    side = torch.cuda.Stream()
    for step in range(8):
        take_step(*on_cpu, step)
        # Everything is copied from the CPU's pageable memory, on the current stream, which is then
        # far behind.
        torch.cuda._sleep(A_WHILE // 20)
        set_grads(on_gpu[0], step)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_gpu[1].step()
        torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    assert_same(on_gpu, on_cpu)


def test_two_optimizers_step_on_two_streams():
    on_cpu = [build("cpu", seed=seed) for seed in (0, 100)]
    on_gpu = [build("cuda", seed=seed) for seed in (0, 100)]
    streams = [torch.cuda.Stream() for _ in on_gpu]
    torch.cuda.synchronize()
    for step in range(6):
        for index, stream in enumerate(streams):
            take_step(*on_cpu[index], step)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(A_WHILE // 100 * (1 + (step + index) % 3))
                take_step(*on_gpu[index], step)
    torch.cuda.synchronize()
    for mine, theirs in zip(on_gpu, on_cpu, strict=True):
        assert_same(mine, theirs)


def backward_with_steps_inside(device):
    """Update every param in the backward's thread, as soon as its gradient is there."""
    params = [
        torch.nn.Parameter(random(shape, index).to(device)) for index, shape in enumerate(SIZES)
    ]
    optimizers = {}

    def update(param):
        optimizers[param].step()
        param.grad = None

    for param in params:
        optimizers[param] = AdamS([param], lr=1e-2, kernel=KERNELS[device])
        param.register_post_accumulate_grad_hook(update)
    for step in range(4):
        factors = [random(p.shape, 1000 * step + i).to(device) for i, p in enumerate(params)]
        # The gradients are the factors, so there is no sum whose order could differ.
        sum((p * f).sum() for p, f in zip(params, factors, strict=True)).backward()
    assert all(param.grad is None for param in params)
    return params


def test_a_step_in_a_hook_of_the_backward_pass():
    on_gpu = backward_with_steps_inside("cuda")
    for mine, theirs in zip(on_gpu, backward_with_steps_inside("cpu"), strict=True):
        assert torch.equal(mine.detach().cpu(), theirs.detach())


@pytest.mark.parametrize("guard", [{}, {"match_update_rms": 0.2}], ids=["plain", "guarded"])
@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("storage", ["fp32-no_master-fp32", "bf16-fp16_master-fp8"])
def test_the_default_device_does_not_show(storage, device, guard):
    dtype, options = STORAGES[storage]
    reference = build(device, dtype, **options, **guard)
    for step in range(3):
        take_step(*reference, step)
    mine = build(device, dtype, **options, **guard)
    for step in range(3):
        set_grads(mine[0], step)
        with torch.device("cuda"):
            mine[1].step()
    assert_same(mine, reference)


def step_with_grad_scaler(device):
    """Take steps by torch's GradScaler. The third one writes nothing."""
    params, optimizer = build(device, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones((), device=device))  # it has a scale from here on
    for step in range(4):
        set_grads(params, step)
        for param in params:
            param.grad.mul_(1024)
        if step == 2:
            params[4].grad[65_536] = torch.inf
        # From the second step on there is state, and nothing may wait for the GPU.
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" and step else "default")
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
    assert scaler.get_scale() == 512.0
    return params, optimizer


def test_grad_scaler_has_the_bits_of_the_cpu_and_waits_for_nothing():
    on_gpu, on_cpu = step_with_grad_scaler("cuda"), step_with_grad_scaler("cpu")
    for mine, theirs in zip(on_gpu[0], on_cpu[0], strict=True):
        assert torch.equal(mine.detach().cpu(), theirs.detach())
    for mine, theirs in zip(on_gpu[1].param_groups, on_cpu[1].param_groups, strict=True):
        assert int(mine["step"]) == int(theirs["step"]) == 4
