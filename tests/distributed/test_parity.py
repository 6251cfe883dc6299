"""Every parallel layout takes the same steps as one process, and that one the paper's steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.argv import MOE
from tests.harness.cluster import Cluster
from tests.harness.compare import assert_close, assert_same
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"

NUM_STEPS = 10
START = 2
"""The iteration that every layout starts from: pipeline stages draw their weights differently."""
ITERATIONS = f"--train-iters {START + NUM_STEPS}"

COMMON = (
    "--optimizer adams --num-layers 4 --disable-bias-linear --dist-ckpt-optim-fully-reshardable "
    # A parameter with gradients of rounding noise alone would be moved by it, not by the data.
    "--adam-eps 1e-6 "
)

LAYOUTS = {
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2_dp2": (4, "--tensor-model-parallel-size 2"),
    "tp2_pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "vpp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
}
MOE_LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "pp2_ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}


@dataclass
class Reference:
    """A single process's run, and where it started."""

    start: Path
    tensors: dict[str, torch.Tensor]
    losses: list[float]
    rank: dict[str, Any]


def _reference(cluster: Cluster, folder: Path, extra: str = "") -> Reference:
    start, end = folder / "start", folder / "end"
    base = f"{COMMON} {extra} --use-distributed-optimizer"
    cluster.run(TRAIN, 1, argv=f"{base} {ITERATIONS} --exit-interval {START} --save {start}")
    run = cluster.run(TRAIN, 1, argv=_resumed(base, start, end), record_grads=True)
    rank = run.results[0]
    tensors = cluster.run(LOAD, 1, checkpoint=_iteration(end)).results[0]
    return Reference(start=start, tensors=tensors, losses=rank["losses"], rank=rank)


def _resumed(base: str, start: Path, end: Path) -> str:
    return f"{base} {ITERATIONS} --load {start} --save {end}"


def _iteration(folder: Path) -> str:
    return str(folder / f"iter_{START + NUM_STEPS:07d}")


@pytest.fixture(scope="module")
def dense(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return _reference(cluster, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return _reference(cluster, tmp_path_factory.mktemp("experts"), MOE)


def assert_state_is_exp_avg_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for part in rank["parts"]:
            for shard in part["shards"]:
                assert set(shard["state"]) == {"exp_avg"}
                assert shard["state"]["exp_avg"].numel() == shard["param"].numel()
                assert shard["state"]["exp_avg"].dtype == torch.float32
            assert part["classes"] == ("AdamSDistributedOptimizer", "AdamS")
            assert part["config"] == "adams"


def num_elements(ranks: list[dict[str, Any]]) -> int:
    parts = [part for rank in ranks for part in rank["parts"]]
    return sum(shard["param"].numel() for part in parts for shard in part["shards"])


@pytest.mark.parametrize("layout", thinned(LAYOUTS, full=("tp2", "pp2")))
def test_layout_matches_single_process(
    cluster: Cluster, dense: Reference, tmp_path: Path, layout: str
) -> None:
    num_ranks, flags = LAYOUTS[layout]
    base = f"{COMMON} {flags} --use-distributed-optimizer"
    run = cluster.run(TRAIN, num_ranks, argv=_resumed(base, dense.start, tmp_path))
    losses = run.results[-1]["losses"]
    np.testing.assert_allclose(losses, dense.losses, rtol=1e-5)
    saved = cluster.run(LOAD, 1, checkpoint=_iteration(tmp_path)).results[0]
    assert_close(saved, dense.tensors)
    assert "exceeds" not in run.log  # upstream's warning that it saves other tensors
    assert_state_is_exp_avg_alone(run.results)
    # Each model parallel rank's parameters are sharded over its dp ranks, once.
    num_copies = {"dp2": 2, "tp2_dp2": 2}.get(layout, 1)
    num_model_params = sum(p.numel() for rank in run.results for p in rank["model"].values())
    assert num_elements(run.results) * num_copies == num_model_params
    exp_avgs = [t for key, t in saved.items() if key.startswith("optimizer.state.exp_avg.")]
    assert sum(t.numel() for t in exp_avgs) == num_elements([dense.rank])


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_expert_layout_matches_single_process(
    cluster: Cluster, experts: Reference, tmp_path: Path, layout: str
) -> None:
    num_ranks, flags = MOE_LAYOUTS[layout]
    # A step draws nothing, and 0.16 loads no generators at another expert parallel size.
    base = f"{COMMON} {MOE} {flags} --use-distributed-optimizer --no-load-rng"
    run = cluster.run(TRAIN, num_ranks, argv=_resumed(base, experts.start, tmp_path))
    np.testing.assert_allclose(run.results[-1]["losses"], experts.losses, rtol=1e-5)
    saved = cluster.run(LOAD, 1, checkpoint=_iteration(tmp_path)).results[0]
    assert_close(saved, experts.tensors)
    assert_state_is_exp_avg_alone(run.results)
    exp_avgs = [t for key, t in saved.items() if key.startswith("optimizer.state.exp_avg.")]
    assert sum(t.numel() for t in exp_avgs) == num_elements([experts.rank])


def test_single_process_takes_the_papers_steps_in_float64(dense: Reference) -> None:
    """From the recorded gradients, with the formula written out in NumPy."""
    start, end, steps = (dense.rank["recorded"][key] for key in ("start", "end", "steps"))
    assert len(steps) == NUM_STEPS
    for index, (param, exp_avg) in enumerate(start):
        p, m = param.double().numpy(), exp_avg.double().numpy()
        for step in steps:
            group, grad = step[index]
            g = grad.double().numpy()
            beta1, beta2 = group["betas"]
            v = beta2 * m**2 + (1 - beta2) * g**2
            m = beta1 * m + (1 - beta1) * g
            decay = group["weight_decay"] * p
            p = p - group["lr"] * (m / (np.sqrt(v) + group["eps"]) + decay)
        np.testing.assert_allclose(end[index][0].numpy(), p, rtol=2e-6, atol=2e-7)
        np.testing.assert_allclose(end[index][1].numpy(), m, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["", "--bf16", "--fp16 --initial-loss-scale 1024"])
def test_distributed_optimizer_equals_plain_one(cluster: Cluster, dtype: str) -> None:
    # Without clipping: the norm is summed in another order over shards.
    base = f"--optimizer adams {dtype} --train-iters 5 --clip-grad 0"
    plain = cluster.run(TRAIN, 2, argv=base)
    sharded = cluster.run(TRAIN, 2, argv=f"{base} --use-distributed-optimizer")
    assert_same(sharded, plain, "losses", "model")
    assert {len(r["losses"]) for r in plain.results} == {5}
    assert num_elements(sharded.results) * 2 == num_elements(plain.results)
