"""`register()` on the real Megatron-Core of this environment."""

from pathlib import Path

import pytest

from tests.harness.cluster import Cluster

CASES = "tests.distributed.register_cases"


def test_register_wraps_once_in_every_module_and_says_so_in_one_line(
    plain_cluster: Cluster,
) -> None:
    told = plain_cluster.run(f"{CASES}:register_twice").results[0]
    first, second = told["wrapped"]
    # The home of the function, and a module that had imported it by name before.
    assert "megatron.core.optimizer.get_megatron_optimizer" in first
    assert "megatron.training.training.get_megatron_optimizer" in first
    assert "megatron.training.arguments.validate_args" in first
    assert second == first
    assert told["depth"] == 1
    (line,) = told["log"]
    assert line.startswith("registered --optimizer adams with megatron.core and megatron.training")
    assert "megatron.core.optimizer.get_megatron_optimizer" in line


@pytest.mark.parametrize(
    "path",
    [
        "megatron.training.theoretical_memory_usage.compute_weight_and_optimizer_memory",  # wrapped
        "megatron.core.optimizer.optimizer.param_group_identifier_keys",  # read
    ],
)
def test_megatron_without_a_symbol_is_refused_and_left_as_it_is(
    plain_cluster: Cluster, path: str
) -> None:
    told = plain_cluster.run(f"{CASES}:register_without", dotted_path=path).results[0]
    kind, message = told["error"]
    assert kind == "UnsupportedMegatronError"
    assert message.startswith(f"{path}: not found in megatron-core ")
    assert "megatron-adams supports megatron-core >=" in message
    assert told["wrapped"] == []


def test_configuration_of_a_mimo_model_passes_untouched(cluster: Cluster) -> None:
    assert cluster.run(f"{CASES}:mimo_config_passes").results[0]


def test_dataset_helpers_of_the_wheel_are_used_without_make(
    cluster: Cluster, tmp_path: Path
) -> None:
    told = cluster.run(
        f"{CASES}:compile_helpers_with_and_without_makefile", folder=str(tmp_path)
    ).results[0]
    if not told["is_wheel"]:
        pytest.skip("this Megatron is a source tree, with a Makefile")
    assert told["wheel"] == {"made": [], "loaded": True}
    assert told["source"] == ["make"]
