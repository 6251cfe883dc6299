"""The doctor's knowledge of Megatron: which kernels a job needs, and which flags it refuses."""

from typing import Any

import pytest

from megatron_adams.doctor import Status, megatron
from tests.distributed.test_fsdp import fsdp
from tests.harness.cluster import Cluster

KERNELS = "tests.distributed.doctor_cases:kernels"
ANSWERS = "tests.distributed.doctor_cases:answers"

ADAMS = "--optimizer adams --train-iters 1"
SHARDED = f"{ADAMS} --use-distributed-optimizer"
AWARE = f"{SHARDED} --use-precision-aware-optimizer"
JOBS = {
    "fp32_aware": f"{AWARE} --exp-avg-dtype bf16",
    "bf16": f"{SHARDED} --bf16",
    "bf16_plain": f"{ADAMS} --bf16",
    "fp16_matched": f"{SHARDED} --fp16 --adams-match-rms 0.2",
    "remainders": f"{AWARE} --bf16 --main-grads-dtype bf16",
    "whole": f"{AWARE} --bf16 --adams-no-param-remainders",
    "scaled": f"{AWARE} --bf16 --main-params-dtype fp16 --exp-avg-dtype fp8",
    "offload": f"{AWARE} --bf16 --optimizer-cpu-offload --optimizer-offload-fraction 0.5",
}
FSDP = f"{ADAMS} --bf16 {fsdp('optim_grads_params')}"
FSDP_JOBS = {
    "fsdp": FSDP,
    "fsdp_aware": f"{FSDP} --use-precision-aware-optimizer --exp-avg-dtype bf16",
    "fsdp_main": f"{FSDP} --use-precision-aware-optimizer --megatron-fsdp-main-params-dtype auto",
}


@pytest.mark.parametrize("name", JOBS)
def test_kernels_that_the_doctor_looks_for_are_those_of_the_run(
    cluster: Cluster, name: str
) -> None:
    said, asked = cluster.run(KERNELS, 1, argv=JOBS[name]).results[0]
    assert said == asked and asked


@pytest.mark.parametrize("name", FSDP_JOBS)
def test_kernels_of_megatron_fsdp_are_those_of_the_run(fsdp_cluster: Cluster, name: str) -> None:
    outcome = fsdp_cluster.run(KERNELS, 2, argv=FSDP_JOBS[name], fsdp=True)
    for said, asked in outcome.results:
        assert said == asked and asked


# Flags -> the words of the refusal, and of whom it is.
REFUSALS = {
    "--optimizer adams --ckpt-format torch_dcp": "--ckpt-format torch_dcp with --optimizer adams",
    "--optimizer adams --adam-eps 0": "--adam-eps 0.0 with --optimizer adams",
    "--optimizer adam --adams-match-rms 0.2": "it belongs to --optimizer adams",
    "--optimizer adams --num-attention-heads 5": "hidden_size % args.num_attention_heads == 0",
    "--optimizer adams --pipeline-model-parallel-size 3": "pipeline",
    "--optimizer adamw": "invalid choice: 'adamw'",
    "--optimizer adams --lr fast": "argument --lr: invalid float value: 'fast'",
}


def test_flags_are_refused_in_the_words_of_the_job(cluster: Cluster) -> None:
    found = cluster.run(ANSWERS, 1, commands=[*REFUSALS]).results[0]
    for (flags, words), answer in zip(REFUSALS.items(), found, strict=True):
        assert answer["refused"], flags
        assert words in answer["refused"], (flags, answer["refused"])
        assert answer["arguments"] == {}


ACCEPTED = {
    "": 1,
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2": 4,
    "--num-experts 4 --expert-model-parallel-size 4 --disable-bias-linear": 4,
    "--num-distributed-optimizer-instances 2 --use-distributed-optimizer": 2,
}


def test_world_size_is_the_fewest_ranks_or_the_one_given(cluster: Cluster) -> None:
    commands = [f"--optimizer adams {flags}" for flags in ACCEPTED]
    found = cluster.run(ANSWERS, 1, commands=commands).results[0]
    assert [answer["refused"] for answer in found] == [None] * len(ACCEPTED)
    assert [answer["world_size"] for answer in found] == [*ACCEPTED.values()]
    found = cluster.run(ANSWERS, 1, commands=commands[:2], world_size=8).results[0]
    assert [answer["world_size"] for answer in found] == [8, 8]
    (wrong,) = cluster.run(ANSWERS, 1, commands=commands[1:2], world_size=6).results[0]
    assert "world size (6)" in wrong["refused"] or "world_size (6)" in wrong["refused"]


def judged(found: dict[str, Any], **answer: Any) -> dict[str, Status]:
    """The checks that the doctor makes of an answer."""
    whole = {
        "version": "0.19.2",
        "supported": ">=0.16,<0.21",
        "refused": None,
        "transformer_engine": "missing",
        "apex": "missing",
        "flags": {"unknown": [], **found},
        **answer,
    }
    probe = megatron.Probe(process=None, flags=("--bf16",), for_gpu=True)  # type: ignore[arg-type]
    checks = [*megatron._import_checks(whole, probe), *megatron._flag_checks(whole, probe)]
    return {check.name: check.status for check in checks}


def test_unknown_flags_and_other_optimizers_are_told_of(cluster: Cluster) -> None:
    commands = [
        "--optimizer adam --my-own-flag 3",
        "--optimizer adams --adams-match-rsm 0.2 --adam-beta2 0.999",
        "--optimizer adams --transformer-impl transformer_engine",
    ]
    own, typo, layers = cluster.run(ANSWERS, 1, commands=commands).results[0]
    statuses = judged(own)
    assert statuses["flags.unknown.my-own-flag"] is Status.WARNING
    assert statuses["flags.optimizer"] is Status.WARNING
    statuses = judged(typo)
    assert statuses["flags.unknown.adams-match-rsm"] is Status.PROBLEM
    assert statuses["flags.warning.0"] is Status.WARNING and "0.999" in typo["warnings"][0]
    assert judged(layers)["flags.transformer-engine"] is Status.PROBLEM
    assert "flags.transformer-engine" not in judged(layers, transformer_engine="imported")


def test_package_that_megatron_passes_over_in_silence_is_told_of() -> None:
    statuses = judged({"refused": "no"}, transformer_engine="OSError: undefined symbol")
    assert statuses["megatron.transformerengine"] is Status.PROBLEM
    assert judged({"refused": "no"}, refused="0.16")["megatron.import"] is Status.PROBLEM
