"""What is bridged of the installed version of Megatron, and that its oldest one trains.

`make test-versions` runs this, and the modules named in the Makefile, on each version.
"""

import re
from pathlib import Path

import pytest
import torch

from tests.distributed.test_checkpoint import PADDED, PLACE, assemble
from tests.harness.argv import NUM_STEPS, RESHARDABLE, SAVED_AT, STEPS, choose, folder_of
from tests.harness.cluster import REPO, Cluster
from tests.harness.compare import assert_continues

CASES = "tests.distributed.version_cases"
TRAIN = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"
# Of these, a wheel has no megatron.training: `make test-versions` takes a checkout.
WITHOUT_TRAINING = ["0.16"]


def documented_differences() -> dict[str, set[str]]:
    """The table of docs/versions.md: version -> the differences with a mark."""
    page = (REPO / "docs" / "versions.md").read_text()
    section = page.partition("## What is bridged")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|(.+)\|$", section, re.MULTILINE)
    header, _, *body = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {
        version: {name.strip("`") for name, *cells in body if cells[column] == "bridged"}
        for column, version in enumerate(header[1:-1])
    }


def test_differences_are_those_that_the_documentation_lists(cluster: Cluster) -> None:
    told = cluster.run(f"{CASES}:differences").results[0]
    release = ".".join(told["version"].split(".")[:2])
    assert set(told["differences"]) == documented_differences()[release]


def test_no_method_of_megatrons_is_overridden_by_chance(cluster: Cluster) -> None:
    assert cluster.run(f"{CASES}:overridden_without_being_relied_on").results[0] == []


def test_a_save_with_another_versions_padding_is_shifted(cluster: Cluster, tmp_path: Path) -> None:
    """What users would load in silence, if the adapter were chosen by a number."""
    num_ranks, flags = PADDED["hidden64_pp2"]
    argv = f"{RESHARDABLE} {flags} --train-iters {SAVED_AT} --save {tmp_path}"
    case = f"{CASES}:save_with_the_padding_of_another_version"
    run = cluster.run(case, num_ranks, argv=argv, check=False)
    if any(run.codes):
        assert "bucket-padding adjustment is wrong" in run.log
        return
    saved = cluster.run(LOAD, checkpoint=folder_of(tmp_path, SAVED_AT)).results[0]
    live = assemble([shard for rank in run.results for shard in rank])
    assert [key for key, tensor in live.items() if not torch.equal(saved[key], tensor)]


@pytest.mark.parametrize("change", ["other elements", "another layout"])
def test_save_that_cannot_be_told_is_refused(cluster: Cluster, change: str) -> None:
    said = cluster.run(f"{CASES}:padding_of", change=change).results[0]
    assert said.startswith("UnsupportedMegatronError: ")
    assert "cannot tell whether it counts the padding of buckets" in said


def test_method_that_names_no_tensors_of_adam_is_refused(cluster: Cluster) -> None:
    said = cluster.run(f"{CASES}:state_keys_without_a_constant").results[0]
    assert said.startswith("UnsupportedMegatronError: ") and "cannot leave exp_avg_sq out" in said


def test_captured_step_is_refused_where_megatron_has_none(cluster: Cluster) -> None:
    said = cluster.run(f"{CASES}:captured_step_of_a_megatron_without").results[0]
    assert said.startswith("optimizer_cuda_graph=True: this Megatron captures no")
    assert "install megatron-core 0.17 or newer" in said


@pytest.mark.parametrize("kind", ["--use-distributed-optimizer", "", "--bf16"])
def test_groups_that_differ_in_learning_rates_alone_keep_theirs(
    cluster: Cluster, checkpoints: Path, kind: str
) -> None:
    rates = "--decoupled-lr 5e-3 --decoupled-min-lr 1e-3 --untie-embeddings-and-output-weights"
    base = f"--optimizer adams {kind} {rates} {STEPS}"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --save {checkpoints}").results
    resumed = cluster.run(TRAIN, 2, argv=f"{base} {choose(checkpoints, SAVED_AT)}")
    assert_continues(resumed.results, whole)
    for rank in resumed.results:
        groups = [group for part in rank["parts"] for group in part["groups"]]
        assert {group["max_lr"] for group in groups} == {1e-3, 5e-3}


def test_oldest_version_trains_saves_resumes_and_moves(
    oldest_cluster: Cluster, tmp_path: Path
) -> None:
    """The newest one is that of all other tests."""
    num_ranks, flags = PADDED["hidden64_pp2"]
    base = f"{RESHARDABLE} --disable-bias-linear --adam-eps 1e-6 {STEPS}"
    whole = oldest_cluster.run(TRAIN, num_ranks, argv=f"{base} {flags} --save {tmp_path}")
    resumed = oldest_cluster.run(
        TRAIN, num_ranks, argv=f"{base} {flags} {choose(tmp_path, SAVED_AT)}"
    )
    assert_continues(resumed.results, whole.results)
    moved = oldest_cluster.run(TRAIN, 2, argv=f"{base} --hidden-size 64 --load {tmp_path}")
    losses = moved.results[-1]["losses"]
    assert len(losses) == NUM_STEPS - SAVED_AT
    for loss, expected in zip(losses, whole.results[-1]["losses"][SAVED_AT:], strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_oldest_version_saves_what_lies_behind_padded_buckets(
    oldest_cluster: Cluster, tmp_path: Path
) -> None:
    num_ranks, flags = PADDED["hidden64_pp2"]
    argv = f"{RESHARDABLE} {flags} --train-iters {SAVED_AT} --save {tmp_path}"
    ranks = oldest_cluster.run(PLACE, num_ranks, argv=argv)
    saved = oldest_cluster.run(LOAD, checkpoint=folder_of(tmp_path, SAVED_AT)).results[0]
    live = assemble([shard for rank in ranks.results for shard in rank])
    assert {key for key in saved if key.startswith("optimizer.state.")} == set(live)
    assert all(torch.equal(saved[key], tensor) for key, tensor in live.items())


def test_oldest_version_refuses_megatron_fsdp(oldest_cluster: Cluster) -> None:
    assert_megatron_fsdp_refused(oldest_cluster)


def test_megatron_fsdp_of_an_older_version_is_refused(cluster: Cluster) -> None:
    if cluster.run(f"{CASES}:is_megatron_fsdp_stepped").results[0]:
        pytest.skip("adams takes the Megatron-FSDP of this Megatron")
    assert_megatron_fsdp_refused(cluster)


def assert_megatron_fsdp_refused(cluster: Cluster) -> None:
    argv = "--optimizer adams --use-megatron-fsdp --ckpt-format fsdp_dtensor --train-iters 1"
    run = cluster.run(TRAIN, 2, argv=argv, check=False)
    words = "--use-megatron-fsdp with --optimizer adams: this version of Megatron-FSDP keeps"
    assert run.codes == [1, 1]
    assert all(f"ValueError: {words}" in log for log in run.logs)


def test_oldest_version_is_the_oldest_supported_one_with_a_whole_wheel(
    oldest_cluster: Cluster,
) -> None:
    version = oldest_cluster.run(f"{CASES}:differences").results[0]["version"]
    hooks = (REPO / "megatron_adams" / "megatron" / "hooks.py").read_text()
    [oldest] = re.findall(r'^SUPPORTED_MEGATRON = ">=0\.(\d+),<[0-9.]+"$', hooks, re.MULTILINE)
    older = range(int(oldest), int(version.split(".")[1]))
    assert [f"0.{minor}" for minor in older] == WITHOUT_TRAINING
