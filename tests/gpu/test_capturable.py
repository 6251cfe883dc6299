"""AdamS(capturable=True) in real CUDA graphs has the bits of steps without a graph.

tests/unit/test_capturable.py shows the same with a stand-in for CUDA graphs.
"""

import pytest
import torch

from megatron_adams import AdamS
from megatron_adams.kernels import correction_of
from megatron_adams.update import bias_correction_factor
from tests.harness.capturable_runs import (
    MODES,
    assert_same,
    build,
    run_captured,
    run_eager,
    set_grads,
    steps_until_one,
)


@pytest.mark.parametrize("mode", MODES)
def test_replayed_steps_have_the_bits_of_eager_ones(mode):
    options = {"kernel": "cuda", **MODES[mode], "device": "cuda"}
    eager, captured = build(False, **options), build(True, **options)
    run_eager(*eager, range(6))
    run_captured(*captured, range(6))
    assert [group["step"].item() for group in captured[1].param_groups] == [6, 6, 6]
    assert_same(captured, eager)


def test_numbers_lie_on_the_gpu_also_of_a_rank_without_parameters():
    _, optimizer = build(True, device="cuda", kernel="cuda")
    empty = AdamS.from_param_groups([{"params": []}], capturable=True, kernel="cuda")
    for group in (*optimizer.param_groups, *empty.param_groups):
        assert group["lr"].is_cuda and group["step"].is_cuda


def test_step_without_capturable_is_not_captured():
    params, optimizer = build(False, device="cuda", kernel="cuda")
    set_grads(params, 0)
    optimizer.step()
    with (
        pytest.raises(ValueError, match="capturable=False inside a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.parametrize("beta1", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_correction_on_the_device_has_the_bits_of_the_hosts(beta1):
    steps = steps_until_one(beta1)
    on_host = torch.tensor([bias_correction_factor(beta1, step) for step in steps])
    on_device = [correction_of(True, beta1, torch.tensor(step, device="cuda")) for step in steps]
    assert torch.equal(torch.stack(on_device).float().cpu(), on_host)


def train_in_a_graph(captures):
    """Return the losses of five training steps after three of warm-up, as in torch's recipe."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
    model = torch.nn.Sequential(*layers).cuda()
    options = {"kernel": "cuda", "capturable": captures, "bias_correction": True}
    optimizer = AdamS(model.parameters(), lr=1e-3, **options)
    batch = torch.randn(32, 64, device="cuda")

    def train_step():
        # Gradients stay where they are.
        optimizer.zero_grad(set_to_none=False)
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_step()
    torch.cuda.current_stream().wait_stream(stream)
    if not captures:
        return [train_step().item() for _ in range(5)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step()
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(loss.item())
    return losses


def test_whole_training_step_in_a_graph_equals_the_one_without():
    captured = train_in_a_graph(captures=True)
    torch.testing.assert_close(captured, train_in_a_graph(captures=False), rtol=1e-5, atol=0)
    assert len(set(captured)) == 5
