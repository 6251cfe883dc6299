"""Every flag family of Megatron that concerns an optimizer: it works with adams, or is refused."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.argv import ADAMS, DISTRIBUTED, UNCLIPPED, printed_arguments
from tests.harness.cluster import Cluster, Outcome
from tests.harness.compare import assert_same

TRAIN = "tests.distributed.cases:train"
WITHOUT_PLUGIN = "tests.distributed.flag_cases:train_without_plugin"
OBSERVE = "tests.distributed.flag_cases:observe"
REFUSALS = "tests.distributed.flag_cases:refusals"
PARSED = "tests.distributed.flag_cases:parsed"
MEMORY = "tests.distributed.flag_cases:theoretical_memory"
PARSERS = "tests.distributed.flag_cases:parsers"


def num_elements(rank: dict[str, Any]) -> int:
    return sum(shard["param"].numel() for part in rank["parts"] for shard in part["shards"])


def groups(rank: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for part in rank["parts"] for group in part["groups"]]


# --- communication ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_dp2(cluster: Cluster) -> Outcome:
    return cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} --bf16 --train-iters 4 {UNCLIPPED}")


@pytest.mark.parametrize(
    "flags", ["--overlap-grad-reduce", "--overlap-grad-reduce --overlap-param-gather"]
)
def test_overlap_changes_no_bit(cluster: Cluster, bf16_dp2: Outcome, flags: str) -> None:
    buckets = "--ddp-bucket-size 20000"  # several of them: one bucket has nothing to overlap
    base = f"{DISTRIBUTED} --bf16 --train-iters 4 {UNCLIPPED}"
    run = cluster.run(TRAIN, 2, argv=f"{base} {flags} {buckets}")
    assert_same(run, bf16_dp2, "losses", "model")


def test_overlap_of_param_gather_with_optimizer_step_changes_no_bit(cluster: Cluster) -> None:
    base = (
        f"{DISTRIBUTED} --bf16 --train-iters 4 {UNCLIPPED} --num-layers 4 "
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--overlap-grad-reduce --overlap-param-gather --ckpt-format torch"
    )
    plain = cluster.run(TRAIN, 4, argv=base)
    overlapped = cluster.run(TRAIN, 4, argv=f"{base} --overlap-param-gather-with-optimizer-step")
    assert_same(overlapped, plain, "losses", "model")
    # It splits the chain: the first model chunk has an optimizer of its own.
    assert [len(rank["parts"]) for rank in overlapped.results] == [2] * 4
    assert {part["classes"][1] for rank in overlapped.results for part in rank["parts"]} == {
        "AdamS"
    }


def test_two_optimizer_instances_equal_one(cluster: Cluster) -> None:
    base = f"{DISTRIBUTED} --train-iters 4"
    one = cluster.run(TRAIN, 4, argv=base)
    two = cluster.run(TRAIN, 4, argv=f"{base} --num-distributed-optimizer-instances 2")
    for mine, theirs in zip(two.results, one.results, strict=True):
        np.testing.assert_allclose(mine["losses"], theirs["losses"], rtol=1e-6)
        np.testing.assert_allclose(mine["grad_norms"], theirs["grad_norms"], rtol=1e-5)
        for name, tensor in theirs["model"].items():
            # A hundredth of one step's lr: the gradients are summed in another order.
            torch.testing.assert_close(mine["model"][name], tensor, rtol=1e-5, atol=1e-5)
    num_params = sum(p.numel() for p in one.results[0]["model"].values())
    assert sum(num_elements(rank) for rank in one.results) == num_params
    # Each instance of two ranks holds the whole state.
    assert sum(num_elements(rank) for rank in two.results) == 2 * num_params


# --- fp16 --------------------------------------------------------------------------------------


def test_fp16_step_that_overflows_changes_nothing_and_training_goes_on(cluster: Cluster) -> None:
    scaling = f"--initial-loss-scale {2**26} --loss-scale-window 3 --hysteresis 1"
    run = cluster.run(OBSERVE, 2, argv=f"{DISTRIBUTED} --fp16 {scaling} --train-iters 16")
    skipped = run.results[0]["skipped"]
    assert all(rank["skipped"] == skipped for rank in run.results)
    assert skipped[0] == 1  # the first scale overflows
    # And one comes after a step was taken, when exp_avg is not zero any more.
    assert [0, 1] in [list(pair) for pair in itertools.pairwise(skipped)]
    for rank in run.results:
        num_steps = 0
        for step, was_skipped in zip(rank["steps"], skipped, strict=True):
            assert (step["grads"] is None) == bool(was_skipped)
            num_steps += not was_skipped
            assert {group["step"] for group in step["groups"]} == {num_steps}
            for before, after in itertools.chain(
                zip(*step["params"], strict=True), zip(*step["exp_avg"], strict=True)
            ):
                assert torch.equal(before, after) == bool(was_skipped)
        assert num_steps >= 5
        scales = [step["loss_scale"] for step in rank["steps"]]
        assert scales[0] == 2**25
        assert np.isfinite(rank["losses"]).all() and rank["losses"][-1] < rank["losses"][0] - 0.3
    assert [s["loss_scale"] for s in run.results[0]["steps"]] == [
        s["loss_scale"] for s in run.results[1]["steps"]
    ]


# --- param groups ------------------------------------------------------------------------------


def test_decoupled_lr_and_weight_decay_reach_their_groups(cluster: Cluster) -> None:
    decoupled = "--decoupled-lr 5e-3 --decoupled-min-lr 1e-3 --min-lr 1e-5"
    run = cluster.run(
        OBSERVE, 1, argv=f"{ADAMS} {decoupled} --lr-decay-style linear --train-iters 3"
    )
    step = run.results[0]["steps"][0]
    embedding = run.results[0]["model"]["0.module.embedding.word_embeddings.weight"]
    seen = set()
    for param, group in zip(step["params"][0], step["groups"], strict=True):
        is_embedding = param.shape == embedding.shape
        is_vector = param.dim() == 1
        seen.add((is_embedding, is_vector))
        assert (group["max_lr"], group["min_lr"]) == (
            (5e-3, 1e-3) if is_embedding else (1e-3, 1e-5)
        )
        assert group["weight_decay"] == (0.0 if is_vector else 0.1)
        assert group["wd_mult"] == (0.0 if is_vector else 1.0)
    assert seen == {(True, False), (False, True), (False, False)}
    # And the learning rate that a step takes is its group's: the first update of the paper's
    # form is 0.447 lr wherever eps does not count, plus weight decay (0.1 of params < 0.1).
    for index, group in enumerate(step["groups"]):
        update = first_update(step, index)
        assert abs(float(update.abs().median()) / group["max_lr"] - 0.447) < 0.02


def first_update(step: dict[str, Any], index: int) -> torch.Tensor:
    before, after = (params[index] for params in step["params"])
    counts = step["grads"][index].abs() > 1e-4  # eps is 1e-8
    assert counts.any()
    return (after - before)[counts]


def test_bias_correction_changes_the_first_update(cluster: Cluster) -> None:
    for flag, expected in (("", 0.1 / 0.05**0.5), ("--adams-bias-correction", 1 / 0.05**0.5)):
        base = f"{DISTRIBUTED} {flag} --train-iters 1 --weight-decay 0"
        step = cluster.run(OBSERVE, 1, argv=base).results[0]["steps"][0]
        for index in range(len(step["groups"])):
            update = first_update(step, index)
            sign = -step["grads"][index][step["grads"][index].abs() > 1e-4].sign()
            # 1e-3: eps (1e-8 of 2e-5), and fp32 parameters near 1 that move by 4e-4.
            torch.testing.assert_close(update / 1e-3, sign * expected, rtol=2e-3, atol=1e-4)
        assert {group["bias_correction"] for group in step["groups"]} == {bool(flag)}


FORMS = {
    "paper": "",
    "nesterov": "--adams-nesterov",
    "cautious": "--adams-cautious",
    "both": "--adams-nesterov --adams-cautious",
}


def test_forms_of_the_update_reach_the_optimizer_and_shard_to_the_same_bits(
    cluster: Cluster,
) -> None:
    base = f"--bf16 --train-iters 4 {UNCLIPPED}"
    models = {}
    for name, flags in FORMS.items():
        sharded = cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} {base} {flags}")
        assert {(g["nesterov"], g["cautious"]) for g in groups(sharded.results[0])} == {
            ("--adams-nesterov" in flags, "--adams-cautious" in flags)
        }
        models[name] = sharded.results[0]["model"]
        plain = cluster.run(TRAIN, 2, argv=f"{ADAMS} {base} {flags}")
        assert_same(sharded, plain, "losses", "model")
    for one, other in itertools.combinations(models.values(), 2):
        assert not any(torch.equal(one[name], other[name]) for name in one if "weight" in name)


def test_mup_scales_adams_as_adam(cluster: Cluster) -> None:
    mup = "--use-mup --mup-base-hidden-size 16 --train-iters 1"
    adam = cluster.run(OBSERVE, 1, argv=f"--optimizer adam {mup}").results[0]["steps"][0]
    adams = cluster.run(OBSERVE, 1, argv=f"{ADAMS} {mup}").results[0]["steps"][0]
    shared = ("lr", "eps", "max_lr", "min_lr", "weight_decay", "wd_mult")
    mine, theirs = (
        [{key: group[key] for key in shared} for group in step["groups"]] for step in (adams, adam)
    )
    assert mine == theirs
    # The hidden size is 4 times the base's.
    assert {(group["max_lr"], group["eps"]) for group in mine} == {(1e-3, 1e-8), (2.5e-4, 2.5e-9)}


# --- gradients and what is logged of them --------------------------------------------------------


def global_norm(grads: list[torch.Tensor]) -> float:
    return float(torch.stack([grad.double().norm() for grad in grads]).norm())


def test_clip_grad_scales_to_the_norm_that_is_logged(cluster: Cluster) -> None:
    base = f"{DISTRIBUTED} --train-iters 1"
    free = cluster.run(OBSERVE, 1, argv=f"{base} --clip-grad 1e6").results[0]
    clipped = cluster.run(OBSERVE, 2, argv=f"{base} --clip-grad 0.01").results
    norm = free["grad_norms"][0]
    assert abs(global_norm(free["steps"][0]["grads"]) / norm - 1) < 1e-5
    for rank in clipped:
        assert abs(rank["grad_norms"][0] / norm - 1) < 1e-5
    given = [grad for rank in clipped for grad in rank["steps"][0]["grads"]]
    assert abs(global_norm(given) / 0.01 - 1) < 1e-3  # Megatron divides by norm + 1e-6


def test_logged_zeros_and_params_norm_are_those_of_one_process(cluster: Cluster) -> None:
    # A short batch and an embedding of its own: the rows of absent tokens have no gradient.
    base = (
        "--bf16 --train-iters 2 --log-num-zeros-in-grad --log-params-norm --micro-batch-size 1 "
        "--global-batch-size 2 --untie-embeddings-and-output-weights --clip-grad 1e6"
    )
    single = cluster.run(OBSERVE, 1, argv=f"{ADAMS} {base}").results
    sharded = cluster.run(OBSERVE, 2, argv=f"{DISTRIBUTED} {base}")
    for ranks in (single, sharded.results):
        for index in range(2):
            steps = [rank["steps"][index] for rank in ranks]
            grads = [grad for step in steps for grad in step["grads"]]
            params = [param for step in steps for param in step["params"][1]]
            num_zeros = sum(int((grad == 0).sum()) for grad in grads)
            assert num_zeros > 1000
            for rank, step in zip(ranks, steps, strict=True):
                assert rank["num_zeros"][index] == num_zeros
                # Of the fp32 main params, not of their bf16 copies.
                assert abs(step["params_norm"] / global_norm(params) - 1) < 1e-6
    assert sharded.results[0]["num_zeros"] == single[0]["num_zeros"]
    norms = [
        [step["params_norm"] for step in ranks[0]["steps"]] for ranks in (sharded.results, single)
    ]
    # bf16 gradients of two ranks are rounded before they are added.
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
    assert re.search(rf"params norm: {norms[0][0]:.3f} \|", sharded.log)
    assert re.search(rf"num zeros: {sharded.results[0]['num_zeros'][0]}[. ]", sharded.log)


# --- arguments and reports ---------------------------------------------------------------------


def test_log_and_argument_dump_say_adams(cluster: Cluster) -> None:
    run = cluster.run(TRAIN, 1, argv=f"{DISTRIBUTED} --train-iters 1")
    dump = printed_arguments(run.log)
    assert dump["optimizer"] == "adams"
    assert dump["adam_beta2"] == "0.95"
    assert dump["use_distributed_optimizer"] == "True"
    assert "optimizer='adams'" in run.log  # Megatron's line with the optimizer's configuration
    assert not re.search(r"\boptimizer=['\"]adam['\"]", run.log)
    assert "exp_avg_sq" not in run.log.replace("exp_avg_sq_dtype", "")
    assert "layer_wise" not in run.log.replace("use_layer_wise", "")
    assert not re.search(r"Warning: --adam-beta2", run.log)


def test_flags_that_the_ranks_are_forked_with_are_those_of_a_rank(cluster: Cluster) -> None:
    """The harness builds the parser before the fork; some defaults are of a rank's environment."""
    for given, built in cluster.run(PARSERS, 2).results:
        assert len(given) > 500
        assert given == built


def test_adams_hyperparameters_are_adams_but_for_beta2(cluster: Cluster) -> None:
    names = ["adam_beta1", "adam_beta2", "adam_eps", "optimizer", "use_distributed_optimizer"]
    commands = [
        DISTRIBUTED,
        f"{DISTRIBUTED} --adam-beta2 0.999",
        f"{DISTRIBUTED} --adam-beta2 0.98",
        "--optimizer adam --use-distributed-optimizer",
        "--optimizer sgd",
    ]
    default, given, lower, adam, sgd = cluster.run(
        PARSED, 1, commands=commands, names=names
    ).results[0]
    assert [default[name] for name in names] == [0.9, 0.95, 1e-8, "adams", True]
    # The number of Adam's own default, but given: it counts, and is warned of.
    assert given["adam_beta2"] == 0.999
    assert [text for text in given["warnings"] if "--adam-beta2 0.999" in text]
    assert lower["adam_beta2"] == 0.98
    for quiet in (default, lower, adam, sgd):
        assert not [text for text in quiet["warnings"] if "beta2" in text]
    assert [adam[name] for name in names] == [0.9, 0.999, 1e-8, "adam", True]
    assert [sgd[name] for name in names] == [0.9, 0.999, 1e-8, "sgd", False]
    # It is saved with a checkpoint, which is to load without this package.
    assert {answer["types"]["adam_beta2"] for answer in (default, given, adam, sgd)} == {"float"}


def test_given_hyperparameters_reach_the_optimizer(cluster: Cluster) -> None:
    given = "--adam-beta1 0.8 --adam-beta2 0.999 --adam-eps 1e-5"
    run = cluster.run(TRAIN, 1, argv=f"{DISTRIBUTED} {given} --train-iters 1")
    assert {(g["betas"], g["eps"]) for g in groups(run.results[0])} == {((0.8, 0.999), 1e-5)}
    assert "--adam-beta2 0.999 with --optimizer adams" in run.log


REFUSED = {
    "remainders": ("--adams-no-param-remainders", "--adams-no-param-remainders: only"),
    "cpu_offload_alone": (
        "--optimizer-cpu-offload",
        "--optimizer-cpu-offload with --optimizer adams: Megatron offloads the precision-aware",
    ),
    "torch_optimizer_for_cpu_offload": (
        "--use-precision-aware-optimizer --optimizer-cpu-offload "
        "--use-torch-optimizer-for-cpu-offload",
        "--use-torch-optimizer-for-cpu-offload with --optimizer adams: torch has no adams",
    ),
    "overlapped_offload_of_nothing": (
        "--overlap-cpu-optimizer-d2h-h2d",
        "--overlap-cpu-optimizer-d2h-h2d with --optimizer adams: belongs to",
    ),
    "cuda_kernel_of_offloaded_params": (
        "--use-precision-aware-optimizer --optimizer-cpu-offload --adams-kernel cuda",
        "--adams-kernel cuda with --optimizer-cpu-offload: no param stays on the GPU",
    ),
    "shadow_beta2": (
        "--adams-log-adamw-rms 1",
        "--adams-log-adamw-rms 1.0 with --optimizer adams: must be in (0, 1), AdamW's beta2",
    ),
    "shadow_in_a_cuda_graph": (
        "--adams-log-adamw-rms --optimizer-cuda-graph",
        "--adams-log-adamw-rms 0.95 with --optimizer-cuda-graph: a CUDA graph would repeat",
    ),
    "shadow_of_offloaded_params": (
        "--adams-log-adamw-rms --use-precision-aware-optimizer --optimizer-cpu-offload",
        "--adams-log-adamw-rms 0.95 with --optimizer-cpu-offload: the shadow would take",
    ),
    "torch_fsdp2": ("--use-torch-fsdp2", "--use-torch-fsdp2"),
    "torch_dcp": ("--ckpt-format torch_dcp", "--ckpt-format torch_dcp"),
    "fsdp_dtensor": ("--ckpt-format fsdp_dtensor", "--ckpt-format fsdp_dtensor"),
    "exp_avg_dtype": ("--exp-avg-dtype bf16", "--exp-avg-dtype bf16"),
    "exp_avg_sq_dtype": (
        "--exp-avg-sq-dtype fp32 --use-precision-aware-optimizer",
        "--exp-avg-sq-dtype fp32 with --optimizer adams: adams keeps no exp_avg_sq",
    ),
    "main_params_dtype": ("--main-params-dtype fp16", "--main-params-dtype fp16"),
    "main_grads_dtype": ("--main-grads-dtype bf16", "--main-grads-dtype bf16"),
    "main_params_dtype_of_fp32": (
        "--main-params-dtype fp16 --use-precision-aware-optimizer",
        "--main-params-dtype fp16 with --optimizer adams: concerns training in bf16 or fp16",
    ),
    "main_grads_dtype_of_fp16": (
        "--main-grads-dtype bf16 --use-precision-aware-optimizer --fp16",
        "--main-grads-dtype bf16 with --optimizer adams: concerns training in bf16",
    ),
    "nesterov_with_bias_correction": (
        "--adams-nesterov --adams-bias-correction",
        "--adams-nesterov with --optimizer adams and --adams-bias-correction: not supported",
    ),
    "eps": ("--adam-eps 0", "--adam-eps 0.0 with --optimizer adams: eps=0.0: must be"),
    "beta1": ("--adam-beta1 1", "--adam-beta1 1.0 with --optimizer adams: beta1=1.0"),
    "beta2": ("--adam-beta2 0", "--adam-beta2 0.0 with --optimizer adams: beta2=0.0"),
    "beta2_at_1": ("--adam-beta2 1.0", "--adam-beta2 1.0 with --optimizer adams: beta2=1.0"),
    "beta2_above": ("--adam-beta2 1.5", "--adam-beta2 1.5 with --optimizer adams: beta2=1.5"),
    "weight_decay": (
        "--weight-decay -1",
        "--weight-decay -1.0 with --optimizer adams: weight_decay=-1.0: must be",
    ),
    "weight_decay_at_the_end": (
        "--start-weight-decay 0 --end-weight-decay nan --weight-decay-incr-style linear",
        "--end-weight-decay nan with --optimizer adams: weight_decay=nan: must be",
    ),
    "lr": ("--lr nan", "--lr nan with --optimizer adams: lr=nan: must be"),
    "min_lr": ("--min-lr inf", "--min-lr inf with --optimizer adams: lr=inf: must be"),
    "decoupled_lr": ("--decoupled-lr nan", "--decoupled-lr nan with --optimizer adams: lr=nan"),
}


@pytest.fixture(scope="module")
def refused(cluster: Cluster) -> dict[str, str | None]:
    # Ours comes first: --overlap-param-gather by itself is one of Megatron's own assertions.
    commands = [f"{DISTRIBUTED} --overlap-param-gather {flags}" for flags, _ in REFUSED.values()]
    answers = cluster.run(REFUSALS, 1, commands=commands).results[0]
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_flag_is_refused_in_one_sentence(
    refused: dict[str, str | None], name: str
) -> None:
    message = refused[name]
    assert message is not None
    assert REFUSED[name][1] in message
    assert re.search("must be|not supported|; (add|give|remove) ", message)
    assert "\n" not in message and "traceback" not in message


def test_refusal_ends_the_run_with_a_non_zero_exit_on_every_rank(cluster: Cluster) -> None:
    flags = "--use-torch-fsdp2 --train-iters 1"
    run = cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} {flags}", check=False, timeout_s=60)
    assert run.codes == [1, 1]
    for log in run.logs:
        assert log.splitlines()[-1].startswith(
            "ValueError: --use-torch-fsdp2 with --optimizer adams: not supported"
        )


def test_bias_correction_is_refused_with_another_optimizer(cluster: Cluster) -> None:
    commands = [f"--optimizer {name} --adams-bias-correction" for name in ("adam", "sgd")]
    messages = cluster.run(REFUSALS, 1, commands=commands).results[0]
    for name, message in zip(("adam", "sgd"), messages, strict=True):
        assert message is not None
        assert message.startswith(f"--adams-bias-correction with --optimizer {name}:")


@pytest.mark.parametrize(
    "flags",
    ["", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"],
)
def test_theoretical_memory_of_dense_models(cluster: Cluster, flags: str) -> None:
    told = cluster.run(MEMORY, 1, argv=flags, world_size=8).results[0]
    dp_size = told["sizes"]["data_parallel_size"]
    num_params = told["adam_plain"] / 18
    assert told["adam"] == pytest.approx(num_params * (6 + 12 / dp_size))
    assert told["adams_plain"] == pytest.approx(num_params * 14)
    assert told["adams"] == pytest.approx(num_params * (6 + 8 / dp_size))
    assert f"weight and optimizer={told['adams'] / 2**20:.2f} MB" in told["printed"]
    assert told["printed"].count("Total number of parameters") == 1


PRECISION_BYTES = {
    # param and gradient; state, over the data parallel ranks
    "--bf16": (6, 6),
    "--bf16 --main-grads-dtype bf16 --exp-avg-dtype bf16": (4, 4),
    "--bf16 --main-params-dtype fp16 --exp-avg-dtype fp8": (6, 3),
    "--bf16 --adams-no-param-remainders": (6, 8),
    "--fp16 --exp-avg-dtype fp16": (6, 6),
}


@pytest.mark.parametrize("flags", PRECISION_BYTES)
def test_theoretical_memory_of_the_precision_aware_optimizer(cluster: Cluster, flags: str) -> None:
    argv = f"--use-precision-aware-optimizer {flags}"
    told = cluster.run(MEMORY, 1, argv=argv, world_size=8).results[0]
    replicated, sharded = PRECISION_BYTES[flags]
    num_params = told["adam_plain"] / 18
    assert told["adams"] == pytest.approx(num_params * (replicated + sharded / 8))


def test_theoretical_memory_of_experts_uses_their_own_dp_size(cluster: Cluster) -> None:
    flags = (
        "--num-experts 8 --moe-router-topk 2 --swiglu --disable-bias-linear "
        "--expert-model-parallel-size 4"
    )
    told = cluster.run(MEMORY, 1, argv=flags, world_size=8).results[0]
    sizes = told["sizes"]
    # A rank's expert weights: two experts of 8, SwiGLU's three matrices in each layer.
    num_expert_params = (
        sizes["num_layers"] * 2 * 3 * sizes["hidden_size"] * sizes["moe_ffn_hidden_size"]
    )
    num_dense_params = told["adam_plain"] / 18 - num_expert_params
    assert told["adams_plain"] == pytest.approx(14 * (num_dense_params + num_expert_params))
    assert told["adams"] == pytest.approx(
        num_dense_params * (6 + 8 / 8) + num_expert_params * (6 + 8 / 2)
    )


# --- everyone else -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adam --use-distributed-optimizer --bf16",
        "--optimizer sgd",
    ],
)
def test_other_optimizers_run_as_without_the_plugin(
    cluster: Cluster, plain_cluster: Cluster, flags: str
) -> None:
    argv = f"{flags} --train-iters 3"
    registered = cluster.run(TRAIN, 2, argv=argv)
    plain = plain_cluster.run(WITHOUT_PLUGIN, 2, argv=argv)
    assert_same(registered, plain, "losses", "model", "grad_norms", "classes", "groups", "state")
    mine, theirs = printed_arguments(registered.log), printed_arguments(plain.log)
    own = {name: mine.pop(name) for name in mine.keys() - theirs.keys()}
    assert own == {
        "adams_bias_correction": "False",
        "adams_cautious": "False",
        "adams_from_adam": "False",
        "adams_kernel": "auto",
        "adams_log_adamw_rms": "None",
        "adams_log_gpu_memory": "None",
        "adams_match_rms": "None",
        "adams_max_update_rms": "None",
        "adams_nesterov": "False",
        "adams_no_param_remainders": "False",
    }
    assert mine == theirs
    assert theirs["adam_beta2"] == "0.999"
