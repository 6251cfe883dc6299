"""The optimizer under megatron.core's API alone, with a small MegatronModule of our own."""

from pathlib import Path

import pytest
import torch

from tests.distributed.module_runs import Rank, assert_loaded, assert_matches, run
from tests.harness.cluster import Cluster


@pytest.fixture(scope="module")
def single(cluster: Cluster) -> Rank:
    return run(cluster, 1, distributed=False)[0]


@pytest.fixture(scope="module")
def single_with_experts(cluster: Cluster) -> Rank:
    return run(cluster, 1, distributed=False, experts=True)[0]


def assert_trained(single: Rank) -> None:
    assert len(single["grad_norms"]) == 20
    assert min(single["grad_norms"]) > 0.5  # the clip limit: clipping is part of what is compared


@pytest.mark.parametrize("build", ["config", "plain config"])
def test_context_parallel_matches_single_process(
    cluster: Cluster, single: Rank, build: str
) -> None:
    ranks = run(cluster, 2, cp_size=2, build=build)
    assert_trained(single)
    assert_matches(ranks, single)
    # The state is sharded over the context parallel ranks: they hold the model once.
    assert sum(rank["state"] for rank in ranks) == single["num_params"]
    assert all(rank["state"] > 0 for rank in ranks)


def test_context_and_data_parallel_match_single_process(cluster: Cluster, single: Rank) -> None:
    ranks = run(cluster, 4, cp_size=2)
    assert_matches(ranks, single)
    assert sum(rank["state"] for rank in ranks) == single["num_params"]


def test_sequence_parallel_matches_single_process(cluster: Cluster, single: Rank) -> None:
    ranks = run(cluster, 2, tp_size=2, sequence_parallel=True)
    assert_matches(ranks, single, sharded_over_tp=True)
    num_replicated = single["params"]["norm"].numel()
    assert sum(rank["state"] for rank in ranks) == single["num_params"] + num_replicated


def test_sequence_and_data_parallel_match_single_process(cluster: Cluster, single: Rank) -> None:
    ranks = run(cluster, 4, tp_size=2, sequence_parallel=True)
    for tp_group in (ranks[:2], ranks[2:]):
        assert_matches(tp_group, single, sharded_over_tp=True)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_experts_match_single_process(
    cluster: Cluster, single_with_experts: Rank, ep_size: int
) -> None:
    ranks = run(cluster, 2, ep_size=ep_size, experts=True)
    assert_trained(single_with_experts)
    assert_matches(ranks, single_with_experts)
    for index in range(2):
        expected = single_with_experts["params"][f"experts.{index}"]
        for rank in ranks if ep_size == 1 else [ranks[index]]:
            actual = rank["params"]["experts.0" if ep_size == 2 else f"experts.{index}"]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # With expert parallelism, the experts have an optimizer of their own.
    assert [len(rank["parts"]) for rank in ranks] == [ep_size] * 2
    assert sum(rank["state"] for rank in ranks) == single_with_experts["num_params"]


def test_several_buckets_match_single_process(cluster: Cluster, single: Rank) -> None:
    ranks = run(cluster, 2, bucket_size=30)
    assert all(rank["num_buckets"] == 3 for rank in ranks)
    assert_matches(ranks, single)
    assert sum(rank["state"] for rank in ranks) == single["num_params"]


def test_frozen_parameters_stay_and_have_no_state(cluster: Cluster) -> None:
    single = run(cluster, 1, distributed=False, frozen=["weight"])[0]
    ranks = run(cluster, 2, frozen=["weight"])
    assert_matches(ranks, single)
    for rank in (single, *ranks):
        assert torch.equal(rank["params"]["weight"], rank["start"]["weight"])
        assert not torch.equal(rank["params"]["norm"], rank["start"]["norm"])
    assert sum(rank["state"] for rank in ranks) == single["num_params"] == 24 + 40


@pytest.mark.parametrize("distributed", [False, True])
def test_pipeline_stage_without_trainable_parameters(
    cluster: Cluster, tmp_path: Path, single: Rank, distributed: bool
) -> None:
    save = str(tmp_path / "saved") if distributed else None
    trained, idle = run(
        cluster, 2, pp_size=2, frozen_stages=[1], distributed=distributed, save=save
    )
    assert_matches([trained], single)
    assert idle["state"] == idle["num_params"] == 0
    if save:
        assert_loaded([trained, idle])


def test_model_without_trainable_parameters(cluster: Cluster, tmp_path: Path) -> None:
    ranks = run(cluster, 2, frozen_stages=[0], num_steps=2, save=str(tmp_path / "saved"))
    for rank in ranks:
        assert rank["is_stub"]
        assert rank["state"] == 0


def test_dp_ranks_that_own_no_parameter_step_save_and_load(
    cluster: Cluster, tmp_path: Path
) -> None:
    sizes = (4, 8)  # three parameters at multiples of 64 in a bucket of 256
    single = run(cluster, 1, distributed=False, sizes=sizes)[0]
    ranks = run(cluster, 4, sizes=sizes, save=str(tmp_path / "saved"))
    assert [rank["state"] for rank in ranks] == [8, 32, 4, 0]
    assert_matches(ranks, single)
    assert_loaded(ranks)


def test_config_overrides_reach_their_groups(cluster: Cluster) -> None:
    overrides = {
        "*norm": {"max_lr": 3e-2, "min_lr": 1e-3, "wd_mult": 0.0},
        "*bias": {"max_lr": 0.0},
    }
    single = run(cluster, 1, distributed=False, overrides=overrides)[0]
    ranks = run(cluster, 2, overrides=overrides)
    assert_matches(ranks, single)
    for rank in (single, *ranks):
        lrs = {(g["lr"], g["min_lr"], g["weight_decay"]) for g in rank["groups"]}
        assert lrs == {(1e-2, 0.0, 0.1), (3e-2, 1e-3, 0.0), (0.0, 0.0, 0.1)}
    assert torch.equal(single["params"]["bias"], single["start"]["bias"])
    assert not torch.equal(single["params"]["norm"], single["start"]["norm"])
