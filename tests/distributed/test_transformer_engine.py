"""Where Megatron finds TransformerEngine: its Python code over a stand-in for its kernels.

What the plugin does with TransformerEngine's classes, and what TransformerEngine's FusedAdam does
in its place. The numbers of TransformerEngine's kernels, and its layers, need a GPU: tests/gpu.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.argv import (
    AWARE,
    DISTRIBUTED,
    FAMILIES,
    FP16,
    FP16_SKIPPING,
    MODES,
    SAVED_AT,
    STEPS,
    UNCLIPPED,
    choose,
)
from tests.harness.cluster import Cluster
from tests.harness.compare import assert_continues, assert_same, shards
from tests.harness.thinning import thinned
from tests.kernels.quantized import STEPS as QUANTIZED_STEPS
from tests.kernels.quantized import check_steps

TRAIN = "tests.distributed.cases:train"
FUSED = "tests.distributed.fused_cases:train"
SIGNATURES = "tests.distributed.te_cases:signatures"
INITIALIZED = "tests.distributed.te_cases:initialized"
TRAIN_ADAM = "tests.distributed.te_cases:train_fused_adam"
TAKE_STEPS = "tests.kernels.quantized:take_steps"
REFUSAL = "tests.distributed.te_cases:refusal_of_quantized_params"
TRAIN_QUANTIZED = "tests.distributed.te_cases:train_quantized"

DTYPES = {
    "fp32": "",
    "bf16": "--bf16",
    "fp16": FP16_SKIPPING,
}
# The norm of the gradients is a tensor there, so that the coefficient that clips them is computed
# in fp32, not in double: it can differ in its last bit.
# TransformerEngine's final norm has an (empty) entry of its own in torch_dist checkpoints.
CROSSING = f"{UNCLIPPED} --dist-ckpt-strictness log_unexpected"


# All but the norms, and all state as it is stored.
ALIKE = ("losses", "skipped", "model", "classes", "groups", "param", "state")
# The root of the norm is taken otherwise.
NORM_RTOL = 3e-7


# Without quantized params


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_has_the_bits_of_one_without_transformer_engine(
    cluster: Cluster, te_cluster: Cluster, dtype: str
) -> None:
    argv = f"{DISTRIBUTED} {DTYPES[dtype]} {UNCLIPPED} --train-iters 6"
    mine, theirs = te_cluster.run(TRAIN, 2, argv=argv), cluster.run(TRAIN, 2, argv=argv)
    assert_same(mine, theirs, *ALIKE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_clipped_run_is_that_without_transformer_engine(
    cluster: Cluster, te_cluster: Cluster, dtype: str
) -> None:
    argv = f"{DISTRIBUTED} {DTYPES[dtype]} --clip-grad 0.5 --train-iters 6"
    mine, theirs = te_cluster.run(TRAIN, 2, argv=argv), cluster.run(TRAIN, 2, argv=argv)
    # A last bit of the clip coefficient, and in bf16 what it moves over a rounding boundary.
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    for my_rank, their_rank in zip(mine.results, theirs.results, strict=True):
        assert min(their_rank["grad_norms"]) > 0.5
        np.testing.assert_allclose(my_rank["grad_norms"], their_rank["grad_norms"], rtol=tolerance)
        for my_shard, their_shard in zip(shards(my_rank), shards(their_rank), strict=True):
            expected = their_shard["exp_avg"]
            assert (my_shard["exp_avg"] - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_step_equals_megatrons_own_passes(te_cluster: Cluster, dtype: str) -> None:
    """Its passes by TransformerEngine's functions, with the clip coefficient in a tensor."""
    argv = f"{DISTRIBUTED} {DTYPES[dtype]} --clip-grad 0.5 --train-iters 6"
    fused, own = (
        te_cluster.run(FUSED, 2, argv=argv, own_passes=own_passes) for own_passes in (False, True)
    )
    assert_same(fused, own, *ALIKE)
    for fused_rank, own_rank in zip(fused.results, own.results, strict=True):
        assert fused_rank["copies"] == 0 < own_rank["copies"]
        assert fused_rank["grad_norms"] == own_rank["grad_norms"]


@pytest.mark.parametrize("family", thinned(["dp2", "dp2_legacy", "plain"], full=["dp2_legacy"]))
def test_checkpoint_crosses_between_worlds_with_and_without_transformer_engine(
    cluster: Cluster, te_cluster: Cluster, tmp_path: Path, family: str
) -> None:
    base = f"{FAMILIES[family]} {CROSSING} {STEPS}"
    without, within = tmp_path / "without", tmp_path / "with"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --save {without}").results
    run = te_cluster.run(TRAIN, 2, argv=f"{base} --save {within}")
    assert_continues(run, whole, 0, norm_rtol=NORM_RTOL)
    for there, saved in ((te_cluster, without), (cluster, within)):
        run = there.run(TRAIN, 2, argv=f"{base} {choose(saved, SAVED_AT)}")
        assert_continues(run, whole, norm_rtol=NORM_RTOL)


# Beside FusedAdam


def test_constructor_takes_the_arguments_of_fused_adam(te_cluster: Cluster) -> None:
    (told,) = te_cluster.run(SIGNATURES).results
    mine, theirs = told["AdamS"], told["FusedAdam"]
    own = {"kernel", "max_update_rms", "match_update_rms", "nesterov", "cautious"}
    torchs = {"maximize", "foreach", "fused", "differentiable"}
    assert mine.keys() - theirs.keys() == {*own, *torchs}
    assert theirs.keys() <= mine.keys()
    differing = {name for name in theirs if mine[name] != theirs[name]}
    # betas and bias_correction: AdamS's own defaults; amsgrad: by name only.
    assert differing == {"betas", "bias_correction", "amsgrad"}
    assert list(mine)[:5] == list(theirs)[:5]


def test_adam_is_fused_adam_and_trains_as_torchs(cluster: Cluster, te_cluster: Cluster) -> None:
    """The peer that AdamS takes the place of: TransformerEngine's class, over the stand-in."""
    argv = f"--optimizer adam --use-distributed-optimizer {UNCLIPPED} --train-iters 6"
    mine, theirs = te_cluster.run(TRAIN_ADAM, 2, argv=argv), cluster.run(TRAIN, 2, argv=argv)
    for my_rank, their_rank in zip(mine.results, theirs.results, strict=True):
        (part,) = my_rank["parts"]
        assert part["class"] == "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"
        assert part["dtypes"].keys() == {"exp_avg", "exp_avg_sq"}
        np.testing.assert_allclose(my_rank["losses"], their_rank["losses"], rtol=1e-5)


STORAGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "remainder": {"master_weights": True, "store_param_remainders": True},
    "master": {"master_weights": True},
    "w16_m16": {
        "master_weights": True,
        "master_weight_dtype": "float16",
        "exp_avg_dtype": "float16",
    },
    "m16": {"exp_avg_dtype": "bfloat16"},
    "m8": {"exp_avg_dtype": "uint8"},
}


@pytest.mark.parametrize("storage", STORAGE)
def test_state_is_that_of_fused_adam_without_exp_avg_sq(te_cluster: Cluster, storage: str) -> None:
    (told,) = te_cluster.run(INITIALIZED, **STORAGE[storage]).results
    mine, theirs = told["AdamS"], told["FusedAdam"]
    assert theirs.keys() - mine.keys() == {"exp_avg_sq"}
    for name, state in mine.items():
        assert state["dtype"] == theirs[name]["dtype"], name
        full, their_full = state["full"], theirs[name]["full"]
        assert full.dtype == torch.float32
        if state["dtype"] == "torch.int16":
            # FusedAdam gives the remainders, zeros of a bf16 param; AdamS what they make up.
            assert not their_full.any()
            assert torch.equal(full, told["param"].float())
        elif state["dtype"] == "torch.float16":
            # The scales differ: FusedAdam's is no power of two, so that it rounds.
            np.testing.assert_allclose(full, their_full, rtol=2**-10)
        else:
            assert torch.equal(full, their_full)


@pytest.mark.parametrize("mode", ["remainder_m16", "fp16_w16_m8"])
def test_precision_aware_run_has_the_bits_of_one_without_transformer_engine(
    cluster: Cluster, te_cluster: Cluster, mode: str
) -> None:
    argv = f"{AWARE} {MODES[mode][0]} {UNCLIPPED} --train-iters 4"
    mine, theirs = te_cluster.run(TRAIN, 2, argv=argv), cluster.run(TRAIN, 2, argv=argv)
    assert_same(mine, theirs, *ALIKE)
    for rank in mine.results:
        for shard in shards(rank):
            assert shard["bytes_per_param"] == MODES[mode][1]


FUSED_ADAM_DTYPES = {
    "remainder_m16": {"exp_avg": "torch.bfloat16", "master_param": "torch.int16"},
    "fp16_w16_m8": {"exp_avg": "torch.uint8", "master_param": "torch.float16"},
}


@pytest.mark.parametrize("mode", FUSED_ADAM_DTYPES)
def test_precision_aware_adam_keeps_its_state_in_the_same_dtypes(
    te_cluster: Cluster, mode: str
) -> None:
    flags = f"--use-distributed-optimizer --use-precision-aware-optimizer {MODES[mode][0]}"
    run = te_cluster.run(TRAIN_ADAM, 2, argv=f"--optimizer adam {flags} --train-iters 4")
    ours = te_cluster.run(TRAIN, 2, argv=f"--optimizer adams {flags} --train-iters 4")
    for rank, our_rank in zip(run.results, ours.results, strict=True):
        assert rank["losses"][-1] < rank["losses"][0]
        (part,) = rank["parts"]
        dtypes = {name: dtype for name, (dtype,) in part["dtypes"].items()}
        assert dtypes == {**FUSED_ADAM_DTYPES[mode], "exp_avg_sq": "torch.float32"}
        for shard in shards(our_rank):
            state = {name: str(tensor.dtype) for name, tensor in shard["state"].items()}
            assert state == FUSED_ADAM_DTYPES[mode]


AWARE_FAMILIES = {
    "remainder_m16": f"{AWARE} --bf16 --exp-avg-dtype bf16",
    "remainder_m16_legacy": f"{AWARE} --bf16 --exp-avg-dtype bf16 --ckpt-format torch",
    "fp16_w16_m8": f"{AWARE} {FP16} --main-params-dtype fp16 --exp-avg-dtype fp8",
}


@pytest.mark.parametrize("family", AWARE_FAMILIES)
def test_precision_aware_checkpoint_crosses_between_worlds(
    cluster: Cluster, te_cluster: Cluster, tmp_path: Path, family: str
) -> None:
    base = f"{AWARE_FAMILIES[family]} {CROSSING} {STEPS}"
    without, within = tmp_path / "without", tmp_path / "with"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --save {without}").results
    te_cluster.run(TRAIN, 2, argv=f"{base} --save {within}")
    resumed = [
        there.run(TRAIN, 2, argv=f"{base} {choose(saved, SAVED_AT)}")
        for there, saved in ((te_cluster, without), (cluster, within))
    ]
    for run in resumed:
        assert_continues(run, whole, what=("main_param", "exp_avg"), norm_rtol=NORM_RTOL)


# Quantized params


# TransformerEngine dequantizes an mxfp8 tensor of the CPU on the GPU: in tests/gpu.
@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED_STEPS if kind != "mxfp8"])
def test_step_quantizes_its_master_weights(te_cluster: Cluster, kind: str) -> None:
    arguments = QUANTIZED_STEPS[kind]
    (steps,) = te_cluster.run(TAKE_STEPS, **arguments).results
    check_steps(steps, arguments["recipe"])


def test_quantized_param_without_master_weights_is_refused(te_cluster: Cluster) -> None:
    (refusal,) = te_cluster.run(REFUSAL).results
    assert "(128, 128)" in refusal and "master_weights=True" in refusal


def to_e4m3(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


DELAYED: dict[str, dict[str, Any]] = {
    # The peer, in Megatron's own pass.
    "adam": {"optimizer": "adam"},
    "adams": {},
    "adams_m16": {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"},
    "adams_w16_m8": {
        "use_precision_aware_optimizer": True,
        "main_params_dtype": "float16",
        "exp_avg_dtype": "uint8",
    },
}


@pytest.mark.parametrize("mode", DELAYED)
def test_delayed_scaling_writes_params_amax_and_scale_inv(te_cluster: Cluster, mode: str) -> None:
    """By Megatron's pass over fp32 main params, and by the step where it keeps them itself."""
    ranks = te_cluster.run(TRAIN_QUANTIZED, 2, recipe="delayed", **DELAYED[mode]).results
    is_inside = "use_precision_aware_optimizer" in DELAYED[mode]
    for rank in ranks:
        assert rank["classes"] == ("FusedAdam" if mode == "adam" else "AdamS", "Float8Tensor")
        assert max(rank["grad_norms"]) < 2 and len(rank["steps"]) == 6
    scales = set()
    for steps in zip(*(rank["steps"] for rank in ranks), strict=True):
        for name in ("weight", "inner"):
            looked = [step[name] for step in steps]
            (scale,) = {weight["scale"] for weight in looked}
            scales.add(scale)
            main = looked[0]["main"]
            # Megatron's pass rounds to bf16 first, FusedAdam's kernel and AdamS's do not.
            main = main if is_inside else main.bfloat16().float()
            # Of fp16 main params the step knows more bits than it keeps.
            kept_bits = 2**-3 if mode == "adams_w16_m8" else 0
            for weight in looked:
                assert weight["scale_inv"] == float(1 / torch.tensor(scale))
                if kept_bits:
                    values = to_e4m3(main * scale).view(torch.float8_e4m3fn).float() / scale
                    np.testing.assert_allclose(weight["full"], values, rtol=kept_bits, atol=1e-5)
                else:
                    assert torch.equal(weight["data"], to_e4m3(main * scale))
                part = main.flatten()[slice(*weight["shard"])] if is_inside else main
                expected = float(part.abs().max()) if part.numel() else 0.0
                assert weight["amax"] == pytest.approx(expected, rel=2**-10 if kept_bits else 0)
            assert torch.equal(looked[0]["data"], looked[1]["data"])
    # They follow the magnitudes: scale_inv is not that of the start.
    assert len(scales) > 2


RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {},
    "blockwise": {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"},
    "mxfp8": {"reuse_grad_buf": True},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_model_params_are_the_quantized_main_params(te_cluster: Cluster, recipe: str) -> None:
    ranks = te_cluster.run(TRAIN_QUANTIZED, 2, recipe=recipe, **RECIPES[recipe]).results
    for rank in ranks:
        assert rank["classes"][0] == "AdamS"
        assert rank["grad_norms"][-1] < rank["grad_norms"][0]
        for step in rank["steps"]:
            for weight in step.values():
                assert torch.equal(weight["full"], weight["again"])
    assert "exp_avg" in ranks[0]["steps"][0]["weight"]["dtypes"]


RESUMED: dict[str, dict[str, Any]] = {
    "delayed": {"recipe": "delayed"},
    "delayed_m16": {"recipe": "delayed", **DELAYED["adams_m16"]},
    "delayed_w16_m8": {"recipe": "delayed", **DELAYED["adams_w16_m8"]},
    "tensorwise": {"recipe": "tensorwise"},
    "blockwise_m16": {"recipe": "blockwise", **RECIPES["blockwise"]},
}


@pytest.mark.parametrize("mode", thinned(RESUMED, full=("delayed_m16",)))
def test_resumed_run_with_quantized_params_equals_uninterrupted_one(
    te_cluster: Cluster, checkpoints: Path, mode: str
) -> None:
    fields = RESUMED[mode]
    whole = te_cluster.run(TRAIN_QUANTIZED, 2, save=str(checkpoints), **fields).results
    resumed = te_cluster.run(TRAIN_QUANTIZED, 2, load=str(checkpoints), **fields).results
    for mine, theirs in zip(resumed, whole, strict=True):
        assert len(mine["steps"]) == 3
        assert mine["grad_norms"] == theirs["grad_norms"][3:]
        for my_step, their_step in zip(mine["steps"], theirs["steps"][3:], strict=True):
            for name, weight in their_step.items():
                assert my_step[name].keys() == weight.keys()
                for key, value in weight.items():
                    np.testing.assert_array_equal(my_step[name][key], value, err_msg=key)
        for name, tensor in theirs["end"].items():
            assert torch.equal(mine["end"][name], tensor), name
