"""The kernel on a GPU has the oracle's bits, also in CUDA graphs, streams and on several devices.

tests/kernels executes the same source on the CPU. Here are the same cases, and those that need a
GPU.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_adams.kernels import PointerTable, cuda, host
from megatron_adams.kernels.batch import Batch
from megatron_adams.kernels.modes import ALL_MODES, Mode
from megatron_adams.kernels.table import CHUNK
from tests.kernels.batteries import SMALL_SIZES
from tests.kernels.checks import (
    FORMS,
    MISALIGNED,
    SCALARS,
    check,
    copy_batch,
    differences,
    expected,
    make_batch,
    scalar_cases,
)
from tests.kernels.test_backends import REPRESENTATIVES

FP32 = Mode("fp32", "fp32", "fp32", "none")
REPRESENTATIVE = pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
TWO_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="not run: fewer than two GPUs on this machine"
)


def run(batch, scalars):
    cuda.run(batch, scalars, PointerTable(), cuda.CudaDriver())


@pytest.mark.parametrize("mode", ALL_MODES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_mode_gives_the_bits_of_the_oracle(mode):
    cases = scalar_cases("cuda")
    for case, offsets, special in (
        ("device_scalars", (0,), False),
        ("l2", MISALIGNED, False),
        ("decoupled", (0,), True),
    ):
        batch = make_batch(mode, device="cuda", offsets=offsets, special=special, seed=1)
        assert not check(run, batch, cases[case], steps=1 if special else 2), case


@pytest.mark.parametrize("case", scalar_cases())
@REPRESENTATIVE
@torch.no_grad()
def test_every_way_of_asking_for_a_step_gives_the_bits_of_the_oracle(mode, case):
    batch = make_batch(mode, device="cuda", seed=3)
    assert not check(run, batch, scalar_cases("cuda")[case])


@pytest.mark.parametrize("form", FORMS)
@REPRESENTATIVE
@torch.no_grad()
def test_every_form_of_the_update_gives_the_bits_of_the_oracle(mode, form):
    batch = make_batch(mode, device="cuda", special=True, seed=6)
    assert not check(run, batch, FORMS[form], steps=1)


@REPRESENTATIVE
@torch.no_grad()
def test_host_and_gpu_give_the_same_bits(mode):
    on_host = make_batch(mode, (1_000_003, *SMALL_SIZES), special=True, seed=5)
    on_gpu = copy_batch(on_host, "cuda")
    host.run(on_host, SCALARS, PointerTable())
    run(on_gpu, SCALARS)
    assert not differences(on_gpu, on_host)


@torch.no_grad()
def test_thousands_of_tensors_in_one_launch():
    batch = make_batch(FP32, [i % 7 for i in range(5000)], device="cuda")
    assert not check(run, batch, SCALARS, steps=1)


@torch.no_grad()
def test_more_than_2_to_the_31_elements():
    mode = Mode("bf16", "bf16", "bf16", "none")
    numel = 2**31 + CHUNK + 7
    free, _ = torch.cuda.mem_get_info()
    if free < 7 * numel:
        pytest.skip(f"not run: {free / 2**30:.0f} GiB free, {7 * numel / 2**30:.0f} needed")
    columns = {
        name: [torch.zeros(numel, dtype=torch.bfloat16, device="cuda")]
        for name in ("params", "grads", "exp_avgs")
    }
    windows = [slice(0, 1000), slice(2**31 - 500, 2**31 + 500), slice(numel - 1000, numel)]
    views = Batch(**{name: [column[0][w] for w in windows] for name, column in columns.items()})
    values = make_batch(mode, [1000] * 3, device="cuda")
    for (_, targets), (_, sources) in zip(views.columns(), values.columns(), strict=True):
        for target, source in zip(targets or (), sources or (), strict=True):
            target.copy_(source)
    want = expected(views, SCALARS)
    run(Batch(**columns), SCALARS)
    assert not differences(views, want)


@REPRESENTATIVE
@torch.no_grad()
def test_a_cuda_graph_replays_with_new_scalars(mode):
    batch = make_batch(mode, (100, 0, CHUNK + 3), device="cuda")
    scalars = scalar_cases("cuda")["device_scalars"]
    table, driver = PointerTable(), cuda.CudaDriver()
    cuda.run(batch, replace(scalars, found_inf=torch.ones(1, device="cuda")), table, driver)
    before = copy_batch(batch, "cpu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.run(batch, scalars, table, driver)
    assert not differences(batch, before), "a capture executes nothing"
    for name, value in (
        ("lr", 3e-3),
        ("lr", 0.5),
        ("grad_scale", 3.0),
        ("found_inf", 1.0),
        ("found_inf", 0.0),
    ):
        getattr(scalars, name).fill_(value)
        want = expected(batch, scalars)
        graph.replay()
        assert not differences(batch, want), (name, value)
    assert table.num_builds == 1


@torch.no_grad()
def test_a_capture_with_moved_tensors_is_refused():
    batch = make_batch(FP32, (100,), device="cuda")
    table, driver = PointerTable(), cuda.CudaDriver()
    cuda.run(batch, SCALARS, table, driver)
    moved = replace(batch, grads=[grad.clone() for grad in batch.grads])
    with (
        pytest.raises(RuntimeError, match="tensors have moved since the last step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cuda.run(moved, SCALARS, table, driver)


@torch.no_grad()
def test_the_current_stream_is_used():
    batch = make_batch(FP32, (CHUNK,), device="cuda")
    run(batch, SCALARS)  # compiled and loaded before the streams are
    grad = batch.grads[0].clone()
    batch.grads[0].zero_()
    want = expected(replace(batch, grads=[grad]), SCALARS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # This waits for a quarter of a second first. A step on another stream would overtake it.
        torch.cuda._sleep(500_000_000)
        batch.grads[0].copy_(grad)
        run(batch, SCALARS)
    stream.synchronize()
    assert not differences(batch, want)


@TWO_GPUS
@torch.no_grad()
def test_the_tensors_device_counts_not_the_current_one():
    for device in ("cuda:1", "cuda:0"):
        batch = make_batch(FP32, device=device)
        assert not check(run, batch, scalar_cases(device)["device_scalars"])


@TWO_GPUS
def test_scalars_reduced_by_nccl_are_what_the_step_reads(tmp_path):
    torch.multiprocessing.spawn(_reduce_and_step, args=(str(tmp_path / "store"),), nprocs=2)


@torch.no_grad()
def _reduce_and_step(rank, store):
    device = f"cuda:{rank}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    batch = make_batch(FP32, (CHUNK + 5,), device=device)
    for infinite_rank in (None, 1):
        scalars = scalar_cases(device)["device_scalars"]
        scalars.grad_scale.fill_(0.25 + rank)
        scalars.found_inf.fill_(float(rank == infinite_rank))
        # Nothing waits for these: the step follows them on the stream.
        dist.all_reduce(scalars.grad_scale)
        dist.all_reduce(scalars.found_inf, op=dist.ReduceOp.MAX)
        on_cpu = copy_batch(batch, "cpu")
        run(batch, scalars)
        want = replace(
            SCALARS,
            lr=scalars.lr.cpu(),
            grad_scale=1.5,
            correction=scalars.correction.item(),
            found_inf=torch.tensor([0.0 if infinite_rank is None else 1.0]),
        )
        assert not differences(batch, expected(on_cpu, want))
    dist.destroy_process_group()
