"""--use-precision-aware-optimizer without TransformerEngine: state in fewer bits."""

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.harness.argv import (
    AWARE,
    DISTRIBUTED,
    FP16,
    MODES,
    MOE,
    SAVED_AT,
    STEPS,
    choose,
    folder_of,
)
from tests.harness.cluster import Cluster
from tests.harness.compare import assert_continues, assert_same, shards
from tests.harness.thinning import thinned

TRAIN = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"
TIES_AWAY = "tests.distributed.precision_cases:train_rounding_ties_away"
POISONED = "tests.distributed.precision_cases:train_poisoned"
RELOADING = "tests.distributed.precision_cases:train_reloading"
POINTERS = "tests.distributed.precision_cases:pointers_over_load"
HALFWAY = "tests.distributed.precision_cases:params_after_load_halfway"
AFTER_LOAD = "tests.distributed.precision_cases:params_after_load"

ALIKE = ("losses", "grad_norms", "model", "main_param", "exp_avg")


@pytest.mark.parametrize("mode", MODES)
def test_state_has_the_bytes_of_its_dtypes(cluster: Cluster, mode: str) -> None:
    flags, bytes_per_param = MODES[mode]
    run = cluster.run(TRAIN, 2, argv=f"{AWARE} {flags} --train-iters 2")
    total = 0
    for rank in run.results:
        for shard in shards(rank):
            assert shard["bytes_per_param"] == bytes_per_param
            total += sum(t.numel() * t.element_size() for t in shard["state"].values())
        assert {part["classes"] for part in rank["parts"]} == {
            ("AdamSDistributedOptimizer", "AdamS")
        }
    num_params = sum(tensor.numel() for tensor in run.results[0]["model"].values())
    assert total == num_params * bytes_per_param
    assert "model params are written in the step" in run.logs[0]


@pytest.mark.parametrize(
    "flags",
    thinned(
        ["--bf16", "--bf16 --overlap-grad-reduce --overlap-param-gather", FP16], full=["--bf16"]
    ),
)
def test_main_params_inside_change_no_bit(cluster: Cluster, flags: str) -> None:
    """fp32 main params in the inner optimizer, and in Megatron's."""
    inside = "--adams-no-param-remainders" if "--bf16" in flags else ""
    steps = "--train-iters 6"
    theirs = cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} {flags} {steps}")
    mine = cluster.run(TRAIN, 2, argv=f"{AWARE} {flags} {inside} {steps}")
    assert_same(mine, theirs, *ALIKE)
    assert all("master_param" in shard["state"] for shard in shards(mine.results[0]))


@pytest.mark.parametrize(
    "layout",
    ["", "--tensor-model-parallel-size 2", f"{MOE} --expert-model-parallel-size 2"],
    ids=["dp2", "tp2", "ep2"],
)
def test_remainders_change_no_bit_of_main_params_and_exp_avg(cluster: Cluster, layout: str) -> None:
    """Beside fp32 main params whose bf16 copies are rounded alike, half away from zero."""
    flags = f"--bf16 --train-iters 8 --disable-bias-linear {layout}"
    mine = cluster.run(TRAIN, 2, argv=f"{AWARE} {flags}")
    theirs = cluster.run(TIES_AWAY, 2, argv=f"{DISTRIBUTED} {flags}")
    assert_same(mine, theirs, *ALIKE)
    kept = [shard["state"]["master_param"] for shard in shards(mine.results[0])]
    assert {tensor.dtype for tensor in kept} == {torch.int16}
    assert any(tensor.any() for tensor in kept)


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2"], ids=["dp2", "tp2"])
def test_logged_params_norm_is_that_of_the_params(cluster: Cluster, layout: str) -> None:
    norms = []
    for flags in (DISTRIBUTED, AWARE):
        argv = f"{flags} --bf16 --train-iters 2 --log-params-norm {layout}"
        log = cluster.run(TRAIN, 2, argv=argv).logs[-1]
        norms.append([float(text) for text in re.findall(r"params norm: ([\d.]+)", log)])
    # Of the bf16 params: their roundings cancel out.
    assert len(norms[0]) == 2 and norms[1] == pytest.approx(norms[0], rel=1e-3)


# Parity of layouts

COMMON = (
    "--num-layers 4 --disable-bias-linear --dist-ckpt-optim-fully-reshardable --adam-eps 1e-6 "
    "--clip-grad 0 "
)
LAYOUTS = {
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2_pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
START, END = 2, 8


class Reference(NamedTuple):
    """A mode's flags, where all layouts start, and where a single process ends."""

    flags: str
    start: Path
    begin: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    losses: list[float]


# Each mode and each layout once.
PAIRS = list(product(("remainder_m16", "w16_m16", "remainder_m8", "fp32_m16"), LAYOUTS))
CHOSEN = (
    *(("remainder_m16", "tp2_pp2"), ("w16_m16", "tp2")),
    *(("remainder_m8", "pp2"), ("fp32_m16", "dp2")),
)


@pytest.fixture(scope="module")
def reference_of(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reference]:
    @cache
    def reference(mode: str) -> Reference:
        flags = f"{AWARE} {MODES[mode][0]} {COMMON} --train-iters {END}"
        folder = tmp_path_factory.mktemp(mode)
        start, end = folder / "start", folder / "end"
        cluster.run(TRAIN, 1, argv=f"{flags} --exit-interval {START} --save {start}")
        run = cluster.run(TRAIN, 1, argv=f"{flags} --load {start} --save {end}")
        begin = cluster.run(LOAD, 1, checkpoint=folder_of(start, START)).results[0]
        tensors = cluster.run(LOAD, 1, checkpoint=folder_of(end, END)).results[0]
        return Reference(flags, start, begin, tensors, run.results[0]["losses"])

    return reference


@pytest.mark.parametrize(
    ("mode", "layout"), thinned(PAIRS, full=[pair for pair in PAIRS if pair not in CHOSEN])
)
def test_layout_matches_single_process(
    cluster: Cluster,
    reference_of: Callable[[str], Reference],
    tmp_path: Path,
    mode: str,
    layout: str,
) -> None:
    flags, start, begin, expected, losses = reference_of(mode)
    num_ranks, split = LAYOUTS[layout]
    run = cluster.run(TRAIN, num_ranks, argv=f"{flags} {split} --load {start} --save {tmp_path}")
    # Activations and gradients are bf16 in most modes: their sums are rounded in another order.
    is_fp32 = "--bf16" not in flags
    np.testing.assert_allclose(run.results[-1]["losses"], losses, rtol=1e-5 if is_fp32 else 2e-3)
    saved = cluster.run(LOAD, 1, checkpoint=folder_of(tmp_path, END)).results[0]
    assert saved.keys() == expected.keys()
    moved = started = 0.0
    for key, tensor in expected.items():
        if key.startswith("optimizer.state.param."):
            assert saved[key].dtype == torch.float32
            moved += float((saved[key] - tensor).square().sum())
            started += float((tensor - begin[key]).square().sum())
    # Of the way that the params went; an optimizer that lost a shard would be at its start.
    assert moved < (0.02**2 if is_fp32 else 0.25**2) * started


# Checkpoints

FAMILIES = {
    "remainder": (f"{AWARE} --bf16", 2),
    "remainder_m16_legacy": (f"{AWARE} --bf16 --exp-avg-dtype bf16 --ckpt-format torch", 2),
    "w16_m8": (f"{AWARE} --bf16 --main-params-dtype fp16 --exp-avg-dtype fp8", 2),
    "fp16_m16_tp2_reshardable": (
        f"{AWARE} {FP16} --exp-avg-dtype fp16 --dist-ckpt-optim-fully-reshardable "
        "--tensor-model-parallel-size 2",
        2,
    ),
    "remainder_m8_ep2": (
        f"{AWARE} --bf16 --exp-avg-dtype fp8 {MOE} --disable-bias-linear "
        "--expert-model-parallel-size 2",
        2,
    ),
    "remainder_pp2_overlap": (
        f"{AWARE} --bf16 --pipeline-model-parallel-size 2 --overlap-grad-reduce "
        "--overlap-param-gather",
        4,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_run_equals_uninterrupted_one(
    cluster: Cluster, checkpoints: Path, family: str
) -> None:
    flags, num_ranks = FAMILIES[family]
    base = f"{flags} {STEPS}"
    whole = cluster.run(TRAIN, num_ranks, argv=f"{base} --save {checkpoints}").results
    resumed = cluster.run(TRAIN, num_ranks, argv=f"{base} {choose(checkpoints, SAVED_AT)}").results
    assert_continues(resumed, whole, what=("main_param", "exp_avg"))


SOURCES = {
    "default": (DISTRIBUTED, "--bf16"),
    "remainder_m16": (AWARE, "--bf16 --exp-avg-dtype bf16"),
    "w16_m8": (AWARE, "--bf16 --main-params-dtype fp16 --exp-avg-dtype fp8"),
}


RELOADED = f"--train-iters {SAVED_AT} --dist-ckpt-optim-fully-reshardable --disable-bias-linear"


@pytest.fixture(scope="module")
def saved_as(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """A source's checkpoint, saved with tensor parallelism, and its tensors."""

    @cache
    def saved(source: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp(source)
        flags = f"{' '.join(SOURCES[source])} {RELOADED} --tensor-model-parallel-size 2"
        cluster.run(TRAIN, 2, argv=f"{flags} --save {folder}")
        return folder, cluster.run(LOAD, checkpoint=folder_of(folder, SAVED_AT)).results[0]

    return saved


@pytest.mark.parametrize(
    ("source", "target"),
    thinned(product(SOURCES, SOURCES), full=[(name, name) for name in SOURCES]),
)
def test_checkpoint_of_any_precision_loads_into_any_other(
    cluster: Cluster,
    saved_as: Callable[[str], tuple[Path, dict[str, torch.Tensor]]],
    tmp_path: Path,
    source: str,
    target: str,
) -> None:
    """Also at another layout: saved at once, it has the values that the target can keep."""
    first, before = saved_as(source)
    cluster.run(
        TRAIN, 2, argv=f"{' '.join(SOURCES[target])} {RELOADED} --load {first} --save {tmp_path}"
    )
    after = cluster.run(LOAD, checkpoint=folder_of(tmp_path, SAVED_AT)).results[0]
    keys = {key for key in before if key.startswith("optimizer.state.")}
    assert {key.split(".")[2] for key in keys} == {"param", "exp_avg"}
    assert keys == {key for key in after if key.startswith("optimizer.state.")}
    # The unit roundoff of the dtype.
    rounding = {"default": (0, 0), "remainder_m16": (0, 2**-8), "w16_m8": (2**-11, 2**-4)}
    for key in keys:
        assert before[key].dtype == after[key].dtype == torch.float32
        relative = rounding[target][key.startswith("optimizer.state.exp_avg.")]
        if relative == 0:
            assert torch.equal(after[key], before[key])
        else:
            # The smallest numbers of a tensor are fixed-point ones, in units of its largest.
            absolute = 2**-14 * float(before[key].abs().max())
            np.testing.assert_allclose(after[key], before[key], rtol=relative, atol=absolute)


def test_loading_allocates_no_state_anew(cluster: Cluster, tmp_path: Path) -> None:
    """It is written where it is: there is no room for it twice, least of all in fp32."""
    flags = f"{AWARE} --bf16 --exp-avg-dtype bf16 --train-iters {SAVED_AT}"
    cluster.run(TRAIN, 2, argv=f"{flags} --save {tmp_path}")
    for parts in cluster.run(POINTERS, 2, argv=f"{flags} --load {tmp_path}").results:
        for before, after in parts:
            assert before and before == after


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_data_parallel_ranks_agree_once_fp32_main_params_are_remainders(
    cluster: Cluster, tmp_path: Path, ckpt_format: str
) -> None:
    """Params of a rank's own shards are rounded anew where they were half way."""
    common = f"--bf16 --train-iters {SAVED_AT} --ckpt-format {ckpt_format}"
    cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} {common} --save {tmp_path}")
    overlap = "--overlap-grad-reduce --overlap-param-gather"
    loaded = cluster.run(HALFWAY, 2, argv=f"{AWARE} {common} {overlap} --load {tmp_path}").results
    assert all(rank["rounded"] > 0 for rank in loaded)
    for name, tensor in loaded[0]["params"].items():
        assert torch.equal(tensor, loaded[1]["params"][name]), name


def test_weights_alone_are_loaded_into_main_params(cluster: Cluster, tmp_path: Path) -> None:
    common = f"--bf16 --train-iters {SAVED_AT}"
    saved = cluster.run(TRAIN, 2, argv=f"{AWARE} {common} --save {tmp_path}").results
    for flag in ("--finetune", "--no-load-optim"):
        loaded = cluster.run(AFTER_LOAD, 2, argv=f"{AWARE} {common} {flag} --load {tmp_path}")
        for rank, saved_rank in zip(loaded.results, saved, strict=True):
            for name, tensor in saved_rank["model"].items():
                assert torch.equal(rank[name], tensor), name


@pytest.mark.parametrize("mode", ["remainder_m16", "master", "fp32_m16"])
def test_reloaded_model_params_become_main_params(cluster: Cluster, mode: str) -> None:
    """Where there is state already, which upstream would keep."""
    run = cluster.run(RELOADING, 2, argv=f"{AWARE} {MODES[mode][0]} --train-iters 2")
    for rank in run.results:
        assert rank["reloaded"] and all(rank["reloaded"])


# Faults


@pytest.mark.parametrize(
    ("mode", "value"),
    thinned(
        product(("remainder_m16", "fp16_w16_m8"), ("nan", "inf")),
        full=(("remainder_m16", "inf"), ("fp16_w16_m8", "nan")),
    ),
)
def test_gradient_that_is_not_finite_on_one_rank_of_four(
    cluster: Cluster, mode: str, value: str
) -> None:
    """As with Adam: in fp16 every rank skips the step, in bf16 the run stops."""
    flags = f"{MODES[mode][0]} --train-iters 4"
    run = cluster.run(POISONED, 4, argv=f"{AWARE} {flags}", value=value, check=False)
    precision = FP16 if "--fp16" in flags else "--bf16"
    adam = cluster.run(
        POISONED,
        4,
        argv=f"--optimizer adam --use-distributed-optimizer {precision} --train-iters 4",
        value=value,
        check=False,
    )
    if "--fp16" in flags:
        assert run.codes == adam.codes == [0] * 4
        for rank, adam_rank in zip(run.results, adam.results, strict=True):
            assert rank["skipped"] == adam_rank["skipped"] == [0, 0, 1, 0]
            assert rank["changed"] == [True, True, False, True]
    else:
        assert all(code != 0 for code in (*run.codes, *adam.codes))
        for log in (run.logs[1], adam.logs[1]):
            assert "found NaN in local grad norm" in log or "found Inf in local grad norm" in log
