"""AdamW's shadow on real Megatron: the float64 oracle, sharded as unsharded, in the log."""

import math
import re

import pytest

from tests.harness.argv import ADAMS, AWARE, DISTRIBUTED, TP2
from tests.harness.cluster import Cluster
from tests.harness.compare import assert_same
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.shadow_cases:train"
TRAIN_FSDP = "tests.distributed.fsdp_cases:train"
PLAIN_TRAIN = "tests.distributed.cases:train"
NUM_STEPS = 5
LINE = r"update RMS: (\S+) \| AdamW's would be: (\S+) \|"
SHADOW = f"--train-iters {NUM_STEPS} --adams-log-adamw-rms 0.9"

LAYOUTS = {
    "dp2_bf16": f"{DISTRIBUTED} --bf16",
    "dp2_plain": ADAMS,
    "tp2": f"{DISTRIBUTED} {TP2}",
    "precision_aware": f"{AWARE} --bf16 --main-grads-dtype bf16",
    "fp16": f"{DISTRIBUTED} --fp16 --initial-loss-scale 1024",
}


@pytest.mark.parametrize("name", thinned(LAYOUTS, full=("dp2_plain",)))
def test_log_is_the_rms_of_adamws_updates_in_float64(cluster: Cluster, name: str) -> None:
    outcome = cluster.run(TRAIN, 2, argv=f"{LAYOUTS[name]} {SHADOW}")
    lines = re.findall(LINE, outcome.log)
    assert len(lines) == NUM_STEPS
    for step, (rms, adamw_rms) in enumerate(lines):
        squares, numels = zip(*(rank["exact"][step] for rank in outcome.results), strict=True)
        exact = math.sqrt(sum(squares) / sum(numels))
        for rank in outcome.results:
            assert rank["adamw_rms"][step] == pytest.approx(exact, rel=1e-4)
            assert f"{rank['rms'][step]:.6E}" == rms
        assert f"{outcome.results[0]['adamw_rms'][step]:.6E}" == adamw_rms
        assert outcome.results[-1]["scalars"][step + 1] == outcome.results[0]["adamw_rms"][step]
    # The first AdamW update is a sign.
    assert outcome.results[0]["adamw_rms"][0] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("precision", thinned(("", "--bf16"), full=("",)))
def test_sharded_over_dp_or_not_the_shadow_has_the_same_bits(
    cluster: Cluster, precision: str
) -> None:
    # Sums of squares differ in their order where shards differ, and the clip coefficient with them.
    flags = f"{SHADOW} --clip-grad 0 {precision}"
    sharded = cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} {flags}")
    whole = cluster.run(TRAIN, 2, argv=f"{ADAMS} {flags}")
    assert_same(sharded, whole, "losses", "model", "adamw_rms")
    assert None not in sharded.results[0]["adamw_rms"]


def test_the_shadow_changes_no_bit_and_follows_the_steps_that_are_not_logged(
    cluster: Cluster,
) -> None:
    flags = f"{DISTRIBUTED} --bf16"
    plain = cluster.run(TRAIN, 2, argv=f"{flags} --train-iters {NUM_STEPS}")
    often = cluster.run(TRAIN, 2, argv=f"{flags} {SHADOW}")
    seldom = cluster.run(TRAIN, 2, argv=f"{flags} {SHADOW} --log-interval {NUM_STEPS}")
    assert_same(often, plain, "losses", "model", "rms")
    assert plain.results[0]["adamw_rms"] == [None] * NUM_STEPS
    assert plain.results[0]["has_shadow"] == [False]
    assert "AdamW's would be" not in plain.log
    every = often.results[0]["adamw_rms"]
    assert seldom.results[0]["adamw_rms"] == [every[0], every[-1]]


def test_lines_under_megatron_fsdp_are_those_of_the_distributed_optimizer(
    fsdp_cluster: Cluster,
) -> None:
    # Equal gradients: rounded to bf16 in either, and added up over two ranks.
    base = f"{ADAMS} --bf16 --clip-grad 0 --micro-batch-size 4 --train-iters 3"
    base += " --adams-log-adamw-rms 0.9"
    plain = fsdp_cluster.run(PLAIN_TRAIN, 2, argv=f"{base} --use-distributed-optimizer")
    flags = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy"
    fsdp = f"{flags} optim_grads_params --megatron-fsdp-main-grads-dtype fp32"
    mine = fsdp_cluster.run(TRAIN_FSDP, 2, argv=f"{base} {fsdp}")
    found = [re.findall(LINE, run.log) for run in (mine, plain)]
    assert found[0] == found[1] and len(found[0]) == 3


def test_beta2_of_the_flag_without_a_value(cluster: Cluster) -> None:
    flags = f"{DISTRIBUTED} --train-iters 3"
    default = cluster.run(TRAIN, 1, argv=f"{flags} --adams-log-adamw-rms")
    given = cluster.run(TRAIN, 1, argv=f"{flags} --adams-log-adamw-rms 0.95")
    assert_same(default, given, "adamw_rms")
