"""From an AdamW checkpoint to adams: nothing is lost but exp_avg_sq, nothing starts anew."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_adams.cli import main as megatron_adams_command
from tests.distributed.cluster import REPO, Cluster, Outcome
from tests.distributed.test_checkpoint import (
    NUM_STEPS,
    SAVED_AT,
    STEPS,
    choose,
    folder_of,
)
from tests.distributed.test_parity import MOE

TRAIN = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"
AFTER_LOAD = "tests.distributed.from_adam_cases:state_after_load"
COMMON = "tests.distributed.checkpoint_cases:read_common"

FROM_ADAM = "--optimizer adams --adams-from-adam"
DISTRIBUTED = "--use-distributed-optimizer"
FORMATS = {
    "dp_reshardable": DISTRIBUTED,
    "bf16_fully_reshardable": f"{DISTRIBUTED} --bf16 --dist-ckpt-optim-fully-reshardable",
    "fp16": f"{DISTRIBUTED} --fp16 --initial-loss-scale 1024",
    "experts": f"{DISTRIBUTED} {MOE} --disable-bias-linear --expert-model-parallel-size 2",
    "legacy": f"{DISTRIBUTED} --ckpt-format torch",
    "plain": "",
    "plain_bf16": "--bf16",
    "plain_legacy": "--ckpt-format torch",
}


def adam_run(cluster: Cluster, flags: str, folder: Path) -> Outcome:
    """AdamW's first steps, and its checkpoint."""
    argv = f"--optimizer adam {flags} {STEPS} --exit-interval {SAVED_AT} --save {folder}"
    return cluster.run(TRAIN, 2, argv=argv)


def assert_same_state(parts: list[dict[str, Any]], adam_parts: list[dict[str, Any]]) -> None:
    for part, adam_part in zip(parts, adam_parts, strict=True):
        assert part["shards"]
        for shard, adam_shard in zip(part["shards"], adam_part["shards"], strict=True):
            assert set(shard["state"]) == {"exp_avg"}
            assert adam_shard["state"]["exp_avg"].abs().sum() > 0
            assert torch.equal(shard["param"], adam_shard["param"])
            assert torch.equal(shard["state"]["exp_avg"], adam_shard["state"]["exp_avg"])


@pytest.mark.parametrize("name", FORMATS)
def test_momentum_main_params_and_step_are_adams(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path, name: str
) -> None:
    saved = adam_run(plain_cluster, FORMATS[name], checkpoints)
    argv = f"{FROM_ADAM} {FORMATS[name]} {STEPS} --load {checkpoints}"
    loaded = cluster.run(AFTER_LOAD, 2, argv=argv)
    for rank, adam_rank in zip(loaded.results, saved.results, strict=True):
        assert_same_state(rank["parts"], adam_rank["parts"])
        assert (rank["iteration"], rank["num_steps"]) == (SAVED_AT, SAVED_AT * 8)
        for part in rank["parts"]:
            for group in part["groups"]:
                assert group["step"] == SAVED_AT - adam_rank["skipped"].count(1)
                assert group["betas"] == (0.9, 0.95)
                assert not {"amsgrad", "fused", "decoupled_weight_decay"} & set(group)
                assert group["lr"] == 1e-3
    num_params = [len(part["shards"]) for part in loaded.results[0]["parts"]]
    assert "adams's own" not in loaded.log
    lines = [line for line in loaded.logs[0].splitlines() if "goes on from Adam's step" in line]
    assert len(lines) == len(num_params)
    for line, number in zip(lines, num_params, strict=True):
        assert f"step {SAVED_AT}: momentum and main params of {number} of {number}" in line
        assert "exp_avg_sq dropped" in line
    # And the run goes on: with the whole batch of steps that is left.
    run = cluster.run(TRAIN, 2, argv=argv)
    for rank in run.results:
        assert len(rank["grad_norms"]) == NUM_STEPS - SAVED_AT


def test_state_of_the_world_with_apex_is_taken(
    cluster: Cluster, apex_cluster: Cluster, checkpoints: Path
) -> None:
    """Its groups have the step, its state has none; and so without it."""
    saved = adam_run(apex_cluster, DISTRIBUTED, checkpoints)
    argv = f"{FROM_ADAM} {DISTRIBUTED} {STEPS} --load {checkpoints}"
    for each in (cluster, apex_cluster):
        for rank, adam_rank in zip(
            each.run(AFTER_LOAD, 2, argv=argv).results, saved.results, strict=True
        ):
            assert_same_state(rank["parts"], adam_rank["parts"])
            assert rank["parts"][0]["groups"][0]["step"] == SAVED_AT


def test_switch_at_another_layout_and_precision_loses_no_bit(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path
) -> None:
    flags = f"--bf16 --disable-bias-linear --train-iters {SAVED_AT} {DISTRIBUTED}"
    flags += " --dist-ckpt-optim-fully-reshardable"
    source, end = tmp_path / "source", tmp_path / "end"
    plain_cluster.run(
        TRAIN, 2, argv=f"--optimizer adam {flags} --tensor-model-parallel-size 2 --save {source}"
    )
    cluster.run(
        TRAIN,
        2,
        argv=f"{FROM_ADAM} {flags} --use-precision-aware-optimizer --load {source} --save {end}",
    )
    before, after = (
        cluster.run(LOAD, checkpoint=folder_of(root, SAVED_AT)).results[0] for root in (source, end)
    )
    kept = {k for k in before if k.startswith("optimizer.") and ".exp_avg_sq." not in k}
    assert kept == {k for k in after if k.startswith("optimizer.")}
    assert any(".exp_avg_sq." in key for key in before)
    for key in kept:
        assert torch.equal(before[key], after[key]), key


def test_flag_may_stay_for_resumes_from_adams(
    cluster: Cluster, plain_cluster: Cluster, tmp_path: Path
) -> None:
    """As in a job that is restarted with the same command."""
    adam, folder = tmp_path / "adam", tmp_path / "adams"
    adam_run(plain_cluster, DISTRIBUTED, adam)
    base = f"{FROM_ADAM} {DISTRIBUTED} --train-iters {NUM_STEPS} --save-interval 4"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --load {adam} --save {folder}").results
    argv = f"{base} {choose(folder, 4)}"
    with_flag = cluster.run(TRAIN, 2, argv=argv)
    without = cluster.run(TRAIN, 2, argv=argv.replace("--adams-from-adam", ""))
    for resumed in (with_flag, without):
        for mine, theirs in zip(resumed.results, whole, strict=True):
            assert mine["losses"] == theirs["losses"][1:]
            for name, tensor in theirs["model"].items():
                assert torch.equal(mine["model"][name], tensor), name
    assert "the checkpoint is adams's own" in with_flag.logs[0]
    assert "goes on from Adam" not in with_flag.log


def test_learning_rate_may_change_at_the_switch(
    cluster: Cluster, plain_cluster: Cluster, checkpoints: Path
) -> None:
    adam_run(plain_cluster, f"{DISTRIBUTED} --decoupled-lr 2e-3", checkpoints)
    argv = (
        f"{FROM_ADAM} {DISTRIBUTED} --lr 5e-4 --decoupled-lr 1e-3 --override-opt_param-scheduler "
        f"{STEPS} --load {checkpoints}"
    )
    run = cluster.run(TRAIN, 2, argv=argv)
    rates = {
        (group["lr"], group["max_lr"])
        for part in run.results[0]["parts"]
        for group in part["groups"]
    }
    assert rates == {(5e-4, 5e-4), (1e-3, 1e-3)}


@pytest.mark.parametrize("name", ["dp_reshardable", "bf16_fully_reshardable", "experts", "legacy",
                                  "plain_bf16", "plain_legacy"])  # fmt: skip
def test_converted_checkpoint_resumes_as_with_the_flag(
    cluster: Cluster,
    plain_cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    adam, converted = tmp_path / "adam", tmp_path / "adams"
    adam_run(plain_cluster, FORMATS[name], adam)
    before = {p: p.read_bytes() for p in adam.rglob("*") if p.is_file()}
    assert megatron_adams_command(["convert", str(adam), str(converted)]) == 0
    told = capsys.readouterr().out.splitlines()
    num_saved = int(told[-1].split(" saved")[0].split()[-1].replace(",", ""))
    sizes = [
        sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.parent != root)
        for root in (adam, converted)
    ]
    assert num_saved == sizes[0] - sizes[1] > 0
    assert before == {p: p.read_bytes() for p in adam.rglob("*") if p.is_file()}
    flags = f"{FORMATS[name]} {STEPS}"
    mine = cluster.run(TRAIN, 2, argv=f"--optimizer adams {flags} --load {converted}")
    theirs = cluster.run(TRAIN, 2, argv=f"{FROM_ADAM} {flags} --load {adam}")
    for my_rank, their_rank in zip(mine.results, theirs.results, strict=True):
        assert my_rank["losses"] == their_rank["losses"]
        for part, their_part in zip(my_rank["parts"], their_rank["parts"], strict=True):
            assert part["groups"] == their_part["groups"]
        for key, tensor in their_rank["model"].items():
            assert torch.equal(my_rank["model"][key], tensor), key
    if "legacy" not in name:
        common = cluster.run(COMMON, checkpoint=folder_of(converted, SAVED_AT)).results[0]
        assert common["args"].optimizer == "adams"
        assert not [key for key in common["keys"] if "exp_avg_sq" in key]


@pytest.mark.parametrize("name", ["dp_reshardable", "legacy", "plain", "plain_legacy"])
def test_adam_is_told_that_it_cannot_go_on_from_adams(
    cluster: Cluster, checkpoints: Path, name: str
) -> None:
    flags = f"{FORMATS[name]} {STEPS}"
    cluster.run(TRAIN, 2, argv=f"--optimizer adams {flags} --save {checkpoints}")
    argv = f"--optimizer adam {flags} {choose(checkpoints, SAVED_AT)}"
    refused = cluster.run(TRAIN, 2, argv=argv, check=False)
    assert all(refused.codes)
    for log in refused.logs:
        assert "saved by adams, which keeps exp_avg and no exp_avg_sq" in log
        assert "--no-load-optim or --finetune" in log
    taken = cluster.run(TRAIN, 2, argv=f"{argv} --no-load-optim")
    assert len(taken.results[0]["grad_norms"]) == NUM_STEPS - SAVED_AT


def test_switch_keeps_the_loss(cluster: Cluster, tmp_path: Path) -> None:
    """On the quickstart's text: the next 100 steps are no worse than the last 50 and 0.05 nats."""
    sys.path.insert(0, str(REPO / "examples" / "pretrain_gpt"))
    try:
        from prepare_data import prepare
    finally:
        sys.path.pop(0)
    dataset = prepare(None, tmp_path / "data")
    adam, num_adam, num_adams = tmp_path / "adam", 200, 100
    base = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
        "--max-position-embeddings 128 --micro-batch-size 8 --global-batch-size 16 "
        "--position-embedding-type rope --no-rope-fusion --disable-bias-linear "
        "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 257 "
        f"--train-data-path {dataset.train_prefix} --valid-data-path {dataset.held_out_prefix} "
        f"--data-cache-path {tmp_path / 'index'} --no-create-attention-mask-in-dataloader "
        "--lr-decay-style constant --weight-decay 0.1 --clip-grad 1 --use-cpu-initialization "
        "--eval-iters 0 --eval-interval 1000 --save-interval 1000 --log-interval 50 "
        f"--num-workers 0 {DISTRIBUTED} --train-iters {num_adam + num_adams} "
    )
    first = cluster.run(
        TRAIN,
        2,
        base=base,
        argv=f"--optimizer adam --lr 1e-3 --adam-beta2 0.95 --exit-interval {num_adam} "
        f"--save {adam}",
    )
    switched = cluster.run(
        TRAIN,
        2,
        base=base,
        argv=f"{FROM_ADAM} --lr 5e-4 --override-opt_param-scheduler --load {adam}",
    )
    before, after = (run.results[-1]["losses"] for run in (first, switched))
    assert (len(before), len(after)) == (num_adam, num_adams)
    print(f"last 50 of AdamW {np.mean(before[-50:]):.3f}, next 100 {np.mean(after):.3f}")
    assert np.mean(after) <= np.mean(before[-50:]) + 0.05
    # Nor is there a jump: worse in no ten steps than the noise of single batches.
    tens = [np.mean(after[i : i + 10]) for i in range(0, num_adams, 10)]
    assert max(tens) <= np.mean(before[-50:]) + 0.15
