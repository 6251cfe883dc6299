"""Passes that AdamS.step takes over from Megatron: same bits, and the gradients stay unwritten."""

import re
from typing import Any

import pytest

from tests.harness.argv import CLIPPED, EP2, FP16_GROWING, FP32_GRADS, UNCLIPPED
from tests.harness.cluster import Cluster, Outcome
from tests.harness.compare import assert_same
from tests.harness.thinning import thinned

HAS = "tests.distributed.version_cases:has"
TRAIN = "tests.distributed.fused_cases:train"
NORMS = "tests.distributed.fused_cases:unscaled_norms"
REFUSALS = "tests.distributed.flag_cases:refusals"
WITHOUT = "tests.distributed.fused_cases:register_without"

BASE = "--optimizer adams --use-distributed-optimizer --train-iters 5 --global-batch-size 4 "
PP2 = "--num-layers 4 --pipeline-model-parallel-size 2"

RUNS = {
    "bf16_dp2_clipped": f"--bf16 {CLIPPED}",
    "bf16_dp2_free": f"--bf16 {UNCLIPPED}",
    "fp32_dp2_clipped": CLIPPED,
    "fp16_dp2_clipped": f"{FP16_GROWING} {FP32_GRADS} {CLIPPED}",
    "fp16_dp2_free": f"{FP16_GROWING} {FP32_GRADS} {UNCLIPPED}",
    "fp16_tp2_clipped": f"{FP16_GROWING} {CLIPPED} --tensor-model-parallel-size 2",
    "bf16_vpp2_clipped": f"--bf16 --clip-grad 2.2 {PP2} --num-virtual-stages-per-pipeline-rank 2",
    "bf16_ep2_clipped": f"--bf16 --clip-grad 1.18 {EP2}",
    "fp16_ep2_clipped": f"{FP16_GROWING} {FP32_GRADS} --clip-grad 1.18 {EP2}",
}


# Everything that a step changes, and that is logged of it.
ALIKE = (
    *("losses", "grad_norms", "num_zeros", "skipped", "loss_scales", "changed"),
    *("model", "param", "state"),
)


def run(cluster: Cluster, flags: str, **options: Any) -> Outcome:
    return cluster.run(TRAIN, 2, argv=f"{BASE} {flags}", **options)


@pytest.mark.parametrize("name", thinned(RUNS, full=("bf16_dp2_clipped", "bf16_ep2_clipped")))
def test_fused_step_gives_the_bits_of_megatrons_passes(cluster: Cluster, name: str) -> None:
    fused = run(cluster, RUNS[name])
    own = run(cluster, RUNS[name], own_passes=True)
    assert_same(fused, own, *ALIKE)
    is_clipped, is_fp16 = UNCLIPPED not in RUNS[name], "--fp16" in RUNS[name]
    for mine, theirs in zip(fused.results, own.results, strict=True):
        if is_clipped:
            norms = [norm for norm in mine["grad_norms"] if norm is not None]
            clip_grad = float(re.findall(r"--clip-grad (\S+)", RUNS[name])[0])
            assert min(norms) < clip_grad < max(norms)
        # The experts' loss scale is one of its own in Megatron: it can come to differ.
        assert mine["grads_written"] == [len(set(scales)) > 1 for scales in mine["loss_scales"]]
        assert mine["grads_written"][0] is False
        assert any(mine["changed"])
        assert mine["disagreeing"] == [0] * 5
        # Megatron's passes are there, where they are not fused: the comparison is one.
        num_steps = 5 - sum(mine["skipped"])
        assert mine["copies"] == 0
        assert theirs["copies"] == num_steps * len(theirs["parts"])
        # In fp16 they are of an fp32 copy of the gradients, unless these are fp32.
        are_scaled = is_clipped or is_fp16
        are_fp32 = FP32_GRADS in RUNS[name] or not is_fp16
        assert any(theirs["grads_written"]) == (are_scaled and are_fp32)
        if is_fp16:
            assert 0 < sum(mine["skipped"]) < 5, mine["loss_scales"]
            assert len({scales[0] for scales in mine["loss_scales"]}) > 1
    assert (
        "gradients are clipped and unscaled in the step, model params are written in the step"
        in (fused.logs[0])
    )


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_fp16_overflow_on_one_rank_skips_the_step_on_all(cluster: Cluster, value: str) -> None:
    flags = f"--fp16 --initial-loss-scale 1024 {FP32_GRADS} {CLIPPED} --hysteresis 1"
    fused = run(cluster, flags, disturbance=value)
    for rank in fused.results:
        assert rank["skipped"] == [0, 0, 1, 0, 0]
        assert rank["changed"] == [True, True, False, True, True]
        assert rank["loss_scales"] == [[1024], [1024], [1024], [512], [512]]
        assert rank["grads_written"] == [False] * 5
    assert_same(fused, run(cluster, flags, disturbance=value, own_passes=True), *ALIKE)


def test_norm_that_stays_a_tensor(cluster: Cluster) -> None:
    flags = f"{FP16_GROWING} {FP32_GRADS} {CLIPPED}"
    fused = run(cluster, flags, setting="norm_as_tensor")
    assert_same(fused, run(cluster, flags, setting="norm_as_tensor", own_passes=True), *ALIKE)
    for rank in fused.results:
        assert rank["grads_written"] == [False] * 5 and rank["copies"] == 0


def test_parameters_with_a_norm_of_their_own_are_clipped_by_megatron(cluster: Cluster) -> None:
    if not cluster.run(HAS, attribute="grad_norm_group").results[0]:
        pytest.skip("this Megatron has one norm for all parameters (0.18)")
    flags = f"{FP16_GROWING} {FP32_GRADS} --clip-grad 0.5"
    fused = run(cluster, flags, setting="norm_group_of_its_own")
    own = run(cluster, flags, setting="norm_group_of_its_own", own_passes=True)
    assert_same(fused, own, *ALIKE)
    # They do count: with one norm for all, clipping is another.
    assert fused.results[0]["grad_norms"] != run(cluster, flags).results[0]["grad_norms"]
    assert any(any(rank["grads_written"]) for rank in fused.results)
    assert not any(rank["copies"] for rank in fused.results)


REASONS = {
    "num_zeros": (f"--bf16 {CLIPPED} --log-num-zeros-in-grad", "zeros of scaled gradients"),
    "loss_scale": (f"--fp16 --loss-scale 1000 {FP32_GRADS} {CLIPPED}", "not a power of two"),
}


@pytest.mark.parametrize("name", REASONS)
def test_megatron_scales_the_gradients_where_something_needs_it(
    cluster: Cluster, name: str
) -> None:
    flags, reason = REASONS[name]
    kept = run(cluster, flags)
    own = run(cluster, flags, own_passes=True)
    assert_same(kept, own, *ALIKE)
    for mine, theirs in zip(kept.results, own.results, strict=True):
        assert any(mine["grads_written"]) and mine["grads_written"] == theirs["grads_written"]
        assert mine["copies"] == 0
    (line,) = re.findall(r"gradients are clipped and unscaled .*", kept.log)
    assert reason in line
    if name == "num_zeros":
        assert all(rank["num_zeros"] != [0] * 5 for rank in kept.results)


@pytest.mark.parametrize("bits", [8, 4])
def test_megatron_writes_quantized_params(cluster: Cluster, bits: int) -> None:
    setting = f"params_quantized_in_{bits}_bits"
    outcome = cluster.run(TRAIN, 1, argv=f"{BASE} --bf16 {CLIPPED}", setting=setting)
    rank = outcome.results[0]
    assert rank["copies"] == 5 and rank["grads_written"] == [False] * 5
    assert "model params are written by Megatron (the model params are quantized" in outcome.log


def test_norm_of_scaled_gradients_is_unscaled_to_the_last_bit(cluster: Cluster) -> None:
    num_norms = 6000  # of which a plain product gets some wrong
    norms = cluster.run(NORMS, 1, num_norms=num_norms).results[0]
    assert len(norms) == num_norms
    assert [pair for pair in norms if pair[0] != pair[1]] == []


def test_step_that_is_skipped_for_its_norm_changes_nothing(cluster: Cluster) -> None:
    if not cluster.run(HAS, attribute="grad_norm_skip_threshold").results[0]:
        pytest.skip("this Megatron skips no step for its norm (up to 0.17)")
    rank = cluster.run(TRAIN, 1, argv=f"{BASE} --bf16 {CLIPPED}", disturbance="skip").results[0]
    assert rank["skipped"] == [0, 0, 1, 1, 1]
    assert rank["changed"] == [True, True, False, False, False]
    assert rank["grads_written"] == [False] * 5


def test_step_that_fails_leaves_nothing_behind(cluster: Cluster) -> None:
    flags = f"--fp16 --initial-loss-scale 1024 {FP32_GRADS} {CLIPPED}"
    failed = run(cluster, flags, disturbance="fail")
    for rank in failed.results:
        (told,) = rank["told"]
        assert told.pop("raised") == "HalfWayError"
        assert told == dict.fromkeys(("norm", "clipped", "unscaled", "copied"), True)
    # And the step can be taken again.
    assert_same(failed, run(cluster, flags), *ALIKE)


def test_main_params_that_were_moved_still_reach_the_model(cluster: Cluster) -> None:
    for flags in ("", "--bf16"):
        moved = run(cluster, f"{flags} {CLIPPED}", disturbance="move")
        for rank in moved.results:
            assert rank["disagreeing"] == [0] * 5
            # An fp32 main param is the model's own memory, until it is moved.
            assert rank["copies"] == (0 if flags else 3)
        assert_same(moved, run(cluster, f"{flags} {CLIPPED}"), *ALIKE)


def test_kernel_flag_reaches_the_optimizer(cluster: Cluster) -> None:
    argv = f"{BASE} --bf16 {CLIPPED} --train-iters 2"
    asked = cluster.run(TRAIN, 1, argv=f"{argv} --adams-kernel foreach").results[0]
    auto = cluster.run(TRAIN, 1, argv=argv).results[0]
    assert asked["kernels"] == ["foreach"] and auto["kernels"] == ["auto"]
    assert asked["losses"] == auto["losses"]


def test_kernel_flag_is_refused_with_another_optimizer(cluster: Cluster) -> None:
    commands = [f"--optimizer {name} --adams-kernel host" for name in ("adam", "sgd")]
    messages = cluster.run(REFUSALS, 1, commands=commands).results[0]
    for name, message in zip(("adam", "sgd"), messages, strict=True):
        assert message is not None
        assert message.startswith(f"--adams-kernel host with --optimizer {name}:")


@pytest.mark.parametrize("name", ["clip_grad_by_total_norm_fp32", "get_grad_norm_fp32"])
def test_megatron_without_the_functions_of_gradients_is_refused(
    plain_cluster: Cluster, name: str
) -> None:
    path = f"megatron.core.optimizer.clip_grads.{name}"
    told = plain_cluster.run(WITHOUT, dotted_path=path).results[0]
    kind, message = told["error"]
    assert kind == "UnsupportedMegatronError" and message.startswith(f"{path}: not found")
    assert told["wrapped"] == []
