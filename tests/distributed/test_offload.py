"""--optimizer-cpu-offload: AdamS on the CPU and on the GPU, in Megatron's HybridDeviceOptimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.module_runs import assert_loaded
from tests.harness.argv import (
    AWARE,
    EP2,
    FP16_GROWING,
    FP16_SKIPPING,
    FP32_GRADS,
    NUM_STEPS,
    SAVED_AT,
    STEPS,
    TP2,
    choose,
    folder_of,
)
from tests.harness.cluster import Cluster
from tests.harness.compare import assert_continues, assert_same, assert_same_tensors, shards
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.cases:train"
OFFLOADED = "tests.distributed.offload_cases:train"
LOAD = "tests.distributed.cases:load_plain"
COMMON = "tests.distributed.checkpoint_cases:read_common"
MODULE = "tests.distributed.module_cases:train"
QUANTIZED = "tests.distributed.fused_cases:train"
WITHOUT = "tests.distributed.register_cases:register_without"
HALFWAY = "tests.distributed.precision_cases:params_after_load_halfway"
RELOADING = "tests.distributed.precision_cases:train_reloading"

VALUES = ("main_param", "exp_avg")
ALIKE = ("losses", "grad_norms", "model", *VALUES)
ALL = "--optimizer-cpu-offload"
HALF = f"{ALL} --optimizer-offload-fraction 0.5"
OVERLAP = "--overlap-cpu-optimizer-d2h-h2d"
# Of five steps some are clipped, and some are not.
CLIPPED = "--train-iters 5 --global-batch-size 4 --clip-grad 1.7"
MASTERS = "--adams-no-param-remainders"
GRADS_16 = "--main-grads-dtype bf16 --exp-avg-dtype bf16"

RUNS = {
    "fp32": ("", ALL),
    "fp32_half": ("", HALF),
    "bf16_half_overlapped": ("--bf16", f"{HALF} {OVERLAP}"),
    "bf16_masters": (f"--bf16 {MASTERS}", f"{ALL} {OVERLAP}"),
    "bf16_grads_and_exp_avg_half": (f"--bf16 {GRADS_16}", HALF),
    "bf16_fp16_masters_fp8_exp_avg": (
        "--bf16 --main-params-dtype fp16 --exp-avg-dtype fp8",
        f"{HALF} {OVERLAP}",
    ),
    "bf16_scaled_by_megatron": ("--bf16 --log-num-zeros-in-grad", HALF),
    "fp16_half": (f"{FP16_GROWING} {FP32_GRADS}", HALF),
    "bf16_tp2": (f"--bf16 {TP2}", HALF),
    "bf16_ep2": (f"--bf16 {EP2} --clip-grad 1.18", HALF),
    # Every step has a learning rate and a bias correction of its own.
    "bf16_bias_correction_warmup": (
        "--bf16 --adams-bias-correction --lr-warmup-iters 3 --lr-decay-style linear "
        "--start-weight-decay 0.01 --end-weight-decay 0.2 --weight-decay-incr-style linear",
        HALF,
    ),
}


@pytest.mark.parametrize("name", thinned(RUNS, full=("fp32", "bf16_half_overlapped", "bf16_tp2")))
def test_offloading_changes_no_bit(cluster: Cluster, name: str) -> None:
    flags, offload = RUNS[name]
    base = f"{AWARE} {CLIPPED} {flags}"
    off = cluster.run(TRAIN, 2, argv=base)
    on = cluster.run(OFFLOADED, 2, argv=f"{base} {offload}")
    # As many bytes, in other memory, and nothing beside them.
    assert_same(on, off, *ALIKE, "skipped", "num_zeros", "groups", "bytes_per_param")
    for mine, theirs in zip(on.results, off.results, strict=True):
        for my_part in mine["parts"]:
            assert my_part["classes"] == ("AdamSDistributedOptimizer", "HybridAdamS")
        for hybrid in mine["offload"]:
            homes = {home for _, home in hybrid["params"]}
            assert homes == ({"cpu", "gpu"} if offload.startswith(HALF) else {"cpu"})
            assert hybrid["classes"] == {"AdamS"}
            assert hybrid["detached"] and hybrid["equal"]
            num_copies = [home for _, home in hybrid["params"]].count("cpu")
            assert hybrid["num_cpu_optimizers"] == (num_copies if OVERLAP in offload else 1)
            kept = {torch.bfloat16 if GRADS_16 in flags else torch.float32}
            assert hybrid["grad_dtypes"] == kept
            names = {key for shard in shards(theirs) for key in shard["state"]}
            assert hybrid["state_keys"] <= names
            assert hybrid["saved_state"] == {}
        norms = [norm for norm in mine["grad_norms"] if norm is not None]
        clip_grad = 1.18 if EP2 in flags else 1.7
        assert min(norms) < clip_grad < max(norms)
    if FP16_GROWING in flags:
        assert 0 < sum(on.results[0]["skipped"]) < 5
    where = (
        "by Megatron" if "by_megatron" in name else "in the step, model params are written in the"
    )
    assert f"gradients are clipped and unscaled {where}" in on.logs[0]
    num_offloaded = sum(
        n for h in on.results[0]["offload"] for n, home in h["params"] if home == "cpu"
    )
    assert f"parameters of this rank, {num_offloaded} of them on the CPU;" in on.logs[0]


def test_scheduler_reaches_both_sides_at_each_step(cluster: Cluster) -> None:
    flags, offload = RUNS["bf16_bias_correction_warmup"]
    rank = cluster.run(OFFLOADED, 1, argv=f"{AWARE} {CLIPPED} {flags} {offload}").results[0]
    num_params = len(rank["offload"][0]["params"])
    assert len(rank["rates"]) == 5 * num_params
    steps = [rank["rates"][i : i + num_params] for i in range(0, 5 * num_params, num_params)]
    assert [{step for _, _, step in rates} for rates in steps] == [{0}, {1}, {2}, {3}, {4}]
    assert len({lr for rates in steps for lr, _, _ in rates}) == 5
    for rates in steps:
        assert len({lr for lr, _, _ in rates}) == 1
        # Of biases and norms it is 0.
        assert len({decay for _, decay, _ in rates}) == 2


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_fraction_is_that_of_params_updated_on_the_cpu(cluster: Cluster, fraction: float) -> None:
    flags = f"--train-iters 1 --bf16 {ALL} --optimizer-offload-fraction {fraction}"
    (hybrid,) = cluster.run(OFFLOADED, 1, argv=f"{AWARE} {flags}").results[0]["offload"]
    sizes = {home: [n for n, at in hybrid["params"] if at == home] for home in ("cpu", "gpu")}
    total = sum(sum(own) for own in sizes.values())
    # The fewest params that make up the fraction: without the last one it is not reached.
    assert sum(sizes["cpu"]) >= fraction * total
    assert sum(sizes["cpu"][:-1]) < fraction * total
    assert bool(sizes["gpu"]) == (fraction < 1)


def test_cpu_waits_for_its_gradients_and_the_gpu_steps_meanwhile(cluster: Cluster) -> None:
    flags = f"--train-iters 1 --bf16 {HALF} {OVERLAP}"
    rank = cluster.run(OFFLOADED, 1, argv=f"{AWARE} {flags}").results[0]
    num_copies = rank["offload"][0]["num_cpu_optimizers"]
    each = ["synchronize", "cpu step"]
    assert rank["order"] == ["d2h waits", "copies", "gpu step", *each * num_copies]


@pytest.mark.parametrize(
    ("flags", "params", "grads"),
    [("", True, True), ("--no-pin-cpu-grads", True, False), ("--no-pin-cpu-params", False, True)],
)
def test_host_memory_is_pinned_as_the_flags_say(
    cluster: Cluster, flags: str, params: bool, grads: bool
) -> None:
    rank = cluster.run(OFFLOADED, 1, argv=f"{AWARE} --train-iters 1 {ALL} {flags}").results[0]
    of_params, of_grads = rank["pinned"]
    num_params = len(rank["offload"][0]["params"])
    assert of_params == [params] * num_params
    assert of_grads == [grads] * num_params


@pytest.mark.parametrize(
    ("asked", "cpu", "gpu"),
    [("auto", "auto", "auto"), ("host", "host", "auto"), ("foreach", "foreach", "foreach")],
)
def test_kernel_flag_reaches_the_side_that_it_is_for(
    cluster: Cluster, asked: str, cpu: str, gpu: str
) -> None:
    argv = f"{AWARE} --train-iters 2 {HALF} --adams-kernel {asked}"
    (hybrid,) = cluster.run(OFFLOADED, 1, argv=argv).results[0]["offload"]
    assert hybrid["kernels"] == {"cpu": {cpu}, "gpu": {gpu}}


# Checkpoints

FORMATS = {
    "dp_reshardable": "",
    "fully_reshardable": "--dist-ckpt-optim-fully-reshardable",
    "torch": "--ckpt-format torch",
}
SAVED_MODES = {
    "remainders": "--bf16",
    "masters": f"--bf16 {MASTERS}",
    "fp32": "",
    "fp16": FP16_SKIPPING,
}


@pytest.mark.parametrize(
    ("mode", "kind"),
    thinned(
        [
            ("remainders", "dp_reshardable"),
            ("remainders", "fully_reshardable"),
            ("masters", "torch"),
            ("fp32", "dp_reshardable"),
            ("fp16", "fully_reshardable"),
        ],
        full=[("remainders", "dp_reshardable")],
    ),
)
def test_resumed_run_equals_uninterrupted_one(
    cluster: Cluster, checkpoints: Path, mode: str, kind: str
) -> None:
    """Whether it goes on offloading, or not."""
    base = f"{AWARE} {SAVED_MODES[mode]} {FORMATS[kind]} --adams-bias-correction {STEPS}"
    whole = cluster.run(TRAIN, 2, argv=f"{base} {HALF} --save {checkpoints}")
    for offload in (HALF, ""):
        load = choose(checkpoints, SAVED_AT)
        assert_continues(cluster.run(TRAIN, 2, argv=f"{base} {offload} {load}"), whole, what=VALUES)
    if mode == "fp16":
        assert {0, 1} == set(whole.results[0]["skipped"][:SAVED_AT])


@pytest.mark.parametrize(("mode", "kind"), [("remainders", "dp_reshardable"), ("masters", "torch")])
def test_run_offloads_from_a_checkpoint_on(
    cluster: Cluster, checkpoints: Path, mode: str, kind: str
) -> None:
    base = f"{AWARE} {SAVED_MODES[mode]} {FORMATS[kind]} {STEPS}"
    whole = cluster.run(TRAIN, 2, argv=f"{base} --save {checkpoints}")
    load = choose(checkpoints, SAVED_AT)
    assert_continues(
        cluster.run(TRAIN, 2, argv=f"{base} {ALL} {OVERLAP} {load}"), whole, what=VALUES
    )


@pytest.mark.parametrize("kind", ["dp_reshardable", "fully_reshardable"])
def test_checkpoint_is_the_one_of_a_run_without_offloading(
    cluster: Cluster, tmp_path: Path, kind: str
) -> None:
    base = f"{AWARE} --bf16 {FORMATS[kind]} --train-iters 2 --save {tmp_path}"
    saved = []
    for name, offload in (("off", ""), ("on", HALF)):
        cluster.run(TRAIN, 2, argv=f"{base}/{name} {offload}")
        folder = folder_of(tmp_path / name, 2)
        tensors = cluster.run(LOAD, 1, checkpoint=folder).results[0]
        common = cluster.run(COMMON, 1, checkpoint=folder).results[0]
        saved.append((tensors, common))
    (off, off_common), (on, on_common) = saved
    assert off.keys() == on.keys() and off
    for key, tensor in off.items():
        assert torch.equal(on[key], tensor), key
    assert on_common["keys"] == off_common["keys"]
    # No class of a sub-optimizer and no flag of Megatron's hybrid optimizer is in the groups.
    assert on_common.get("optimizer") == off_common.get("optimizer")


def test_resharded_run_continues_with_the_bits_of_one_without_offloading(
    cluster: Cluster, checkpoints: Path
) -> None:
    base = f"{AWARE} --bf16 {FORMATS['fully_reshardable']} {STEPS}"
    cluster.run(TRAIN, 2, argv=f"{base} {HALF} {TP2} --save {checkpoints}")
    load = choose(checkpoints, SAVED_AT)
    off, on = (cluster.run(TRAIN, 2, argv=f"{base} {offload} {load}") for offload in ("", HALF))
    assert_same(on, off, *ALIKE)
    assert len(on.results[0]["grad_norms"]) == NUM_STEPS - SAVED_AT


@pytest.mark.parametrize("mode", thinned(["fp32", "remainders", "masters"], full=("masters",)))
def test_weights_alone_are_taken_over_on_the_cpu(
    cluster: Cluster, checkpoints: Path, mode: str
) -> None:
    """--finetune: of another checkpoint the CPU copies have to be, too."""
    base = f"{AWARE} {SAVED_MODES[mode]}"
    cluster.run(TRAIN, 2, argv=f"{base} --lr 1e-2 --train-iters 3 --save {checkpoints}")
    flags = f"{base} --train-iters 2 --finetune --load {checkpoints}"
    off, on = (cluster.run(TRAIN, 2, argv=f"{flags} {offload}") for offload in ("", HALF))
    assert_same(on, off, *ALIKE)
    fresh = cluster.run(TRAIN, 2, argv=f"{base} --train-iters 2").results[0]
    assert on.results[0]["losses"][0] != fresh["losses"][0]


@pytest.mark.parametrize("mode", ["remainders", "masters"])
def test_reloaded_model_params_become_main_params(cluster: Cluster, mode: str) -> None:
    """After a step, when there is state."""
    flags = f"{AWARE} {SAVED_MODES[mode]} --train-iters 3"
    off, on = (cluster.run(RELOADING, 2, argv=f"{flags} {offload}") for offload in ("", HALF))
    assert on.results[0]["reloaded"] and all(on.results[0]["reloaded"])
    assert_same(on, off, *ALIKE)


def test_params_that_loading_has_changed_are_changed_on_the_gpu(
    cluster: Cluster, checkpoints: Path
) -> None:
    """Main params half way between two bf16 numbers: their remainders round params otherwise."""
    base = f"{AWARE} --bf16 --train-iters 1"
    cluster.run(TRAIN, 2, argv=f"{base} --save {checkpoints}")
    flags = f"{base} --load {checkpoints}"
    off, on = (cluster.run(HALFWAY, 2, argv=f"{flags} {offload}") for offload in ("", HALF))
    for mine, theirs in zip(on.results, off.results, strict=True):
        assert mine["rounded"] == theirs["rounded"] > 0
        assert_same_tensors(mine["params"], theirs["params"])


def test_checkpoint_crosses_to_a_world_with_apex(
    cluster: Cluster, apex_cluster: Cluster, checkpoints: Path
) -> None:
    """Megatron puts a step into the state of its hybrid optimizer there."""
    base = f"{AWARE} --bf16 {STEPS}"
    whole = cluster.run(TRAIN, 2, argv=f"{base} {HALF} --save {checkpoints}")
    load = choose(checkpoints, SAVED_AT)
    assert_continues(apex_cluster.run(TRAIN, 2, argv=f"{base} {HALF} {load}"), whole, what=VALUES)


def test_ranks_that_own_no_parameter_step_save_and_load(cluster: Cluster, tmp_path: Path) -> None:
    fields = {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
    }
    sizes = (4, 8)  # three parameters at multiples of 64 in a bucket of 256
    off = cluster.run(MODULE, 4, sizes=sizes).results
    on: list[dict[str, Any]] = cluster.run(
        MODULE, 4, sizes=sizes, fields=fields, save=str(tmp_path / "saved")
    ).results
    assert [rank["state"] for rank in on] == [8, 32, 4, 0]
    for mine, theirs in zip(on, off, strict=True):
        assert mine["grad_norms"] == theirs["grad_norms"]
        assert_same_tensors(mine["params"], theirs["params"])
    assert_loaded(on)


def test_run_goes_on_from_adam_and_offloads(cluster: Cluster, checkpoints: Path) -> None:
    adam = "--optimizer adam --use-distributed-optimizer --adam-beta2 0.95 --bf16"
    cluster.run(TRAIN, 2, argv=f"{adam} {STEPS} --save {checkpoints}")
    flags = f"{AWARE} --bf16 --adams-from-adam {STEPS} {choose(checkpoints, SAVED_AT)}"
    off, on = (cluster.run(TRAIN, 2, argv=f"{flags} {offload}") for offload in ("", HALF))
    assert_same(on, off, *ALIKE)
    (line,) = {text for text in on.logs[0].splitlines() if "goes on from Adam's step" in text}
    assert f"Adam's step {SAVED_AT}" in line


def test_quantized_params_are_not_offloaded(cluster: Cluster) -> None:
    argv = f"{AWARE} --bf16 --train-iters 1 {ALL}"
    setting = "params_quantized_in_8_bits"
    run = cluster.run(QUANTIZED, 1, argv=argv, setting=setting, check=False)
    assert run.codes != [0]
    assert "ValueError: --optimizer-cpu-offload with fp8_param_gather: not supported" in run.log


def test_megatron_without_its_hybrid_optimizer_is_refused(plain_cluster: Cluster) -> None:
    path = "megatron.core.optimizer.cpu_offloading.HybridDeviceOptimizer"
    told = plain_cluster.run(WITHOUT, dotted_path=path).results[0]
    kind, message = told["error"]
    assert kind == "UnsupportedMegatronError" and message.startswith(f"{path}: not found")
    assert told["wrapped"] == []


def test_kernel_that_cannot_be_had_is_an_error_at_start(cluster: Cluster) -> None:
    """Of the GPU's part: here there is no GPU."""
    argv = f"{AWARE} --train-iters 1 {HALF} --adams-kernel cuda"
    run = cluster.run(TRAIN, 1, argv=argv, check=False)
    assert run.codes != [0]
    assert "in train_step" not in run.log
    assert "ValueError: " in run.log
