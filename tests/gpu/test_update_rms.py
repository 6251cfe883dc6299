"""Counted and scaled updates on a GPU have the oracle's bits, without waits, also in graphs."""

import pytest
import torch

from megatron_adams.kernels import PointerTable, cuda
from megatron_adams.optimizer import AdamS
from tests.kernels.checks import (
    SCALARS,
    differences,
    expected,
    make_batch,
    scalar_cases,
    with_guards,
)
from tests.kernels.test_backends import REPRESENTATIVES

SIZES = ((300, 70), (17,), (1,), (50_000,))


@pytest.mark.parametrize("case", scalar_cases())
@pytest.mark.parametrize(
    ("guards", "only_count"),
    [
        ({"sums": True}, True),
        ({"sums": True}, False),
        ({"factors": True}, False),
        ({"sums": True, "factors": True}, False),
    ],
)
@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_every_way_of_asking_gives_the_bits_of_the_oracle(mode, guards, only_count, case):
    scalars = scalar_cases("cuda")[case]
    for special in (False, True):
        batch = with_guards(make_batch(mode, device="cuda", special=special, seed=3), **guards)
        want = expected(batch, scalars, only_count=only_count)
        cuda.run(batch, scalars, PointerTable(), cuda.CudaDriver(), only_count=only_count)
        assert not differences(batch, want)


@torch.no_grad()
def test_a_table_of_many_tensors_is_counted_by_atomic_additions():
    batch = make_batch(REPRESENTATIVES[0], (2**22, 5, 2**20 + 3), device="cuda")
    batch = with_guards(batch, sums=True)
    want = expected(batch, SCALARS, only_count=True)
    cuda.run(batch, SCALARS, PointerTable(), cuda.CudaDriver(), only_count=True)
    assert not differences(batch, want)


def built(device, **guard):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(device) for size in SIZES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device)
    kernel = {"cpu": "host", "cuda": "cuda"}[device]
    return params, AdamS(params, lr=0.01, weight_decay=0.1, kernel=kernel, **guard)


@pytest.mark.parametrize("guard", [{"match_update_rms": 0.2}, {"max_update_rms": 0.3}])
def test_factors_have_the_bits_of_the_cpu(guard):
    results = []
    for device in ("cpu", "cuda"):
        params, optimizer = built(device, **guard)
        for _ in range(3):
            optimizer.step()
        results.append([x.cpu() for x in (*params, optimizer.update_rms())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_guarded_step_waits_for_nothing():
    _, optimizer = built("cuda", match_update_rms=0.2)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_guarded_step_in_a_cuda_graph_measures_anew_at_each_replay():
    params, optimizer = built("cuda", match_update_rms=0.2, capturable=True)
    others, plain = built("cuda", match_update_rms=0.2)
    optimizer.step()
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for scale in (1.0, 100.0, 1e-3):
        for mine, theirs in zip(params, others, strict=True):
            theirs.grad.mul_(scale).add_(0.1)
            mine.grad.copy_(theirs.grad)
        graph.replay()
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
