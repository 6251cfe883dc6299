"""--optimizer-cuda-graph: the bits of the run without it, on a stand-in for CUDA graphs.

The stand-in (tests/harness/cuda_graph_stand_in.py) carries nothing out in a capture, runs no
Python in a replay, and ends a capture where the host would wait. Megatron, its wrapper included, is
real.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.argv import EP2
from tests.harness.cluster import Cluster, Outcome
from tests.harness.compare import assert_same
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.graph_cases:train"
TRAIN_MODULE = "tests.distributed.graph_cases:train_module"
REFUSALS = "tests.distributed.flag_cases:refusals"

GRAPH = "--optimizer-cuda-graph"
PLAIN = (
    "--optimizer adams --train-iters 7 --global-batch-size 4 --clip-grad 1.7 "
    "--lr-decay-style cosine --lr-warmup-iters 2 --lr-decay-iters 7 --min-lr 1e-5 "
)
BASE = f"{PLAIN} --use-distributed-optimizer "
NUM_WARMUP_STEPS = 3
"""Megatron's default."""

PRECISION_AWARE = "--bf16 --use-precision-aware-optimizer"
# All iterations' logs, and all that is left at the end.
ALIKE = (
    *("losses", "grad_norms", "rates"),
    *("model", "param", "main_param", "exp_avg", "counts"),
)
PP2 = "--num-layers 4 --pipeline-model-parallel-size 2"
RUNS = {
    "bf16_dp2": f"{BASE} --bf16",
    "bf16_dp2_free": f"{BASE} --bf16 --clip-grad 0",
    "bf16_dp2_bias_correction": f"{BASE} --bf16 --adams-bias-correction",
    "bf16_dp2_foreach": f"{BASE} --bf16 --adams-kernel foreach --adams-bias-correction",
    "fp32_dp2": BASE,
    "bf16_tp2": f"{BASE} --bf16 --tensor-model-parallel-size 2",
    "bf16_pp2": f"{BASE} --bf16 {PP2}",
    "bf16_vpp2": f"{BASE} --bf16 {PP2} --num-virtual-stages-per-pipeline-rank 2",
    "bf16_ep2": f"{BASE} --bf16 {EP2} --clip-grad 1.18",
    "bf16_overlap": f"{BASE} --bf16 --overlap-grad-reduce --overlap-param-gather",
    "bf16_decoupled_lr": f"{BASE} --bf16 --untie-embeddings-and-output-weights "
    "--decoupled-lr 5e-3 --decoupled-min-lr 1e-4",
    "remainders": f"{BASE} {PRECISION_AWARE}",
    "remainders_bf16_grads_fp8": f"{BASE} {PRECISION_AWARE} --main-grads-dtype bf16 "
    "--exp-avg-dtype fp8",
    "fp16_main_params": f"{BASE} {PRECISION_AWARE} --main-params-dtype fp16 --exp-avg-dtype bf16",
    "fp32_main_params": f"{BASE} {PRECISION_AWARE} --adams-no-param-remainders",
    "plain_bf16": f"{PLAIN} --bf16",
    "plain_fp32": PLAIN,
}


@pytest.fixture(scope="module", autouse=True)
def captures_steps(cluster: Cluster) -> None:
    if not cluster.run("tests.distributed.version_cases:has", flag=GRAPH).results[0]:
        pytest.skip(f"this Megatron has no {GRAPH} (0.16)")


def assert_replayed(run: Outcome, num_warmup_steps: int, num_iterations: int) -> None:
    """Python ran the warm-up steps and the captured one, for each part of the chain."""
    for rank in run.results:
        assert rank["num_replays"] == num_iterations - num_warmup_steps
        assert rank["num_steps"] == (num_warmup_steps + 1) * len(rank["parts"])


@pytest.mark.parametrize(
    "name",
    thinned(RUNS, full=("bf16_dp2", "bf16_tp2", "bf16_pp2", "remainders", "plain_fp32")),
)
def test_captured_step_gives_the_bits_of_the_step(cluster: Cluster, name: str) -> None:
    eager = cluster.run(TRAIN, 2, argv=RUNS[name])
    captured = cluster.run(TRAIN, 2, argv=f"{RUNS[name]} {GRAPH}")
    assert_replayed(captured, NUM_WARMUP_STEPS, 7)
    assert_same(captured, eager, *ALIKE)
    for rank in eager.results:
        assert "recorded" not in rank
        # The comparison is one: other rates in the replays, and norms on both sides of the limit.
        assert len({tuple(rates) for rates in rank["rates"]}) == 7
        assert rank["counts"] == [7] * len(rank["counts"])
    norms = [norm for norm in eager.results[0]["grad_norms"][NUM_WARMUP_STEPS:] if norm]
    assert len(set(norms)) == 7 - NUM_WARMUP_STEPS


RMS = {
    "logged": "",
    "capped": "--adams-max-update-rms 0.6",
    "matched": "--adams-match-rms 0.25 --adams-bias-correction",
}


@pytest.mark.parametrize("name", thinned(RMS, full=("logged",)))
def test_update_rms_of_replays_is_logged_capped_and_matched(cluster: Cluster, name: str) -> None:
    flags = f"{BASE} --bf16 --tensor-model-parallel-size 2 --log-interval 3 {RMS[name]}"
    eager = cluster.run(TRAIN, 4, argv=flags)
    captured = cluster.run(TRAIN, 4, argv=f"{flags} {GRAPH}")
    assert_replayed(captured, NUM_WARMUP_STEPS, 7)
    assert_same(captured, eager, *ALIKE)
    mine, theirs = (
        [line for line in run.logs[-1].splitlines() if "update RMS:" in line]
        for run in (captured, eager)
    )
    # Of the first iteration, of the warm-up, and of a replay; the captured one is not logged.
    assert mine == theirs and len(set(mine)) == 3
    if name != "logged":
        scaled = [int(line.split(" of ")[0].split()[-1]) for line in mine]
        assert max(scaled) > 0


def test_one_warmup_step_is_enough(cluster: Cluster) -> None:
    flags = f"{BASE} --bf16 --adams-bias-correction"
    captured = cluster.run(TRAIN, 2, argv=f"{flags} {GRAPH} --cuda-graph-warmup-steps 1")
    assert_replayed(captured, 1, 7)
    assert_same(captured, cluster.run(TRAIN, 2, argv=flags), *ALIKE)


def test_gradients_that_are_converted_are_kept_at_one_address(cluster: Cluster) -> None:
    flags = f"{BASE} --bf16"
    eager = cluster.run(TRAIN, 2, argv=flags, disturbance="reduce_in_bf16")
    captured = cluster.run(TRAIN, 2, argv=f"{flags} {GRAPH}", disturbance="reduce_in_bf16")
    assert_replayed(captured, NUM_WARMUP_STEPS, 7)
    assert_same(captured, eager, *ALIKE)
    # They are others than fp32 ones.
    fp32 = cluster.run(TRAIN, 2, argv=flags)
    assert eager.results[0]["grad_norms"] != fp32.results[0]["grad_norms"]


def test_parameters_with_a_norm_of_their_own(cluster: Cluster) -> None:
    flags = f"{BASE} --bf16 --clip-grad 0.5"
    setting = {"setting": "norm_group_of_its_own"}
    eager = cluster.run(TRAIN, 2, argv=flags, **setting)
    captured = cluster.run(TRAIN, 2, argv=f"{flags} {GRAPH}", **setting)
    assert_replayed(captured, NUM_WARMUP_STEPS, 7)
    assert_same(captured, eager, *ALIKE)


WITH_TE = ("bf16_dp2", "bf16_dp2_bias_correction", "remainders", "plain_bf16", "plain_fp32")


@pytest.mark.parametrize("name", thinned(WITH_TE, full=("bf16_dp2", "plain_fp32")))
def test_norm_that_megatron_keeps_on_the_device(te_cluster: Cluster, name: str) -> None:
    """With TransformerEngine, by whose functions Megatron takes the norm and, if need be, clips."""
    eager = te_cluster.run(TRAIN, 2, argv=RUNS[name])
    captured = te_cluster.run(TRAIN, 2, argv=f"{RUNS[name]} {GRAPH}")
    assert_replayed(captured, NUM_WARMUP_STEPS, 7)
    assert_same(captured, eager, *ALIKE)


SYNCS = {
    "read_the_norm": "aten::_local_scalar_dense",
    # Megatron's own norm, without TransformerEngine.
    "use_megatrons_norm": "aten::lift_fresh",
}


@pytest.mark.parametrize("disturbance", SYNCS)
def test_a_host_that_waits_in_the_step_ends_the_run(cluster: Cluster, disturbance: str) -> None:
    options: dict[str, Any] = {"disturbance": disturbance, "check": False, "timeout_s": 60}
    failed = cluster.run(TRAIN, 2, argv=f"{BASE} --bf16 {GRAPH}", **options)
    assert failed.codes == [1, 1]
    assert f"HostSyncError: {SYNCS[disturbance]} during the capture" in failed.log


def test_gradients_that_move_are_not_captured(cluster: Cluster) -> None:
    options: dict[str, Any] = {"disturbance": "forget_gradients", "check": False, "timeout_s": 60}
    failed = cluster.run(TRAIN, 2, argv=f"{BASE} --bf16 {GRAPH}", **options)
    assert failed.codes == [1, 1]
    assert "Take one step with the same tensors before the capture" in failed.log


RANKS_WITHOUT_PARAMS: dict[str, tuple[int, dict[str, Any]]] = {
    "frozen_stage": (2, {"pp_size": 2, "frozen_stages": [1]}),
    "frozen_stage_plain": (2, {"pp_size": 2, "frozen_stages": [1], "distributed": False}),
    # Three parameters at multiples of 64 in a bucket of 256.
    "small_model": (4, {"sizes": (4, 8)}),
}


@pytest.mark.parametrize("name", RANKS_WITHOUT_PARAMS)
def test_ranks_without_parameters_capture_with_the_others(cluster: Cluster, name: str) -> None:
    num_ranks, settings = RANKS_WITHOUT_PARAMS[name]
    eager, captured = (
        cluster.run(TRAIN_MODULE, num_ranks, captures=captures, num_steps=6, **settings)
        for captures in (False, True)
    )
    for mine, theirs in zip(captured.results, eager.results, strict=True):
        assert (mine["num_steps"], mine["num_replays"]) == (3, 4)
        assert (theirs["num_steps"], theirs["num_replays"]) == (6, 0)
        # A group counts where it is empty, too.
        assert mine["counts"] == theirs["counts"] == [6] * len(theirs["counts"])
        for param, tensor in theirs["params"].items():
            assert torch.equal(mine["params"][param], tensor), param
    assert 0 in [rank["state"] for rank in eager.results]


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bf16_dp2_bias_correction", "bf16_ep2", "remainders", "plain_bf16"]
)
def test_run_saved_between_replays_resumes_with_and_without_the_flag(
    cluster: Cluster, checkpoints: Path, name: str
) -> None:
    flags = f"{RUNS[name]} --train-iters 9 --lr-decay-iters 9 --cuda-graph-warmup-steps 1"
    whole = cluster.run(TRAIN, 2, argv=flags)
    save = f"--save {checkpoints} --save-interval 5 --exit-interval 5"
    cluster.run(TRAIN, 2, argv=f"{flags} {GRAPH} {save}")
    for graph in (GRAPH, ""):
        resumed = cluster.run(TRAIN, 2, argv=f"{flags} {graph} --load {checkpoints}")
        for rank in resumed.results:
            assert rank["counts"] == [9] * len(rank["counts"])
            assert len(rank["rates"]) == 4
        if graph:
            assert_replayed(resumed, 1, 4)
        assert_same(resumed, whole, *ALIKE, last=3)


def test_checkpoint_without_the_flag_resumes_with_it(cluster: Cluster, checkpoints: Path) -> None:
    flags = f"{RUNS['bf16_dp2_bias_correction']} --cuda-graph-warmup-steps 1"
    whole = cluster.run(TRAIN, 2, argv=flags)
    cluster.run(TRAIN, 2, argv=f"{flags} --save {checkpoints} --save-interval 3 --exit-interval 3")
    resumed = cluster.run(TRAIN, 2, argv=f"{flags} {GRAPH} --load {checkpoints}")
    assert_replayed(resumed, 1, 4)
    assert_same(resumed, whole, *ALIKE, last=3)


# --- refusals ----------------------------------------------------------------------------------


def test_weight_decay_that_changes_stops_the_run(cluster: Cluster) -> None:
    options: dict[str, Any] = {
        "disturbance": "change_weight_decay",
        "check": False,
        "timeout_s": 60,
    }
    failed = cluster.run(TRAIN, 2, argv=f"{BASE} --bf16 {GRAPH}", **options)
    assert failed.codes == [1, 1]
    for log in failed.logs:
        assert "with --optimizer-cuda-graph: must stay 0.1" in log.splitlines()[-1]


REFUSED = {
    "fp16": ("--fp16", "--fp16"),
    "loss_scale": ("--bf16 --loss-scale 128", "--loss-scale 128.0"),
    "num_zeros": ("--log-num-zeros-in-grad", "--log-num-zeros-in-grad"),
    "offload": (
        "--bf16 --use-precision-aware-optimizer --optimizer-cpu-offload",
        "--optimizer-cpu-offload",
    ),
    "weight_decay": (
        "--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1",
        "--start-weight-decay 0.01 --end-weight-decay 0.1",
    ),
    "warmup_steps": ("--cuda-graph-warmup-steps 0", "--cuda-graph-warmup-steps 0"),
    "timers": ("--timing-log-level 1", "--timing-log-level 1"),
    "rl": (
        "--rl-offload-optimizer-during-inference",
        "--rl-offload-optimizer-during-inference",
    ),
    "overlap": (
        "--overlap-param-gather --overlap-grad-reduce --overlap-param-gather-with-optimizer-step",
        "--overlap-param-gather-with-optimizer-step",
    ),
}


@pytest.fixture(scope="module")
def refused(cluster: Cluster) -> dict[str, str | None]:
    commands = [f"{BASE} {GRAPH} {flags}" for flags, _ in REFUSED.values()]
    answers = cluster.run(REFUSALS, 1, commands=commands).results[0]
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_at_start(
    refused: dict[str, str | None], name: str
) -> None:
    message = refused[name]
    assert message is not None
    assert message.startswith(f"{REFUSED[name][1]} with --optimizer-cuda-graph: ")
    assert "; must be" in message or "; give" in message or "; remove" in message


def test_norm_that_the_host_adds_up_is_refused(cluster: Cluster) -> None:
    flags = f"{PLAIN} --bf16 {EP2} --clip-grad 1.18"
    failed = cluster.run(TRAIN, 2, argv=f"{flags} {GRAPH}", check=False, timeout_s=60)
    assert failed.codes == [1, 1]
    for log in failed.logs:
        assert "--optimizer-cuda-graph with 2 optimizers that sum" in log.splitlines()[-1]
    assert cluster.run(TRAIN, 2, argv=flags).results[0]["counts"]


def test_model_is_looked_at_before_its_optimizer_is_built(cluster: Cluster) -> None:
    options: dict[str, Any] = {"setting": "params_quantized_in_8_bits", "check": False}
    failed = cluster.run(TRAIN, 2, argv=f"{BASE} --bf16 {GRAPH}", timeout_s=60, **options)
    assert failed.codes == [1, 1]
    for log in failed.logs:
        assert "fp8_param_gather with --optimizer-cuda-graph: not" in log.splitlines()[-1]


def test_constant_weight_decay_by_another_style_is_taken(cluster: Cluster) -> None:
    same = "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.1"
    answers = cluster.run(REFUSALS, 1, commands=[f"{BASE} {GRAPH} {same}", f"{BASE} {GRAPH}"])
    assert answers.results[0] == [None, None]
