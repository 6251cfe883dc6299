"""With the plugin registered, Megatron is as without it for whoever does not ask for adams."""

from pathlib import Path

import pytest

from tests.distributed import hook_cases
from tests.harness.cluster import Cluster

CASES = "tests.distributed.hook_cases"
CHECKPOINT = f"{CASES}:checkpoint_without_arguments"


@pytest.mark.parametrize("world", hook_cases.WORLDS)
def test_every_hook_passes_on_untouched_what_is_not_adams(cluster: Cluster, world: str) -> None:
    told = cluster.run(f"{CASES}:sweep", world=world).results[0]
    assert set(told["hooks"]) > hook_cases.EXEMPT
    assert told["problems"] == []


@pytest.mark.parametrize("flags", ["--use-distributed-optimizer --bf16", ""])
def test_adam_saves_and_loads_for_a_caller_with_arguments_of_its_own(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path, flags: str
) -> None:
    argv = f"--optimizer adam {flags} --train-iters 1"
    mine = cluster.run(CHECKPOINT, argv=argv, folder=str(tmp_path / "mine")).results[0]
    theirs = plain_cluster.run(CHECKPOINT, argv=argv, folder=str(tmp_path / "theirs")).results[0]
    assert mine == theirs
    assert mine["load"] == mine["load by position"] == (1, 0)


@pytest.mark.parametrize("flags", ["--use-distributed-optimizer --bf16", ""])
def test_adams_saves_and_loads_for_a_caller_with_arguments_of_its_own(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path, flags: str
) -> None:
    argv = f"--use-cpu-initialization {flags} --train-iters 1"
    mine, theirs = (
        where.run(
            CHECKPOINT, argv=f"{argv} --optimizer {optimizer}", folder=str(tmp_path / optimizer)
        ).results[0]
        for where, optimizer in ((cluster, "adams"), (plain_cluster, "adam"))
    )
    # What a run without --save ends in is Megatron's to say.
    assert mine == theirs


def test_registration_reaches_what_was_imported_before_or_says_why_not(
    plain_cluster: Cluster,
) -> None:
    told = plain_cluster.run(f"{CASES}:import_before_register").results[0]
    assert told["is_wrapped"] and told["is_reached"]
    assert "before megatron_adams.register() was called" in told["error"]
    assert "emerging" not in told["error"]


def test_checkpoint_of_a_mimo_model_is_checked_as_adams_and_not_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    told = cluster.run(
        f"{CASES}:checkpoint_of_a_mimo_model",
        argv="--optimizer adams --use-distributed-optimizer --bf16 --train-iters 2 "
        "--save-interval 1",
        folder=str(tmp_path),
    ).results[0]
    assert told["is_passed_on"] and told["is_withdrawn"]
    assert "the checkpoint is incomplete" in told["error"]


def test_update_rms_is_logged_where_the_arguments_have_none_of_adams(cluster: Cluster) -> None:
    flags = "--use-distributed-optimizer --bf16 --train-iters 1 --adams-max-update-rms 0.1"
    lines = cluster.run(
        f"{CASES}:log_without_arguments_of_adams", argv=f"--optimizer adams {flags}"
    ).results[0]
    assert len(lines) == 1 and "capped at 0.1: " in lines[0]
