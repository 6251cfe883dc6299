"""The ways to have AdamS built by megatron.core's API: configurations, adopt(), registration."""

import pytest
import torch

from tests.distributed.module_runs import Rank, run
from tests.harness.cluster import Cluster

PRECISION = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"}
CASES = "tests.distributed.module_cases"


def assert_same(ranks: list[Rank], others: list[Rank]) -> None:
    """The same bits on every rank, and the same classes."""
    for mine, theirs in zip(ranks, others, strict=True):
        assert mine["parts"] == theirs["parts"] == ["AdamSDistributedOptimizer"]
        assert mine["grad_norms"] == theirs["grad_norms"]
        for name, param in mine["params"].items():
            assert torch.equal(param, theirs["params"][name]), name


@pytest.fixture(scope="module")
def by_config(cluster: Cluster) -> list[Rank]:
    ranks = run(cluster, 2, build="config")
    for rank in ranks:
        assert {group["betas"] for group in rank["groups"]} == {(0.9, 0.95)}
    return ranks


@pytest.fixture(scope="module")
def with_precision(cluster: Cluster, by_config: list[Rank]) -> list[Rank]:
    ranks = run(cluster, 2, build="config", fields=PRECISION)
    assert not torch.equal(ranks[0]["params"]["norm"], by_config[0]["params"]["norm"])
    return ranks


@pytest.mark.parametrize(
    "build", ["plain config", "late fields", "provide", "adopt", "adopt a part", "take over"]
)
def test_each_way_of_building_takes_the_same_steps(
    cluster: Cluster, by_config: list[Rank], build: str
) -> None:
    """Also a plain configuration with Adam's beta2 of 0.999."""
    assert_same(run(cluster, 2, build=build), by_config)


@pytest.mark.parametrize("build", ["plain config", "late fields", "provide", "adopt"])
def test_each_way_of_building_takes_the_precision_aware_optimizer(
    cluster: Cluster, with_precision: list[Rank], build: str
) -> None:
    assert_same(run(cluster, 2, build=build, fields=PRECISION), with_precision)


@pytest.mark.parametrize("build", ["provide", "adopt"])
def test_provide_and_adopt_register_themselves(
    plain_cluster: Cluster, by_config: list[Rank], build: str
) -> None:
    assert_same(run(plain_cluster, 2, build=build), by_config)


def test_import_hook_reaches_names_that_were_imported_before(
    plain_cluster: Cluster, with_precision: list[Rank]
) -> None:
    """Where nobody calls register(): neither the launcher nor the script."""
    assert_same(run(plain_cluster, 2, build="autoregister", fields=PRECISION), with_precision)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        ("plain config", "adams: adam_beta2=0.999 is OptimizerConfig's default, made for Adam; "),
        ("take over", "adams TAKES THE PLACE of optimizer='adam', as MEGATRON_ADAMS_REPLACE or "),
    ],
)
def test_what_is_changed_is_said_once(cluster: Cluster, build: str, line: str) -> None:
    outcome = cluster.run(f"{CASES}:train", 2, build=build, num_steps=1)
    assert outcome.log.count(line) == 1


def test_adopt_refuses_what_it_cannot_take_over(cluster: Cluster) -> None:
    sgd, precision, started = cluster.run(f"{CASES}:adopt_refused").results[0]
    assert sgd.startswith("adopt() of a FP32Optimizer with a SGD inside: ")
    assert "must be an Adam" in sgd
    assert "was False when it was built, and is True in the configuration" in precision
    assert "it has state of 1 params, which would be lost" in started
