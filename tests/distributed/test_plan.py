"""`megatron-adams plan` against live tensors on real ranks, and against sums made by hand."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_adams.cpu_rehearsal import rehearsal_flags
from megatron_adams.planning.models import model_flags
from tests.distributed.cases import TINY_GPT
from tests.distributed.test_parity import MOE
from tests.harness.cluster import Cluster
from tests.harness.thinning import thinned

LIVE = "tests.distributed.plan_cases:live"
LIVE_TE = "tests.distributed.plan_cases:live_with_transformer_engine"
PLANS = "tests.distributed.plan_cases:plans"
SHAPES = "tests.distributed.plan_cases:built_shapes"
REFUSALS = "tests.distributed.plan_cases:refusals"

SHARDED = "--bf16 --use-distributed-optimizer"
ADAM = "--optimizer adam"
ADAMS = "--optimizer adams"
AWARE = f"{ADAMS} --use-precision-aware-optimizer"
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"

# Ranks, flags, and steps to train (0: setup alone).
RUNS = {
    "tp2_pp2_dp2_adam": (8, f"{SHARDED} {TP2_PP2} {ADAM}", 0),
    "tp2_pp2_dp2_adams": (8, f"{SHARDED} {TP2_PP2} {ADAMS}", 2),
    "tp2_pp2_dp2_adams_bf16": (8, f"{SHARDED} {TP2_PP2} {AWARE} --exp-avg-dtype bf16", 0),
    # Buckets of a few params, whose padding falls to the last ranks.
    "dp3_buckets_untied_adams": (
        3,
        f"{SHARDED} {ADAMS} --overlap-grad-reduce --ddp-bucket-size 9000 --global-batch-size 6 "
        "--untie-embeddings-and-output-weights --normalization RMSNorm",
        0,
    ),
    "dp2_high_busbw_g16_adams": (
        2,
        f"{SHARDED} {AWARE} --main-grads-dtype bf16 --overlap-grad-reduce "
        "--ddp-pad-buckets-for-high-nccl-busbw",
        0,
    ),
    "pp2_uneven_adam": (
        2,
        f"{SHARDED} {ADAM} --num-layers 3 --pipeline-model-parallel-size 2 "
        "--decoder-first-pipeline-num-layers 1",
        0,
    ),
    "pp2_vpp2_adams": (
        2,
        f"{SHARDED} {ADAMS} --num-layers 4 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
        0,
    ),
    "ep2_dp4_adams_fp8": (
        4,
        f"{SHARDED} {AWARE} --exp-avg-dtype fp8 {MOE} --expert-model-parallel-size 2",
        0,
    ),
    "two_instances_adams": (
        4,
        f"{SHARDED} {ADAMS} --num-distributed-optimizer-instances 2 --overlap-grad-reduce",
        0,
    ),
    "fp16_main_params_adams": (
        2,
        "--fp16 --accumulate-allreduce-grads-in-fp32 --use-distributed-optimizer "
        f"{AWARE} --main-params-dtype fp16 --exp-avg-dtype fp16",
        0,
    ),
    "whole_main_params_adams": (2, f"{SHARDED} {AWARE} --adams-no-param-remainders", 0),
    "fp32_adams": (2, f"--use-distributed-optimizer {ADAMS}", 0),
    "not_sharded_adam": (2, f"--bf16 {ADAM}", 0),
}


def job_of(run: str) -> tuple[list[str], int]:
    """The flags that a run's script is given, and its ranks."""
    num_ranks, argv, _ = RUNS[run]
    flags = [*TINY_GPT.split(), *argv.split(), "--train-iters", "1"]
    return [*flags, *rehearsal_flags(flags)], num_ranks


@pytest.fixture(scope="module")
def planned(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The plans of all runs, from one process."""
    outcome = cluster.run(PLANS, 1, timeout_s=280, jobs=[job_of(run) for run in RUNS])
    return dict(zip(RUNS, outcome.results[0], strict=True))


def kind_of(plan: dict[str, Any], rank: int) -> dict[str, Any]:
    (kind,) = [k for k in plan["kinds"] if any(start <= rank < stop for start, stop in k["ranks"])]
    return kind


def of_mode(kind: dict[str, Any], mode: str) -> dict[str, Any]:
    """What a rank holds in a mode, as `plan_cases` counts it."""
    return {
        "weights": kind["weights"],
        "gradients": kind["gradients"][mode],
        "numel": kind["numel"],
        "optimizer": kind["optimizer"][mode],
    }


@pytest.mark.parametrize("run", thinned(RUNS, full=("tp2_pp2_dp2_adam", "tp2_pp2_dp2_adams_bf16")))
def test_plan_equals_live_tensors_on_every_rank(
    cluster: Cluster, planned: dict[str, dict[str, Any]], run: str
) -> None:
    num_ranks, argv, num_steps = RUNS[run]
    lives = cluster.run(LIVE, num_ranks, argv=argv, num_steps=num_steps).results
    plan = planned[run]
    assert plan["num_ranks"] == num_ranks == sum(kind["num_ranks"] for kind in plan["kinds"])
    for rank, found in enumerate(lives):
        assert found["numel"] > 0
        assert of_mode(kind_of(plan, rank), plan["given"]) == found, rank


def test_ranks_of_a_stage_differ_by_the_padding_of_buckets(
    planned: dict[str, dict[str, Any]],
) -> None:
    kinds = planned["dp3_buckets_untied_adams"]["kinds"]
    assert len({kind["numel"] for kind in kinds}) > 1
    assert (
        sum(kind["numel"] for kind in kinds)
        == planned["dp3_buckets_untied_adams"]["model"]["num_params"]
    )


def test_number_of_params_counts_each_once(planned: dict[str, dict[str, Any]]) -> None:
    """Of one GPT on one, eight and, with its experts, four ranks."""
    hidden, vocab, layers = 64, 128, 2
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 8 * hidden * hidden + 5 * hidden
    norms = 4 * hidden
    embeddings = (vocab + 32) * hidden
    dense = embeddings + layers * (attention + mlp + norms) + 2 * hidden
    assert planned["fp32_adams"]["model"]["num_params"] == dense
    # Pipeline stages keep a copy of the tied embedding, which is no param of its own.
    assert planned["tp2_pp2_dp2_adam"]["model"]["num_params"] == dense


# With TransformerEngine's layers and its FusedAdam

TE_BASE = (
    TINY_GPT.replace("--use-cpu-initialization ", "")
    + "--distributed-backend gloo --no-gradient-accumulation-fusion --normalization RMSNorm "
    "--no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion"
)
TE_RUNS = {
    "adam_bf16": (
        f"{SHARDED} {ADAM} --use-precision-aware-optimizer --exp-avg-dtype bf16 "
        "--exp-avg-sq-dtype bf16 --overlap-grad-reduce --ddp-bucket-size 9000"
    ),
    "adam_fp8": (
        f"{SHARDED} {ADAM} --use-precision-aware-optimizer --exp-avg-dtype fp8 "
        "--exp-avg-sq-dtype fp8 --normalization LayerNorm --qk-layernorm"
    ),
    "adam_fp16": (
        f"{SHARDED} {ADAM} --use-precision-aware-optimizer --exp-avg-dtype fp16 "
        "--main-params-dtype fp16"
    ),
    "adam": f"{SHARDED} {ADAM}",
}


@pytest.mark.parametrize("run", TE_RUNS)
def test_plan_equals_transformer_engines_layers_and_fused_adam(
    cluster: Cluster, te_cluster: Cluster, run: str
) -> None:
    flags = [*TE_BASE.split(), *TE_RUNS[run].split(), "--train-iters", "1"]
    lives = te_cluster.run(LIVE_TE, 2, argv=TE_RUNS[run], base=TE_BASE).results
    (plan,) = cluster.run(PLANS, 1, timeout_s=280, jobs=[(flags, 2)]).results[0]
    (shapes,) = cluster.run(SHAPES, 1, flags=flags, world_size=2).results
    for rank, found in enumerate(lives):
        assert all("transformer_engine" in module for module in found.pop("inner"))
        assert found.pop("shapes") == shapes
        assert of_mode(kind_of(plan, rank), plan["given"]) == found, rank


# By hand


def llama2_13b(tp: int) -> dict[str, int]:
    """Params of a tp rank of Llama-2 13B, by hand: a layer, an embedding, the last norm."""
    hidden, ffn = 5120, 13824
    multiple = 128 * tp
    vocab = -(-32000 // multiple) * multiple
    attention = 4 * hidden * hidden // tp
    mlp = 3 * hidden * ffn // tp
    return {
        "layer": attention + mlp + 2 * hidden,
        "embedding": vocab * hidden // tp,
        "norm": hidden,
    }


@pytest.fixture(scope="module")
def by_hand(cluster: Cluster) -> list[dict[str, Any]]:
    layouts = ((2, 2, 64), (8, 1, 8))
    jobs = [
        (
            [
                *model_flags("llama2-13b"),
                *f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}".split(),
                "--sequence-parallel",
                *("--global-batch-size", str(dp * 8)),
            ],
            tp * pp * dp,
        )
        for tp, pp, dp in layouts
    ]
    return cluster.run(PLANS, 1, timeout_s=280, jobs=jobs).results[0]


# Bytes of the optimizer a param.
BYTES = {"adamw": 12, "adams": 8, "adams_precision_aware_bf16": 4}


@pytest.mark.parametrize("mode", BYTES)
def test_llama2_13b_at_tp2_pp2_dp64_equals_the_sum_by_hand(
    by_hand: list[dict[str, Any]], mode: str
) -> None:
    params = llama2_13b(2)
    stages = [
        params["embedding"] + 20 * params["layer"],
        20 * params["layer"] + params["norm"] + params["embedding"],
    ]
    # No bucket needs padding: each of the 64 dp ranks has its 64th part.
    assert [numel % 64 for numel in stages] == [0, 0]
    kinds = by_hand[0]["kinds"]
    assert sum(kind["num_ranks"] for kind in kinds) == 256
    for kind in kinds:
        numel = stages[kind["pipeline_stage"]]
        state = sum(kind["optimizer"][mode].values()) - kind["optimizer"][mode].get("scales", 0)
        assert state == numel // 64 * BYTES[mode]
        assert kind["weights"] == 2 * numel
        assert kind["gradients"][mode] == 4 * numel
    by_stage = [{k["numel"] for k in kinds if k["pipeline_stage"] == stage} for stage in (0, 1)]
    assert by_stage == [{50_844_800}, {50_844_880}]


@pytest.mark.parametrize("mode", BYTES)
def test_llama2_13b_at_tp8_dp8_equals_the_sum_by_hand(
    by_hand: list[dict[str, Any]], mode: str
) -> None:
    params = llama2_13b(8)
    # 32,000 tokens are padded to 32,768.
    assert params["embedding"] == 4096 * 5120
    numel = 2 * params["embedding"] + 40 * params["layer"] + params["norm"]
    assert numel % 8 == 0
    kinds = by_hand[1]["kinds"]
    assert sum(kind["num_ranks"] for kind in kinds) == 64
    total = 0
    for kind in kinds:
        total += kind["num_ranks"] * sum(kind["optimizer"][mode].values())
        assert sum(kind["optimizer"][mode].values()) == numel // 8 * BYTES[mode]
    assert total == 8 * numel * BYTES[mode]


def test_state_by_dp_size_is_that_of_the_job_of_that_size(cluster: Cluster) -> None:
    flags = "--ddp-bucket-size 1000000 --num-layers 4 --hidden-size 256 --num-attention-heads 4"
    job = [*model_flags("gpt2-124m"), *flags.split()]
    experts = "--num-experts 4 --moe-ffn-hidden-size 256 --expert-model-parallel-size 2"
    moe = [*job, *experts.split(), "--moe-grouped-gemm", "--disable-bias-linear"]
    jobs = [(job, 2), (job, 48), (moe, 2), (moe, 8)]
    small, large, *of_experts = cluster.run(PLANS, 1, timeout_s=280, jobs=jobs).results[0]
    # Another size has other buckets and other padding; each is compared with a plan of its own.
    for plans in ((small, large), of_experts):
        sizes = [plan["num_ranks"] for plan in plans]
        for plan in plans:
            rows = {row["dp_size"]: row["optimizer"] for row in plan["by_dp_size"]}
            for other, size in zip(plans, sizes, strict=True):
                if size in rows:
                    first = kind_of(other, 0)["optimizer"]
                    sums = {mode: sum(kinds.values()) for mode, kinds in first.items()}
                    assert rows[size] == sums
            assert len(set(sizes) & rows.keys()) == 2 or plan["num_ranks"] == 2


# What is refused

GPT = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
GPT += "--max-position-embeddings 32 --micro-batch-size 1 --vocab-size 128 --bf16"
REFUSED = {
    "--num-layers 4 --hidden-size 64": "--num-attention-heads",
    f"{GPT} --tensor-model-parallel-size 3": "8 ranks do not divide into "
    "--tensor-model-parallel-size 3",
    f"{GPT} --pipeline-model-parallel-size 8": "Megatron .* refuses these flags",
    f"{GPT} --num-layrs 4": "unrecognized arguments: --num-layrs 4",
    f"{GPT} --num-layers four": "invalid int value: 'four'",
    f"{GPT} --optimizer sgd": "--optimizer sgd is not planned",
    f"{GPT} --use-megatron-fsdp": "--use-megatron-fsdp",
    f"{GPT} --adams-max-update-rms 1": "--adams-max-update-rms 1.0 with --optimizer adam",
    f"{GPT} --yaml-cfg x.yaml": "--yaml-cfg is not planned",
    f"{GPT} --use-checkpoint-args": "--use-checkpoint-args is not planned",
    f"{GPT.replace('--vocab-size 128', '')}": "add --vocab-size",
}


def test_jobs_that_cannot_run_are_refused_with_a_sentence(cluster: Cluster) -> None:
    jobs: Sequence[Any] = [(argv.split(), 8) for argv in REFUSED]
    messages = cluster.run(REFUSALS, 1, jobs=jobs).results[0]
    for argv, expected, message in zip(REFUSED, REFUSED.values(), messages, strict=True):
        assert message is not None, argv
        assert re.search(expected, message), (argv, message)
        assert "\n" not in message and len(message) < 400
