"""AdamS in Lightning's Trainer and in torchtitan's container of optimizers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.frameworks.fsdp2_cases import NUM_STEPS, OPTIONS
from tests.harness.cluster import Cluster

CASES = "tests.frameworks.trainer_cases"


def test_lightning_has_the_bits_of_a_plain_loop_and_resumes(
    cluster_with: Callable[[str], Cluster], tmp_path: Path
) -> None:
    cluster = cluster_with("lightning")
    (found,) = cluster.run(f"{CASES}:lightning", folder=str(tmp_path)).results
    assert found == {"whole": [], "resumed": [], "step": NUM_STEPS}


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_torchtitan_builds_it_by_name(
    cluster_with: Callable[[str], Cluster], implementation: str
) -> None:
    cluster = cluster_with("torchtitan")
    outcome = cluster.run(f"{CASES}:torchtitan", implementation=implementation)
    (found,) = outcome.results
    assert found["classes"] == ["AdamS"]
    assert found["different"] == [] and found["reloaded"] == []
    for group in found["groups"]:
        assert {key: group[key] for key in OPTIONS} == OPTIONS
        assert group["step"] == NUM_STEPS
        assert group["fused"] == (implementation == "fused")
