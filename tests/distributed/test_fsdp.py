"""Megatron-FSDP with adams: the steps of the distributed optimizer, exp_avg alone, checkpoints."""

import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_adams.checkpoint import TRACKER, convert, damage
from tests.harness.cluster import Cluster, Outcome

TRAIN = "tests.distributed.fsdp_cases:train"
TRAIN_WITHOUT = "tests.distributed.cases:train"
LOAD = "tests.distributed.cases:load_plain"
REFUSALS = "tests.distributed.flag_cases:refusals"
WITH_VERSION = "tests.distributed.fsdp_cases:refusals_of_versions"

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
NUM_STEPS, SAVED = 4, 2
STEPS = f"--optimizer adams --train-iters {NUM_STEPS} --save-interval {SAVED}"
# One microbatch, and no norm, whose sum has another order: the arithmetic is the same everywhere.
EXACT = f"{STEPS} --clip-grad 0 --micro-batch-size 4"
BF16 = "--bf16 --megatron-fsdp-main-grads-dtype fp32"
WITHOUT = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
PRECISION_AWARE = f"{BF16} --use-precision-aware-optimizer"


def fsdp(strategy: str) -> str:
    return (
        "--use-megatron-fsdp --ckpt-format fsdp_dtensor "
        f"--data-parallel-sharding-strategy {strategy}"
    )


@dataclass
class Reference:
    """Two ranks of the distributed optimizer: its losses, and its checkpoint's tensors by key."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]

    def of(self, name: str, kind: str) -> torch.Tensor:
        """The "param" or "exp_avg" of one of Megatron-FSDP's params."""
        name = re.sub(r"^(module\.)+", "", name)
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None:
            return self.tensors[f"optimizer.state.{kind}.{name}"]
        stacked = self.tensors[f"optimizer.state.{kind}.{name.replace(layer[0], '.layers.')}"]
        return stacked[int(layer[1])]


def assert_equals(rank: dict[str, Any], reference: Reference) -> None:
    """Bit for bit, in main params and exp_avg, after the last step."""
    num_losses = len(rank["losses"])
    assert rank["losses"] == reference.losses[-num_losses:] and num_losses > 1
    assert len(rank["params"]) == 28
    for name, param in rank["params"].items():
        assert torch.equal(param["param"], reference.of(name, "param")), name
        assert torch.equal(param["state"]["exp_avg"], reference.of(name, "exp_avg")), name


@pytest.fixture(scope="module")
def references(
    fsdp_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reference]:
    references = {}
    for precision, flag in {"fp32": "", "bf16": "--bf16"}.items():
        save = tmp_path_factory.mktemp(precision)
        argv = f"{EXACT} {WITHOUT} {flag} --save {save}"
        run = fsdp_cluster.run(TRAIN_WITHOUT, 2, argv=argv)
        checkpoint = str(save / f"iter_{NUM_STEPS:07d}")
        (tensors,) = fsdp_cluster.run(LOAD, 1, checkpoint=checkpoint).results
        references[precision] = Reference(run.results[0]["losses"], tensors)
    return references


@dataclass
class Run:
    ranks: list[dict[str, Any]]
    log: str
    checkpoints: Path


@pytest.fixture(scope="module")
def runs(fsdp_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two ranks of each strategy in bf16, with checkpoints at 2 and 4."""
    runs = {}
    for strategy in STRATEGIES:
        save = tmp_path_factory.mktemp(strategy)
        argv = f"{EXACT} {fsdp(strategy)} {BF16} --save {save}"
        run = fsdp_cluster.run(TRAIN, 2, argv=argv)
        runs[strategy] = Run(run.results, run.log, save)
    return runs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_equals_distributed_optimizer(
    runs: dict[str, Run],
    references: dict[str, Reference],
    strategy: str,
) -> None:
    for rank in runs[strategy].ranks:
        assert_equals(rank, references["bf16"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exp_avg_is_the_only_state_and_lies_beside_its_param(
    runs: dict[str, Run], strategy: str
) -> None:
    run = runs[strategy]
    ranks = [rank["params"] for rank in run.ranks]
    for name in ranks[0]:
        params = [params[name] for params in ranks]
        numel = params[0]["param"].numel()
        copies = 2 if strategy == "no_shard" else 1
        assert sum(param["num_local"] for param in params) == copies * numel
        assert sum(param["num_bytes"] for param in params) == copies * 4 * numel
        for param in params:
            assert param["state"].keys() == {"exp_avg"}
            of_param, of_exp_avg = param["placements"]
            assert of_param == of_exp_avg
    empty = [param["num_local"] == 0 for params in ranks for param in params.values()]
    assert any(empty) == (strategy != "no_shard")
    num_local = sum(param["num_local"] for param in ranks[0].values())
    assert (
        f"adams: state is exp_avg in fp32 ({4 * num_local} bytes) for the {num_local} parameters "
        f"of this rank; gradients are clipped and unscaled, and model params are written, by "
        f"Megatron-FSDP ({strategy})"
    ) in run.log


def test_kernel_updates_the_local_tensors(runs: dict[str, Run]) -> None:
    for run in runs.values():
        for rank in run.ranks:
            assert rank["classes"] == ("AdamSFsdpOptimizer", "AdamS")
            assert rank["backends"] == {"host"}
            assert rank["keeps_tables"]


@pytest.mark.parametrize(
    ("saved", "resumed"), [("no_shard", "optim"), ("optim_grads", "optim_grads_params")]
)
def test_resumed_run_equals_uninterrupted_one_in_any_strategy(
    fsdp_cluster: Cluster,
    runs: dict[str, Run],
    references: dict[str, Reference],
    saved: str,
    resumed: str,
) -> None:
    load = f"--load {runs[saved].checkpoints} --ckpt-step {SAVED}"
    argv = f"{EXACT} {fsdp(resumed)} {BF16} {load}"
    run = fsdp_cluster.run(TRAIN, 2, argv=argv)
    for rank in run.results:
        assert_equals(rank, references["bf16"])
        assert {group["step"] for group in rank["groups"]} == {NUM_STEPS}


def test_overlap_changes_no_bit(fsdp_cluster: Cluster, references: dict[str, Reference]) -> None:
    """In fp32, with all sharded, which no other test here runs."""
    flags = "--overlap-grad-reduce --overlap-param-gather"
    run = fsdp_cluster.run(TRAIN, 2, argv=f"{EXACT} {fsdp('optim_grads_params')} {flags}")
    assert_equals(run.results[0], references["fp32"])


GATED = f"--num-layers 1 --swiglu --disable-bias-linear {BF16}"
TP2 = "--tensor-model-parallel-size 2"
EP2 = "--num-experts 4 --expert-model-parallel-size 2"


def assert_close(rank: dict[str, Any], expected: dict[str, Any]) -> None:
    """But for the order in which bf16 products and gradients are summed."""
    num_steps = len(rank["losses"])
    assert num_steps > 1
    assert rank["losses"] == pytest.approx(expected["losses"][-num_steps:], rel=1e-4)
    assert rank["grad_norms"] == pytest.approx(expected["grad_norms"][-num_steps:], rel=1e-3)


def test_tensor_parallel_run_matches_single_process_and_reshards(
    fsdp_cluster: Cluster, tmp_path: Path
) -> None:
    """Clipped, with gated layers, whose exp_avg Megatron splits in a checkpoint."""
    argv = f"{STEPS} {GATED} --use-distributed-optimizer"
    (alone,) = fsdp_cluster.run(TRAIN_WITHOUT, 1, argv=argv).results
    argv = f"{STEPS} {GATED} {TP2} {fsdp('optim_grads_params')} --save {tmp_path}"
    for rank in fsdp_cluster.run(TRAIN, 4, argv=argv).results:
        assert_close(rank, alone)
    argv = f"{STEPS} {GATED} {fsdp('optim')} --load {tmp_path} --ckpt-step {SAVED}"
    for rank in fsdp_cluster.run(TRAIN, 2, argv=argv).results:
        assert_close(rank, alone)


def test_experts_match_distributed_optimizer_and_resume(
    fsdp_cluster: Cluster, tmp_path: Path
) -> None:
    argv = f"{STEPS} {GATED} {EP2}"
    without = f"{argv} --use-distributed-optimizer"
    expected = fsdp_cluster.run(TRAIN_WITHOUT, 4, argv=without).results[0]
    argv = f"{argv} {fsdp('optim_grads_params')}"
    whole = fsdp_cluster.run(TRAIN, 4, argv=f"{argv} --save {tmp_path}").results
    load = f"--load {tmp_path} --ckpt-step {SAVED}"
    resumed = fsdp_cluster.run(TRAIN, 4, argv=f"{argv} {load}").results
    for rank, same in zip(whole, resumed, strict=True):
        assert_close(rank, expected)
        assert same["losses"] == rank["losses"][SAVED:]
        assert_same_params(same, rank)


def assert_same_params(rank: dict[str, Any], expected: dict[str, Any]) -> None:
    """Main params and exp_avg, bit for bit."""
    assert rank["params"].keys() == expected["params"].keys()
    for name, param in expected["params"].items():
        assert torch.equal(rank["params"][name]["param"], param["param"]), name
        exp_avg = rank["params"][name]["state"]["exp_avg"]
        assert torch.equal(exp_avg, param["state"]["exp_avg"]), name


def test_resumed_at_another_data_parallel_size(fsdp_cluster: Cluster, runs: dict[str, Run]) -> None:
    load = f"--load {runs['optim'].checkpoints} --ckpt-step {SAVED}"
    argv = f"{EXACT} {fsdp('optim_grads')} {BF16} {load}"
    (rank,) = fsdp_cluster.run(TRAIN, 1, argv=argv).results
    assert_close(rank, runs["optim"].ranks[0])


def test_resumed_at_another_lr_if_told_so(fsdp_cluster: Cluster, runs: dict[str, Run]) -> None:
    load = f"--load {runs['optim'].checkpoints} --ckpt-step {SAVED}"
    argv = f"{EXACT} {fsdp('optim_grads')} {BF16} {load} --lr 3e-3"
    refused = fsdp_cluster.run(TRAIN, 2, argv=argv, check=False)
    assert refused.codes == [1, 1]
    override = "--override-opt_param-scheduler"
    for log in refused.logs:
        assert f"add {override} to go on from its momentum" in log
    run = fsdp_cluster.run(TRAIN, 2, argv=f"{argv} {override}")
    for rank, before in zip(run.results, runs["optim"].ranks, strict=True):
        for key, value in (("lr", 3e-3), ("max_lr", 3e-3), ("step", NUM_STEPS)):
            assert {group[key] for group in rank["groups"]} == {value}
        # The first loss is that of the weights, the next ones tell of the rate.
        assert rank["losses"][0] == before["losses"][SAVED]
        assert rank["losses"][-1] != before["losses"][-1]


def test_resumed_at_the_checkpoints_lr_if_told_so(
    fsdp_cluster: Cluster, runs: dict[str, Run]
) -> None:
    load = f"--load {runs['optim'].checkpoints} --ckpt-step {SAVED}"
    argv = f"{EXACT} {fsdp('optim_grads')} {BF16} {load} --lr 3e-3"
    run = fsdp_cluster.run(TRAIN, 2, argv=f"{argv} --use-checkpoint-opt_param-scheduler")
    for rank, before in zip(run.results, runs["optim"].ranks, strict=True):
        assert rank["losses"] == before["losses"][SAVED:]


BYTES = {"fp32": 4, "fp16": 2, "fp8": 1}


@pytest.mark.parametrize("dtype", BYTES)
def test_exp_avg_in_fewer_bits(
    fsdp_cluster: Cluster, references: dict[str, Reference], tmp_path: Path, dtype: str
) -> None:
    """With decoupled gradients; in fp32 bit-equal, resumed bit for bit, saved in full."""
    argv = f"{EXACT} {fsdp('optim_grads_params')} {PRECISION_AWARE} --exp-avg-dtype {dtype}"
    whole = fsdp_cluster.run(TRAIN, 2, argv=f"{argv} --save {tmp_path}").results
    for params in zip(*(rank["params"].values() for rank in whole), strict=True):
        numel = params[0]["param"].numel()
        assert sum(param["num_bytes"] for param in params) == BYTES[dtype] * numel
    if dtype == "fp32":
        assert_equals(whole[0], references["bf16"])
    else:
        assert whole[0]["losses"] == pytest.approx(references["bf16"].losses, rel=1e-3)
    if dtype == "fp8":
        load = f"--load {tmp_path} --ckpt-step {SAVED}"
        resumed = fsdp_cluster.run(TRAIN, 2, argv=f"{argv} {load}").results[0]
        assert resumed["losses"] == whole[0]["losses"][SAVED:]
        assert_same_params(resumed, whole[0])
        argv = f"{EXACT} {fsdp('optim')} {BF16} {load}"
        into_fp32 = fsdp_cluster.run(TRAIN, 2, argv=argv).results[0]
        # The next step reads the same exp_avg.
        assert into_fp32["losses"][:2] == whole[0]["losses"][SAVED : SAVED + 2]


@pytest.mark.parametrize("dtype", ["bf16", "auto"])
def test_main_params_in_fewer_bits(
    fsdp_cluster: Cluster, references: dict[str, Reference], dtype: str
) -> None:
    flags = f"{PRECISION_AWARE} --megatron-fsdp-main-params-dtype {dtype}"
    run = fsdp_cluster.run(TRAIN, 2, argv=f"{EXACT} {fsdp('optim_grads_params')} {flags}")
    dtypes = {param["param"].dtype for param in run.results[0]["params"].values()}
    assert dtypes == {torch.bfloat16}
    for param in run.results[0]["params"].values():
        assert param["state"].keys() == {"exp_avg"}
    assert run.results[0]["losses"] == pytest.approx(references["bf16"].losses, rel=1e-3)


def test_fp16_step_that_overflows_is_skipped_on_ranks_without_a_part_too(
    fsdp_cluster: Cluster,
) -> None:
    flags = "--fp16 --initial-loss-scale 1e6 --loss-scale-window 100 --hysteresis 1"
    argv = f"{STEPS} --train-iters 12 {flags} {fsdp('optim_grads')}"
    ranks = fsdp_cluster.run(TRAIN, 2, argv=argv).results
    assert ranks[0]["skipped"] == ranks[1]["skipped"]
    assert ranks[0]["skipped"][0] and not ranks[0]["skipped"][-1]
    num_steps = ranks[0]["skipped"].count(0)
    assert {group["step"] for group in ranks[0]["groups"]} == {num_steps}


# What is done to a checkpoint -> what is said of it.


def _forget_exp_avg(folder: Path) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    forgotten = [
        name for name in metadata.state_dict_metadata if name.endswith("linear_proj.weight.exp_avg")
    ]
    assert len(forgotten) == 2
    for name in forgotten:
        del metadata.state_dict_metadata[name]
    path.write_bytes(pickle.dumps(metadata))


DAMAGES = {
    "shard missing": (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "metadata missing": (lambda folder: (folder / ".metadata").unlink(), "is missing"),
    "exp_avg missing": (_forget_exp_avg, "linear_proj.weight.exp_avg"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_an_error_on_every_rank(
    fsdp_cluster: Cluster, runs: dict[str, Run], tmp_path: Path, kind: str
) -> None:
    checkpoints = shutil.copytree(runs["optim"].checkpoints, tmp_path / "copy")
    break_it, message = DAMAGES[kind]
    break_it(checkpoints / f"iter_{NUM_STEPS:07d}")
    run = _resume(fsdp_cluster, checkpoints)
    assert all(code > 0 for code in run.codes), run.codes
    for log in run.logs:
        assert message in log


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_truncated_file_is_found(runs: dict[str, Run], tmp_path: Path, name: str) -> None:
    checkpoints = shutil.copytree(runs["optim"].checkpoints, tmp_path / "copy")
    folder = checkpoints / f"iter_{NUM_STEPS:07d}"
    os.truncate(folder / name, 1000)
    assert damage(folder) is not None


def _resume(cluster: Cluster, checkpoints: Path, flags: str = "") -> Outcome:
    argv = f"{EXACT} {fsdp('optim')} {BF16} --load {checkpoints} {flags}"
    return cluster.run(TRAIN, 2, argv=argv, check=False)


def test_checkpoint_that_is_overwritten_is_out_of_use_meanwhile(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    from megatron_adams.megatron.training.checkpoint import withdraw

    checkpoints = shutil.copytree(runs["optim"].checkpoints, tmp_path / "copy")
    last = checkpoints / f"iter_{NUM_STEPS:07d}"
    assert damage(last) is None
    withdraw(checkpoints, NUM_STEPS)
    assert damage(last) is not None
    assert (checkpoints / TRACKER).read_text() == str(SAVED)


def test_weights_alone_are_loaded_as_main_params(
    fsdp_cluster: Cluster, runs: dict[str, Run], references: dict[str, Reference]
) -> None:
    """Megatron raises there with Adam."""
    checkpoints = runs["optim"].checkpoints
    run = _resume(fsdp_cluster, checkpoints, f"--ckpt-step {SAVED} --no-load-optim")
    (rank, _) = run.results
    assert rank["losses"][0] == references["bf16"].losses[SAVED]
    assert {group["step"] for group in rank["groups"]} == {NUM_STEPS - SAVED}


@pytest.fixture(scope="module")
def adam(apex_fsdp_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adam's checkpoints: of Apex's (a stand-in), with the step in its groups."""
    save = tmp_path_factory.mktemp("adam")
    argv = f"{EXACT} --optimizer adam {fsdp('no_shard')} {BF16} --save {save}"
    run = apex_fsdp_cluster.run(TRAIN, 2, argv=argv)
    return {"checkpoints": save, "ranks": run.results}


@pytest.mark.parametrize("written_by", ["apex", "torch"])
def test_from_adam_goes_on_from_momentum_main_params_and_step(
    fsdp_cluster: Cluster, adam: dict[str, Any], tmp_path: Path, written_by: str
) -> None:
    checkpoints, ranks = adam["checkpoints"], adam["ranks"]
    flags = BF16
    if written_by == "torch":
        # Its step is in the state of each param.
        checkpoints = tmp_path
        argv = f"{EXACT} --optimizer adam {fsdp('no_shard')} {flags} --save {checkpoints}"
        ranks = fsdp_cluster.run(TRAIN, 2, argv=argv).results
    argv = f"{EXACT} {fsdp('optim')} {flags} --adams-from-adam --load {checkpoints}"
    run = fsdp_cluster.run("tests.distributed.fsdp_cases:state_after_load", 2, argv=argv)
    num_params = len(ranks[0]["params"])
    for log in run.logs[:1]:
        assert (
            f"adams: goes on from Adam's step {NUM_STEPS}: momentum and main params of "
            f"{num_params} of {num_params} parameters of this rank restored, exp_avg_sq dropped"
        ) in log
    for loaded in run.results:
        assert {group["step"] for group in loaded["groups"]} == {NUM_STEPS}
        assert {group["betas"] for group in loaded["groups"]} == {(0.9, 0.95)}
        assert_same_params(loaded, ranks[0])


def test_adam_checkpoint_is_refused_by_name(
    fsdp_cluster: Cluster, adam: dict[str, Any], tmp_path: Path
) -> None:
    run = _resume(fsdp_cluster, adam["checkpoints"])
    assert all(code > 0 for code in run.codes)
    for log in run.logs:
        assert "was saved with --optimizer adam, and adams keeps exp_avg alone" in log
    with pytest.raises(ValueError, match="is of the format fsdp_dtensor; must be of torch_dist"):
        convert(adam["checkpoints"], tmp_path / "converted")


def test_adam_is_told_that_it_cannot_go_on_from_adams(
    fsdp_cluster: Cluster, runs: dict[str, Run]
) -> None:
    run = _resume(fsdp_cluster, runs["optim"].checkpoints, "--optimizer adam")
    assert all(code > 0 for code in run.codes)
    for log in run.logs:
        assert "was saved by adams, which keeps exp_avg and no exp_avg_sq" in log


def test_checkpoint_is_not_loaded_across_formats(
    fsdp_cluster: Cluster, runs: dict[str, Run]
) -> None:
    load = f"--load {runs['optim'].checkpoints}"
    run = fsdp_cluster.run(TRAIN_WITHOUT, 1, argv=f"{EXACT} {WITHOUT} {load}", check=False)
    assert "was saved with Megatron-FSDP, and cannot be loaded without it; add --use-m" in run.log


REFUSED = {
    "format": ("--ckpt-format torch_dist", "--ckpt-format torch_dist with --use-megatron-fsdp"),
    "pp": (
        "--pipeline-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 with --use-megatron-fsdp: must be 1",
    ),
    "instances": (
        "--num-distributed-optimizer-instances 2",
        "--num-distributed-optimizer-instances 2 with --use-megatron-fsdp: not supported",
    ),
    "offload": (
        "--use-precision-aware-optimizer --optimizer-cpu-offload",
        "--optimizer-cpu-offload with --use-megatron-fsdp: not supported",
    ),
    "main_params_dtype": (
        "--bf16 --use-precision-aware-optimizer --main-params-dtype fp16",
        "--main-params-dtype fp16 with --use-megatron-fsdp: ",
    ),
    "main_grads_dtype": (
        "--bf16 --use-precision-aware-optimizer --main-grads-dtype bf16",
        "--main-grads-dtype bf16 with --use-megatron-fsdp: ",
    ),
    "no_remainders": (
        "--bf16 --use-precision-aware-optimizer --adams-no-param-remainders",
        "--adams-no-param-remainders with --use-megatron-fsdp: there are no remainders",
    ),
    "gated_fp32": ("--swiglu --save here", "--swiglu and --save with --use-megatron-fsdp in fp32"),
    "gated_no_shard": (
        "--bf16 --swiglu --load here --data-parallel-sharding-strategy no_shard",
        "--swiglu and --load with --use-megatron-fsdp and --data-parallel-sharding-strategy no_",
    ),
    "partial_load": (
        "--load here --no-strict-fsdp-dtensor-load",
        "--no-strict-fsdp-dtensor-load with --use-megatron-fsdp",
    ),
    "fp16_grads": (
        "--fp16 --use-precision-aware-optimizer",
        "--megatron-fsdp-main-grads-dtype auto in fp16 with --use-precision-aware-optimizer",
    ),
    "bf16_main_params": (
        "--bf16 --megatron-fsdp-main-params-dtype bf16",
        "--megatron-fsdp-main-params-dtype bf16 in bf16: the gradients get the dtype",
    ),
    "no_main_params": (
        "--bf16 --megatron-fsdp-main-params-dtype auto",
        "--megatron-fsdp-main-params-dtype auto in bf16: the gradients get the dtype",
    ),
    "grads_of_no_main_params": (
        "--bf16 --clip-grad 0 --megatron-fsdp-main-params-dtype auto "
        "--megatron-fsdp-main-grads-dtype fp32",
        "--megatron-fsdp-main-grads-dtype fp32 with --megatron-fsdp-main-params-dtype auto",
    ),
    "torch_fsdp2": ("--use-torch-fsdp2", "--use-torch-fsdp2 with --optimizer adams: not supported"),
}


def test_contradicting_flags_are_refused_in_one_sentence(fsdp_cluster: Cluster) -> None:
    commands = [f"--optimizer adams {fsdp('optim')} {flags}" for flags, _ in REFUSED.values()]
    answers = fsdp_cluster.run(REFUSALS, 1, commands=commands).results[0]
    for (_, beginning), answer in zip(REFUSED.values(), answers, strict=True):
        assert answer is not None, beginning
        assert answer.startswith(beginning), answer
        assert re.search("must be|not supported|; (add|give|remove) ", answer)


def test_flags_that_agree_are_taken(fsdp_cluster: Cluster) -> None:
    commands = [
        f"--optimizer adams {fsdp('optim')} {flags}"
        for flags in (
            "--use-precision-aware-optimizer",
            "--bf16 --swiglu --save here",
            "--load here --no-load-optim --no-strict-fsdp-dtensor-load",
            "--bf16 --clip-grad 0 --megatron-fsdp-main-params-dtype auto",
            "--megatron-fsdp-main-params-dtype auto",
        )
    ]
    assert fsdp_cluster.run(REFUSALS, 1, commands=commands).results[0] == [None] * len(commands)


def test_version_2_is_refused(fsdp_cluster: Cluster) -> None:
    from megatron_adams.megatron.config import AdamSOptimizerConfig
    from megatron_adams.megatron.refusals import check_model

    ddp_config = SimpleNamespace(use_megatron_fsdp=True, megatron_fsdp_version=2)
    with pytest.raises(ValueError, match=r"^megatron_fsdp_version=2: must be 1, .*; give 1$"):
        check_model(AdamSOptimizerConfig(lr=1e-3), [SimpleNamespace(ddp_config=ddp_config)])
    argv = f"--optimizer adams {fsdp('optim')}"
    answers = fsdp_cluster.run(WITH_VERSION, 1, argv=argv).results[0]
    assert answers["1"] is None
    assert answers["2"].startswith("--megatron-fsdp-version 2 with --optimizer adams: must be 1")


def test_configuration_that_the_model_does_not_have_is_refused() -> None:
    from megatron_adams.megatron.config import AdamSOptimizerConfig
    from megatron_adams.megatron.refusals import check_fsdp_model

    config = AdamSOptimizerConfig(lr=1e-3)
    decoupled = SimpleNamespace(ddp_config=SimpleNamespace(megatron_fsdp_use_decoupled_grad=True))
    with pytest.raises(ValueError, match=r"^megatron_fsdp_use_decoupled_grad=True .*: must be the"):
        check_fsdp_model(config, [decoupled])
    with pytest.raises(ValueError, match=r"^2 model chunks with Megatron-FSDP: must be one"):
        check_fsdp_model(config, [decoupled, decoupled])
