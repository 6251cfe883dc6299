"""Save and resume: the same run goes on, in every format, layout and environment."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.argv import (
    ADAMS,
    DISTRIBUTED,
    FAMILIES,
    MOE,
    NUM_STEPS,
    RESHARDABLE,
    SAVED_AT,
    STEPS,
    choose,
    folder_of,
)
from tests.harness.cluster import Cluster
from tests.harness.compare import assert_close, assert_continues
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"
PLACE = "tests.distributed.checkpoint_cases:train_and_place"
COMMON = "tests.distributed.checkpoint_cases:read_common"
STEPS_DIFFER = "tests.distributed.checkpoint_cases:train_with_steps"
SAVE_FIRST = "tests.distributed.checkpoint_cases:save_before_first_step"


@pytest.mark.parametrize(
    "family", thinned(FAMILIES, full=("dp2", "dp2_legacy", "pp2_fully_reshardable"))
)
def test_resumed_run_equals_uninterrupted_one(
    cluster: Cluster, checkpoints: Path, family: str
) -> None:
    base = f"{FAMILIES[family]} {STEPS}"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --save {checkpoints}").results
    resumed = cluster.run(TRAIN, 2, argv=f"{base} {choose(checkpoints, SAVED_AT)}")
    assert_continues(resumed.results, whole)
    if family == "dp2_fp16":
        assert {0, 1} == set(whole[0]["skipped"][:SAVED_AT])


@pytest.mark.parametrize("family", ["dp2", "dp2_legacy", "plain"])
def test_checkpoint_crosses_between_worlds_with_and_without_apex(
    cluster: Cluster, apex_cluster: Cluster, tmp_path: Path, family: str
) -> None:
    """Megatron keeps Adam's step elsewhere where it finds TransformerEngine or Apex."""
    base = f"{FAMILIES[family]} {STEPS}"
    without, within = tmp_path / "without", tmp_path / "with"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --save {without}").results
    assert_continues(apex_cluster.run(TRAIN, 2, argv=f"{base} --save {within}").results, whole, 0)
    for there, saved in ((apex_cluster, without), (cluster, within)):
        run = there.run(TRAIN, 2, argv=f"{base} {choose(saved, SAVED_AT)}")
        assert_continues(run.results, whole)


RESHARDINGS = {
    "tp2_pp2_to_dp2": (
        "--num-layers 4 --hidden-size 128",
        (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (2, ""),
    ),
    "dp2_to_tp2": ("--num-layers 4", (2, ""), (2, "--tensor-model-parallel-size 2")),
    "pp2_to_single": ("--num-layers 4", (2, "--pipeline-model-parallel-size 2"), (1, "")),
    # A step draws nothing, and 0.16 loads no generators at another expert parallel size.
    "ep2_to_ep1": (MOE, (2, "--expert-model-parallel-size 2"), (2, "--no-load-rng")),
    "ep1_to_ep2": (MOE, (2, ""), (2, "--expert-model-parallel-size 2 --no-load-rng")),
    "ep2_to_pp2": (
        MOE,
        (2, "--expert-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
    ),
}


@pytest.mark.parametrize("resharding", thinned(RESHARDINGS, full=("pp2_to_single", "ep2_to_ep1")))
def test_resharded_run_continues(cluster: Cluster, tmp_path: Path, resharding: str) -> None:
    """To rounding of sums in another order, as between layouts in test_parity.py."""
    model, (num_before, before), (num_after, after) = RESHARDINGS[resharding]
    base = f"{RESHARDABLE} --disable-bias-linear --adam-eps 1e-6 {model} {STEPS}"
    source, end = tmp_path / "source", tmp_path / "end"
    whole = cluster.run(TRAIN, num_before, argv=f"{base} {before} --save {source}")
    resumed = cluster.run(
        TRAIN,
        num_after,
        argv=f"{base} {after} {choose(source, SAVED_AT)} --save {end}",
    )
    losses = resumed.results[-1]["losses"]
    assert len(losses) == NUM_STEPS - SAVED_AT
    np.testing.assert_allclose(losses, whole.results[-1]["losses"][SAVED_AT:], rtol=1e-5)
    expected, actual = (
        cluster.run(LOAD, checkpoint=folder_of(root, NUM_STEPS)).results[0]
        for root in (source, end)
    )
    assert_close(actual, expected)
    for rank in resumed.results:
        assert [g["step"] for part in rank["parts"] for g in part["groups"]] == [
            NUM_STEPS for part in rank["parts"] for _ in part["groups"]
        ]


@pytest.mark.parametrize("dtype", thinned(["", "--bf16"], full=("",)))
def test_resharding_loses_no_bit(cluster: Cluster, tmp_path: Path, dtype: str) -> None:
    """Loaded at another layout and saved at once, every tensor is what it was."""
    base = f"{RESHARDABLE} {MOE} --disable-bias-linear {dtype} --train-iters {SAVED_AT}"
    layouts = [
        "--expert-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--tensor-model-parallel-size 2",
    ]
    source = tmp_path / "0"
    cluster.run(TRAIN, 2, argv=f"{base} {layouts[0]} --save {source}")
    for index, layout in enumerate(layouts[1:], 1):
        end = tmp_path / str(index)
        # With no step left to take, Megatron loads, and saves at the end.
        cluster.run(TRAIN, 2, argv=f"{base} {layout} --load {source} --save {end}")
        before, after = (
            cluster.run(LOAD, checkpoint=folder_of(root, SAVED_AT)).results[0]
            for root in (source, end)
        )
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), key
        source = end


def test_dp_reshardable_at_another_expert_size_is_refused(
    cluster: Cluster, checkpoints: Path
) -> None:
    base = f"{DISTRIBUTED} {MOE} --disable-bias-linear {STEPS}"
    ep2 = "--expert-model-parallel-size 2"
    cluster.run(TRAIN, 2, argv=f"{base} {ep2} --exit-interval {SAVED_AT} --save {checkpoints}")
    run = cluster.run(TRAIN, 2, argv=f"{base} --load {checkpoints}", check=False)
    assert all(run.codes)
    for log in run.logs:
        assert "--expert-model-parallel-size 1: the checkpoint" in log
        assert "--dist-ckpt-optim-fully-reshardable" in log


# Sizes at which a buffer has two buckets and the first is padded at its end.
PADDED = {
    "hidden64_pp2": (2, "--hidden-size 64 --pipeline-model-parallel-size 2"),
    "hidden128_tp2_pp2": (
        4,
        "--hidden-size 128 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
}
UPSTREAMS_WARNING = "param range exceeds"
DIFFERENCES = "tests.distributed.version_cases:differences"


@pytest.mark.parametrize("size", PADDED)
def test_saved_tensors_are_the_live_ones_behind_padded_buckets(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path, size: str
) -> None:
    num_ranks, flags = PADDED[size]
    base = f"{flags} --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
    base += f"--train-iters {SAVED_AT}"
    stock = plain_cluster.run(
        TRAIN, num_ranks, argv=f"{base} --optimizer adam --save {tmp_path / 'stock'}"
    )
    # A Megatron that takes the padding out has no warning: test_versions.py looks at the sizes.
    bridged = cluster.run(DIFFERENCES).results[0]["differences"]
    assert (UPSTREAMS_WARNING in stock.log) is ("bucket padding" not in bridged)
    ranks = cluster.run(PLACE, num_ranks, argv=f"{base} {ADAMS} --save {tmp_path / 'adams'}")
    assert UPSTREAMS_WARNING not in ranks.log
    saved = cluster.run(LOAD, checkpoint=folder_of(tmp_path / "adams", SAVED_AT)).results[0]
    live = assemble([shard for rank in ranks.results for shard in rank])
    optimizer_keys = {key for key in saved if key.startswith("optimizer.state.")}
    assert optimizer_keys == set(live)
    for key, tensor in live.items():
        assert torch.equal(saved[key], tensor), key
        if key.startswith("optimizer.state.param."):
            assert torch.equal(saved[key.removeprefix("optimizer.state.param.")], tensor), key


def assemble(shards: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Whole tensors, under a checkpoint's keys, from the shards of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for shard in shards:
        for state in ("param", "exp_avg"):
            tensor = whole.setdefault(
                f"optimizer.state.{state}.{shard['key']}",
                torch.full(shard["global_shape"], math.nan),
            )
            num_stacked = len(shard["global_offset"]) - len(shard["local_shape"])
            for offset in shard["global_offset"][:num_stacked]:
                tensor = tensor[offset]
            for axis, size in enumerate(shard["local_shape"]):
                tensor = tensor.narrow(axis, shard["global_offset"][num_stacked + axis], size)
            local = tensor.clone().flatten()
            local[shard["start"] : shard["start"] + shard[state].numel()] = shard[state]
            tensor.copy_(local.view_as(tensor))
    return whole


STOCK_FORMATS = {
    "torch_dist": "--use-distributed-optimizer",
    "fully_reshardable": "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    "legacy": "--use-distributed-optimizer --ckpt-format torch",
    "plain": "",
}
REFUSAL = "ValueError: this checkpoint was written by Adam or another optimizer"


def _refused_then_taken_without_state(cluster: Cluster, base: str, saved: Path) -> None:
    refused = cluster.run(TRAIN, 2, argv=f"{base} {ADAMS} --load {saved}", check=False)
    assert all(refused.codes)
    for log in refused.logs:
        assert REFUSAL in log
    taken = cluster.run(TRAIN, 2, argv=f"{base} {ADAMS} --load {saved} --no-load-optim")
    for rank in taken.results:
        assert len(rank["grad_norms"]) == NUM_STEPS - SAVED_AT
        for part in rank["parts"]:
            assert {group["step"] for group in part["groups"]} == {NUM_STEPS - SAVED_AT}
            assert {tuple(group["betas"]) for group in part["groups"]} == {(0.9, 0.95)}


@pytest.mark.parametrize("ckpt_format", STOCK_FORMATS)
def test_stock_adam_checkpoint_is_refused(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path, ckpt_format: str
) -> None:
    base = f"{STOCK_FORMATS[ckpt_format]} {STEPS}"
    save = f"{base} --optimizer adam --exit-interval {SAVED_AT} --save {checkpoints}"
    plain_cluster.run(TRAIN, 2, argv=save)
    _refused_then_taken_without_state(cluster, base, checkpoints)


def test_adam_checkpoint_from_the_world_with_apex_is_refused(
    cluster: Cluster, apex_cluster: Cluster, checkpoints: Path
) -> None:
    """Its groups look like ours, step and all."""
    base = f"--use-distributed-optimizer {STEPS}"
    save = f"{base} --optimizer adam --exit-interval {SAVED_AT} --save {checkpoints}"
    apex_cluster.run(TRAIN, 2, argv=save)
    _refused_then_taken_without_state(cluster, base, checkpoints)


def test_finetune_from_stock_adam_checkpoint(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path
) -> None:
    base = f"--use-distributed-optimizer {STEPS}"
    plain_cluster.run(TRAIN, 2, argv=f"{base} --optimizer adam --save {checkpoints}")
    run = cluster.run(TRAIN, 2, argv=f"{base} {ADAMS} --load {checkpoints} --finetune")
    for rank in run.results:
        assert len(rank["grad_norms"]) == NUM_STEPS
        assert {g["step"] for part in rank["parts"] for g in part["groups"]} == {NUM_STEPS}


@pytest.mark.parametrize("family", ["dp2", "tp2_bf16_fully_reshardable", "dp2_legacy"])
def test_save_before_first_step(cluster: Cluster, checkpoints: Path, family: str) -> None:
    base = f"{FAMILIES[family]} --train-iters 2"
    cluster.run(SAVE_FIRST, 2, argv=f"{base} --save {checkpoints}")
    resumed = cluster.run(TRAIN, 2, argv=f"{base} --load {checkpoints}").results
    assert_continues(resumed, cluster.run(TRAIN, 2, argv=base).results, 0)


# Of a run that saves, and of one that takes one step more: the scheduler counts --train-iters.
ONE_MORE = f"--train-iters {SAVED_AT + 1} --save-interval {SAVED_AT}"
OVERRIDE = "--override-opt_param-scheduler"
RATE_FAMILIES = (
    *("dp2", "dp2_bf16_overlap", "tp2_bf16_fully_reshardable", "ep2", "dp2_legacy"),
    *("plain", "plain_bf16", "plain_legacy"),
)


@pytest.mark.parametrize(
    "family",
    thinned(RATE_FAMILIES, full=("dp2_bf16_overlap", "ep2", "plain_bf16", "plain_legacy")),
)
def test_resume_at_another_lr_goes_on_from_the_momentum_if_told_so(
    cluster: Cluster, checkpoints: Path, family: str
) -> None:
    base = f"{FAMILIES[family]} {ONE_MORE}"
    cluster.run(TRAIN, 2, argv=f"{base} --exit-interval {SAVED_AT} --save {checkpoints}")
    resume = f"{base} --load {checkpoints}"
    refused = cluster.run(TRAIN, 2, argv=f"{resume} --lr 3e-3", check=False)
    assert refused.codes == [1, 1]
    for log in refused.logs:
        assert f"add {OVERRIDE} to go on from its momentum" in log
        assert "'max_lr': 0.003" in log and "'max_lr': 0.001" in log
    # Of the same step at 1, 2 and 4 times the rate the momentum is the same, and the params differ
    # by once and three times the same.
    runs = {
        lr: cluster.run(TRAIN, 2, argv=f"{resume} {OVERRIDE} --lr {lr}").results
        for lr in (1e-3, 2e-3, 4e-3)
    }
    num_shards = 0
    for ranks in zip(*runs.values(), strict=True):
        for lr, rank in zip(runs, ranks, strict=True):
            groups = [group for part in rank["parts"] for group in part["groups"]]
            assert {group["lr"] for group in groups} == {group["max_lr"] for group in groups}
            assert {group["lr"] for group in groups} == {lr}
            assert {group["step"] for group in groups} == {SAVED_AT + 1}
        shards = zip(
            *([shard for part in rank["parts"] for shard in part["shards"]] for rank in ranks),
            strict=True,
        )
        for once, twice, four_times in shards:
            num_shards += 1
            assert torch.equal(once["exp_avg"], twice["exp_avg"])
            assert torch.equal(once["exp_avg"], four_times["exp_avg"])
            difference = twice["param"] - once["param"]
            tripled = four_times["param"] - once["param"]
            torch.testing.assert_close(tripled, 3 * difference, atol=1e-6, rtol=0)
            assert difference.abs().max() > 1e-4
    assert num_shards > 0


@pytest.mark.parametrize("family", ["dp2", "plain_legacy"])
def test_form_of_the_update_is_that_of_the_run_not_of_the_checkpoint(
    cluster: Cluster, checkpoints: Path, family: str
) -> None:
    flags = "--adams-nesterov --adams-cautious"
    base = f"{FAMILIES[family]} {STEPS}"
    whole = cluster.run(TRAIN, 2, argv=f"{base} {flags} --save {checkpoints}").results
    load = choose(checkpoints, SAVED_AT)
    assert_continues(cluster.run(TRAIN, 2, argv=f"{base} {flags} {load}").results, whole)
    changed = cluster.run(TRAIN, 2, argv=f"{base} {load}")
    assert "cautious is False here and True in the checkpoint" in changed.log
    assert "nesterov is False here and True in the checkpoint" in changed.log
    for rank in changed.results:
        for group in (group for part in rank["parts"] for group in part["groups"]):
            assert (group["nesterov"], group["cautious"]) == (False, False)


def test_saved_lr_needs_no_flag(cluster: Cluster, checkpoints: Path) -> None:
    base = f"{DISTRIBUTED} {ONE_MORE}"
    cluster.run(TRAIN, 2, argv=f"{base} --exit-interval {SAVED_AT} --save {checkpoints}")
    run = cluster.run(TRAIN, 2, argv=f"{base} --load {checkpoints}")
    assert [len(rank["grad_norms"]) for rank in run.results] == [1, 1]


@pytest.mark.parametrize("as_they_are", [False, True], ids=["synchronized", "as they are"])
@pytest.mark.parametrize(
    "family",
    thinned(["dp2", "dp2_bf16_overlap", "ep2", "dp2_legacy"], full=("dp2", "dp2_bf16_overlap")),
)
def test_groups_whose_steps_differ_are_saved_and_loaded_with_one(
    cluster: Cluster, checkpoints: Path, family: str, as_they_are: bool
) -> None:
    base = f"{FAMILIES[family]} {ONE_MORE}"
    saved = cluster.run(
        STEPS_DIFFER,
        2,
        argv=f"{base} --exit-interval {SAVED_AT} --save {checkpoints}",
        steps=[1, 7],
        ranks=[0],
        as_they_are=as_they_are,
    )
    said = "param groups of adams have the steps [1, 7]; a checkpoint has one, and all get 7"
    assert (said in saved.logs[0]) is not as_they_are
    run = cluster.run(TRAIN, 2, argv=f"{base} --load {checkpoints}")
    for rank in run.results:
        groups = [group for part in rank["parts"] for group in part["groups"]]
        assert len(groups) > 1 and {group["step"] for group in groups} == {8}


@pytest.mark.parametrize("family", ["dp2", "tp2_bf16_fully_reshardable", "plain"])
def test_checkpoint_has_no_exp_avg_sq_and_says_adams(
    cluster: Cluster, checkpoints: Path, family: str
) -> None:
    cluster.run(TRAIN, 2, argv=f"{FAMILIES[family]} --train-iters 1 --save {checkpoints}")
    common = cluster.run(COMMON, checkpoint=folder_of(checkpoints, 1)).results[0]
    assert any("exp_avg" in key for key in common["keys"])
    assert not [key for key in common["keys"] if "exp_avg_sq" in key]
    assert common["args"].optimizer == "adams"
    assert common["args"].adam_beta2 == 0.95


@pytest.mark.parametrize("optimizer", ["adam", "adams"])
def test_checkpoint_needs_no_class_of_the_plugin(
    cluster: Cluster, checkpoints: Path, optimizer: str
) -> None:
    """Megatron without it can read the checkpoint, Adam's above all."""
    argv = f"--optimizer {optimizer} --use-distributed-optimizer --train-iters 1"
    cluster.run(TRAIN, 1, argv=f"{argv} --save {checkpoints}")
    common = cluster.run(COMMON, checkpoint=folder_of(checkpoints, 1)).results[0]
    for name, value in vars(common["args"]).items():
        assert not type(value).__module__.startswith("megatron_adams"), name
