"""The update RMS in the log, its cap and its target, on real Megatron: sharded as unsharded."""

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import module_runs
from tests.distributed.module_runs import assert_matches
from tests.harness.argv import ADAMS, DISTRIBUTED, MOE, SAVED_AT, STEPS, TP2, choose
from tests.harness.cluster import Cluster, Outcome
from tests.harness.compare import assert_continues, assert_same
from tests.harness.thinning import thinned

HAS = "tests.distributed.version_cases:has"
TRAIN = "tests.distributed.rms_cases:train"
TRAIN_UNDER = "tests.distributed.rms_cases:train_under"
PLAIN_TRAIN = "tests.distributed.cases:train"
TRAIN_FSDP = "tests.distributed.fsdp_cases:train"
REFUSALS = "tests.distributed.flag_cases:refusals"

AWARE = f"{DISTRIBUTED} --use-precision-aware-optimizer --bf16"
MATCH = "--adams-match-rms 0.25"
NUM_STEPS = 4
COMMON = f"--train-iters {NUM_STEPS} --global-batch-size 8 --clip-grad 1.0"

LAYOUTS = {
    "one": (1, DISTRIBUTED),
    "one_plain": (1, ADAMS),
    "dp2": (2, DISTRIBUTED),
    "dp2_plain": (2, ADAMS),
    "dp2_plain_bf16": (2, f"{ADAMS} --bf16"),
    "tp2": (2, f"{DISTRIBUTED} {TP2}"),
    "tp2_dp2": (4, f"{DISTRIBUTED} {TP2}"),
    "tp2_plain": (2, f"{ADAMS} {TP2}"),
    "pp2": (2, f"{DISTRIBUTED} --pipeline-model-parallel-size 2"),
    "instances2": (4, f"{DISTRIBUTED} --num-distributed-optimizer-instances 2"),
    "precision_aware": (2, f"{AWARE} --exp-avg-dtype bf16"),
    "scaled_state": (2, f"{AWARE} --exp-avg-dtype fp8 --main-params-dtype fp16"),
}
EXPERTS = {
    "one_ep": (1, DISTRIBUTED),
    "ep2": (2, f"{DISTRIBUTED} --expert-model-parallel-size 2"),
    "ep2_plain": (2, f"{ADAMS} --expert-model-parallel-size 2"),
}
ALL = LAYOUTS | {
    name: (num_ranks, f"{flags} {MOE} --disable-bias-linear")
    for name, (num_ranks, flags) in EXPERTS.items()
}
PLAIN_ONES = ("one_plain", "dp2_plain")


@pytest.fixture(scope="module")
def runs(cluster: Cluster) -> dict[str, Outcome]:
    return {}


def run(cluster: Cluster, runs: dict[str, Outcome], name: str, guard: str = "") -> Outcome:
    key = f"{name} {guard}"
    if key not in runs:
        num_ranks, flags = ALL[name]
        runs[key] = cluster.run(TRAIN, num_ranks, argv=f"{flags} {COMMON} {guard}")
    return runs[key]


def logged(outcome: Outcome) -> dict[int, str]:
    """What the log says of each step's updates."""
    lines = re.findall(r"^ iteration +(\d+)/ +\d+ \| (update RMS.*) \|$", outcome.log, re.MULTILINE)
    return {int(iteration): words for iteration, words in lines}


@pytest.mark.parametrize("guard", ["", MATCH])
@pytest.mark.parametrize("name", thinned(ALL, full=PLAIN_ONES))
def test_log_is_the_rms_of_all_updates_in_float64(
    cluster: Cluster, runs: dict[str, Outcome], name: str, guard: str
) -> None:
    outcome = run(cluster, runs, name, guard)
    reference = run(cluster, runs, "one_ep" if "ep" in name else "one", guard)
    lines = logged(outcome)
    assert sorted(lines) == [*range(1, NUM_STEPS + 1)]
    for step in range(NUM_STEPS):
        updates = [update for rank in outcome.results for update in rank["updates"][step]]
        counted = [update for update in updates if update["counts"]]
        exact = math.sqrt(
            sum(update["sum"] for update in counted) / sum(update["numel"] for update in counted)
        )
        for rank in outcome.results:
            rms, num_scaled, num_tensors = rank["stats"][step]
            assert rms == pytest.approx(exact, rel=1e-4)
            # The whole model, each tensor once, in every layout.
            assert num_tensors == reference.results[0]["stats"][step][2]
            assert num_scaled == (num_tensors if guard else 0)
        words = f"update RMS: {rms:.6E}"
        if guard:
            words += f" | tensors matched to 0.25: {num_scaled} of {num_tensors}"
        assert lines[step + 1] == words
        scalars = outcome.results[-1]["scalars"]
        assert scalars["adams/update-rms"][step + 1] == rms
        assert scalars.get("adams/tensors-scaled", {}).get(step + 1) == (
            num_scaled if guard else None
        )
    assert outcome.results[-1]["num_wandb"] == (2 if guard else 1) * NUM_STEPS


@pytest.mark.parametrize("name", thinned(ALL, full=PLAIN_ONES))
def test_ranks_agree_on_the_rms_of_whole_params(
    cluster: Cluster, runs: dict[str, Outcome], name: str
) -> None:
    for guard in ("", MATCH):
        outcome = run(cluster, runs, name, guard)
        for step in range(NUM_STEPS):
            known: dict[str, torch.Tensor] = {}
            for number, rank in enumerate(outcome.results):
                for param, values in rank["rms"][step].items():
                    # Stages and expert parallel ranks have other params by the same names.
                    is_shared = "pp" not in name and not ("ep2" in name and "experts" in param)
                    key = param if is_shared else f"{number}.{param}"
                    assert torch.equal(known.setdefault(key, values), values), param
            for rms, factor in known.values():
                assert rms > 0
                assert factor == pytest.approx(0.25 / rms.item() if guard else 1)


def test_rms_of_whole_params_is_that_of_one_process(
    cluster: Cluster, runs: dict[str, Outcome]
) -> None:
    for guard in ("", MATCH):
        whole = run(cluster, runs, "one", guard).results[0]["rms"]
        for name in ("dp2", "tp2", "tp2_dp2", "instances2"):
            for rank in run(cluster, runs, name, guard).results:
                for step in range(2):
                    for param, values in rank["rms"][step].items():
                        # Gradients are added up in another order, also of elements that have
                        # next to none.
                        assert values[0] == pytest.approx(whole[step][param][0].item(), rel=2e-2)


CAP = "--adams-max-update-rms 0.4"


@pytest.mark.parametrize(
    ("guard", "precision"),
    thinned(product((MATCH, CAP), ("", "--bf16")), full=((MATCH, "--bf16"), (CAP, ""))),
)
def test_matched_and_capped_updates_have_the_same_bits_sharded_over_dp_or_not(
    cluster: Cluster, guard: str, precision: str
) -> None:
    # Sums of squares differ in their order where shards differ, and the clip coefficient with them.
    flags = f"--train-iters 6 --clip-grad 0 {guard} {precision}"
    sharded = cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} {flags}")
    whole = cluster.run(TRAIN, 2, argv=f"{ADAMS} {flags}")
    unguarded = cluster.run(PLAIN_TRAIN, 2, argv=f"{ADAMS} {flags.replace(guard, '')}")
    assert_same(sharded, whole, "losses", "model")
    assert sharded.results[0]["stats"] == whole.results[0]["stats"]
    num_scaled = [scaled for _, scaled, _ in sharded.results[0]["stats"]]
    assert max(num_scaled) > 0
    assert any(
        not torch.equal(tensor, unguarded.results[0]["model"][name])
        for name, tensor in whole.results[0]["model"].items()
    )


@pytest.mark.parametrize(
    "name",
    thinned(["dp2", "tp2_dp2", "dp2_plain_bf16", "precision_aware", "scaled_state"], full=["dp2"]),
)
def test_a_cap_that_never_bites_changes_no_bit(
    cluster: Cluster, runs: dict[str, Outcome], name: str
) -> None:
    capped = run(cluster, runs, name, "--adams-max-update-rms 50")
    assert_same(capped, run(cluster, runs, name), "losses", "model")
    assert all(scaled == 0 for _, scaled, _ in capped.results[0]["stats"])
    num_tensors = capped.results[0]["stats"][0][2]
    assert all(f"capped at 50.0: 0 of {num_tensors}" in x for x in logged(capped).values())


def test_the_log_changes_no_bit_and_is_at_the_interval(cluster: Cluster) -> None:
    flags = f"{DISTRIBUTED} --bf16 --train-iters 7"
    often = cluster.run(TRAIN, 2, argv=f"{flags} --log-interval 1")
    seldom = cluster.run(TRAIN, 2, argv=f"{flags} --log-interval 3")
    assert_same(often, seldom, "losses", "model")
    # Megatron logs the first step, too, on the screen alone.
    assert sorted(logged(seldom)) == [1, 3, 6]
    assert [rms is not None for rms in seldom.results[0]["rms"]] == [
        step in (1, 3, 6) for step in range(1, 8)
    ]
    all_steps = [rms for rms, *_ in often.results[0]["stats"]]
    assert [rms for rms, *_ in seldom.results[0]["stats"]] == [all_steps[i] for i in (0, 2, 5)]
    assert seldom.results[0]["scalars"]["adams/update-rms"] == {3: all_steps[2], 6: all_steps[5]}
    # Steps that are logged have another kernel, the first among them.
    assert [rank["num_late_kernels"] for rank in seldom.results] == [0] * len(seldom.results)


@pytest.mark.parametrize("guard", ["", MATCH])
def test_a_step_that_is_skipped_has_no_rms(cluster: Cluster, guard: str) -> None:
    flags = "--fp16 --initial-loss-scale 1048576 --hysteresis 1 --loss-scale-window 2"
    outcome = cluster.run(TRAIN, 2, argv=f"{DISTRIBUTED} --train-iters 8 {flags} {guard}")
    skipped = outcome.results[0]["skipped"]
    assert {0, 1} == set(skipped)
    first = skipped.index(0)
    assert 1 in skipped[first:], "one after a step that was counted"
    for step, was_skipped in enumerate(skipped, 1):
        assert (logged(outcome)[step] == "update RMS: none, the step was skipped") == was_skipped


@pytest.mark.parametrize("flags", [f"{DISTRIBUTED} {MATCH}", f"{AWARE} --adams-max-update-rms 0.4"])
def test_resumed_run_equals_uninterrupted_one(
    cluster: Cluster, checkpoints: Path, flags: str
) -> None:
    base = f"{flags} {STEPS}"
    whole = cluster.run(PLAIN_TRAIN, 2, argv=f"{base} --save {checkpoints}").results
    resumed = cluster.run(PLAIN_TRAIN, 2, argv=f"{base} {choose(checkpoints, SAVED_AT)}")
    for rank in (*whole, *resumed.results):
        for part in rank["parts"]:
            for shard in part["shards"]:
                assert set(shard["state"]) <= {"exp_avg", "master_param"}
    if "--bf16" not in flags:
        assert_continues(resumed.results, whole)
        return
    assert_continues(resumed, whole, what=("main_param", "exp_avg"))


FIELDS = {"adams_match_rms": 0.2}
MODULES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp4": (4, {}),
    # A Probe's TP is sequence parallel.
    "tp2": (2, {"tp_size": 2, "sequence_parallel": True}),
    "tp2_dp2": (4, {"tp_size": 2, "sequence_parallel": True}),
    "tp2_plain": (2, {"tp_size": 2, "sequence_parallel": True, "distributed": False}),
    "cp2": (2, {"cp_size": 2}),
}


@pytest.fixture(scope="module")
def matched(cluster: Cluster) -> dict[str, Any]:
    rank = module_runs.run(cluster, 1, distributed=False, fields=FIELDS)[0]
    plain = module_runs.run(cluster, 1, distributed=False)[0]
    assert not torch.allclose(rank["params"]["weight"], plain["params"]["weight"], atol=1e-2)
    return rank


@pytest.mark.parametrize("name", thinned(MODULES, full=["tp2"]))
def test_matched_updates_of_a_layout_are_those_of_one_process(
    cluster: Cluster, matched: dict[str, Any], name: str
) -> None:
    num_ranks, options = MODULES[name]
    ranks = module_runs.run(cluster, num_ranks, fields=FIELDS, **options)
    for group in (ranks[:2], ranks[2:]) if name == "tp2_dp2" else (ranks,):
        assert_matches(group, matched, sharded_over_tp="tp_size" in options)


def test_experts_are_matched_as_in_one_process(cluster: Cluster) -> None:
    single = module_runs.run(cluster, 1, distributed=False, experts=True, fields=FIELDS)[0]
    for distributed in (True, False):
        ranks = module_runs.run(
            cluster, 2, ep_size=2, experts=True, fields=FIELDS, distributed=distributed
        )
        assert_matches(ranks, single)
        for rank, number in zip(ranks, range(2), strict=True):
            torch.testing.assert_close(
                rank["params"]["experts.0"],
                single["params"][f"experts.{number}"],
                rtol=1e-4,
                atol=1e-5,
            )


def test_ranks_without_params_and_frozen_stages_take_part(cluster: Cluster) -> None:
    sizes = (4, 8)
    single = module_runs.run(cluster, 1, distributed=False, sizes=sizes, fields=FIELDS)[0]
    ranks = module_runs.run(cluster, 4, sizes=sizes, fields=FIELDS)
    assert [rank["state"] for rank in ranks] == [8, 32, 4, 0]
    assert_matches(ranks, single)
    for distributed in (True, False):
        ranks = module_runs.run(
            cluster, 2, pp_size=2, frozen_stages=[1], distributed=distributed, fields=FIELDS
        )
        assert ranks[1]["state"] == 0


OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction 0.5"


OVERLAP = "--overlap-cpu-optimizer-d2h-h2d"


@pytest.mark.parametrize(
    ("flags", "guard"),
    thinned(
        product(("", OVERLAP), ("", MATCH, CAP)),
        full=(("", MATCH), (OVERLAP, ""), ("", CAP)),
    ),
)
def test_offloaded_updates_are_logged_matched_and_capped_as_others(
    cluster: Cluster, flags: str, guard: str
) -> None:
    off = cluster.run(TRAIN, 2, argv=f"{AWARE} {COMMON} {guard}")
    on = cluster.run(PLAIN_TRAIN, 2, argv=f"{AWARE} {COMMON} {guard} {OFFLOAD} {flags}")
    assert logged(on) == logged(off)
    assert sorted(logged(on)) == [*range(1, NUM_STEPS + 1)]
    assert_same(on, off, "losses", "model")


def test_offloading_rank_without_params_takes_part(cluster: Cluster) -> None:
    sizes = (4, 8)
    fields = {**FIELDS, "use_precision_aware_optimizer": True}
    off, on = (
        module_runs.run(cluster, 4, sizes=sizes, fields={**fields, **offload})
        for offload in ({}, {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5})
    )
    assert [rank["main"] for rank in on] == [8, 32, 4, 0]
    for mine, theirs in zip(on, off, strict=True):
        for name, tensor in theirs["params"].items():
            assert torch.equal(mine["params"][name], tensor), name


REFUSED = {
    f"--optimizer adam {MATCH}": "--adams-match-rms 0.25 with --optimizer adam: it belongs to",
    "--optimizer sgd --adams-max-update-rms 1": (
        "--adams-max-update-rms 1.0 with --optimizer sgd: it belongs to"
    ),
    f"{DISTRIBUTED} --adams-match-rms 0": "must be finite and > 0; leave it out",
    f"{DISTRIBUTED} --adams-max-update-rms nan": (
        "--adams-max-update-rms nan with --optimizer adams:"
    ),
    f"{DISTRIBUTED} {MATCH} --adams-max-update-rms 1": "must be one of the two",
}
SHARDS = {
    "--tensor-parallel-num-weight-shards": (
        "--adams-match-rms 0.25 with --tensor-parallel-num-weight-shards 2 and tensor parallel size"
    ),
    "--expert-tensor-parallel-num-weight-shards": (
        "with --expert-tensor-parallel-num-weight-shards 2 and tensor parallel size 1: not"
    ),
}


def test_flags_that_say_nothing_are_refused(cluster: Cluster) -> None:
    answers = cluster.run(REFUSALS, 1, commands=list(REFUSED)).results[0]
    for message, words in zip(answers, REFUSED.values(), strict=True):
        assert message is not None and words in message
        assert re.search("; (leave|remove) ", message)


def test_more_shards_than_tensor_parallel_ranks_are_refused(cluster: Cluster) -> None:
    for flag, words in SHARDS.items():
        if not cluster.run(HAS, flag=flag).results[0]:
            pytest.skip(f"this Megatron has no {flag} (0.18)")
        command = f"{DISTRIBUTED} {MATCH} {flag} 2"
        (message,) = cluster.run(REFUSALS, 1, commands=[command]).results[0]
        assert message is not None and words in message
        assert re.search("; (leave|remove) ", message)


# One microbatch, and no norm, whose sum has another order: the arithmetic is the same.
FSDP_EXACT = f"{ADAMS} {COMMON} --clip-grad 0 --micro-batch-size 4 --bf16"
FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --data-parallel-sharding-strategy"


@pytest.mark.parametrize("guard", thinned(["", MATCH, CAP], full=[CAP]))
def test_updates_under_megatron_fsdp_are_those_of_the_distributed_optimizer(
    fsdp_cluster: Cluster, guard: str
) -> None:
    base = f"{FSDP_EXACT} {guard}"
    plain = fsdp_cluster.run(PLAIN_TRAIN, 2, argv=f"{base} --use-distributed-optimizer")
    assert len(logged(plain)) == NUM_STEPS
    for strategy in ("no_shard", "optim_grads_params"):
        flags = f"{FSDP} {strategy} --megatron-fsdp-main-grads-dtype fp32"
        outcome = fsdp_cluster.run(TRAIN_FSDP, 2, argv=f"{base} {flags}")
        assert logged(outcome) == logged(plain)
        for mine, theirs in zip(outcome.results, plain.results, strict=True):
            assert mine["losses"] == theirs["losses"]


FSDP_LAYOUTS = {
    # Of whole params and experts: as in one process, and on four ranks without FSDP.
    "tp2": (1, TP2),
    "ep2": (4, "--num-experts 4 --expert-model-parallel-size 2"),
}


@pytest.mark.parametrize("name", FSDP_LAYOUTS)
def test_updates_under_megatron_fsdp_are_those_of_whole_params_in_a_layout(
    fsdp_cluster: Cluster, name: str
) -> None:
    num_plain, layout = FSDP_LAYOUTS[name]
    base = f"{ADAMS} {COMMON} --swiglu --disable-bias-linear {MATCH}"
    flags = f"{base} --use-distributed-optimizer {layout if num_plain > 1 else ''}"
    plain = logged(fsdp_cluster.run(PLAIN_TRAIN, num_plain, argv=flags))
    flags = f"{base} {layout} {FSDP} optim_grads_params"
    mine = logged(fsdp_cluster.run(TRAIN_FSDP, 4, argv=flags))
    assert len(plain) == NUM_STEPS
    for step, words in plain.items():
        my_rms, their_rms = (float(line.split()[2]) for line in (mine[step], words))
        assert my_rms == pytest.approx(their_rms, rel=2e-2)
        # As many tensors, all of them.
        assert mine[step].split("|")[1] == words.split("|")[1]


DEFAULT_DTYPES = {
    "adam": "--optimizer adam --use-distributed-optimizer --bf16",
    "logged": f"{DISTRIBUTED} --bf16",
    "capped": f"{DISTRIBUTED} --bf16 --adams-max-update-rms 0.3",
    "matched": f"{AWARE} {MATCH} --exp-avg-dtype fp16 --main-params-dtype fp16",
    "fp8": f"{AWARE} {MATCH} --exp-avg-dtype fp8",
    "offloaded": f"{AWARE} --adams-max-update-rms 0.3 --optimizer-cpu-offload",
}


@pytest.mark.parametrize("name", thinned(DEFAULT_DTYPES, full=("logged",)))
def test_default_dtype_of_the_program_changes_no_bit(cluster: Cluster, name: str) -> None:
    """As it changes none of Adam's: Megatron names the dtype of its own tensors."""
    argv = f"{DEFAULT_DTYPES[name]} --train-iters {NUM_STEPS}"
    expected, under_bf16 = (
        cluster.run(TRAIN_UNDER, 2, argv=argv, dtype=dtype).results
        for dtype in ("float32", "bfloat16")
    )
    assert_same(under_bf16, expected, "losses", "grad_norms", "model")
    assert {len(rank[key]) for rank in expected for key in ("losses", "grad_norms")} == {NUM_STEPS}
