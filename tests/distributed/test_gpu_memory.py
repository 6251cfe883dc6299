"""--adams-log-gpu-memory on real Megatron, with nvidia-ml-py on a stand-in for the driver."""

import re
from pathlib import Path

import pytest

from tests.distributed.gpu_memory_cases import MIB, used_bytes
from tests.harness.cluster import Cluster, Outcome
from tests.unit import fake_nvml

TRAIN = "tests.distributed.gpu_memory_cases:train"
RECORDED = "tests.distributed.gpu_memory_cases:recorded"
ADAMS = "--optimizer adams --use-distributed-optimizer --bf16 --train-iters 4 --log-interval 2"
FLAG = "--adams-log-gpu-memory"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(fake_nvml.build(tmp_path_factory.mktemp("nvml")))


def logged(outcome: Outcome) -> dict[int, str]:
    lines = re.findall(r"^ iteration +(\d+)/ +4 \| (GPU memory.*) \|$", outcome.log, re.MULTILINE)
    return {int(iteration): words for iteration, words in lines}


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f}"


def test_least_and_most_of_the_ranks_are_logged_at_the_interval(
    cluster: Cluster, library: str, tmp_path: Path
) -> None:
    run = cluster.run(TRAIN, 2, argv=f"{ADAMS} {FLAG}", library=library, folder=str(tmp_path))
    # Megatron logs the first step, too, on the screen alone.
    assert logged(run) == {
        iteration: "GPU memory, GiB | "
        f"in use (NVML): {gib(used_bytes(iteration, 0))} to {gib(used_bytes(iteration, 1))} on "
        f"rank 1 | torch max allocated: {gib(30 * MIB)} to {gib(31 * MIB)} on rank 1 | "
        f"torch max reserved: {gib(39 * MIB)} to {gib(40 * MIB)} on rank 0"
        for iteration in (1, 2, 4)
    }
    used = {rank: {i: used_bytes(i, rank) for i in (2, 4)} for rank in range(2)}
    for written in (run.results[-1]["scalars"], run.results[-1]["wandb"]):
        assert written == {
            "adams/gpu-memory-used-bytes/min": used[0],
            "adams/gpu-memory-used-bytes/max": used[1],
            "adams/torch-max-allocated-bytes/min": {2: 30 * MIB, 4: 30 * MIB},
            "adams/torch-max-allocated-bytes/max": {2: 31 * MIB, 4: 31 * MIB},
            "adams/torch-max-reserved-bytes/min": {2: 39 * MIB, 4: 39 * MIB},
            "adams/torch-max-reserved-bytes/max": {2: 40 * MIB, 4: 40 * MIB},
        }


def test_each_rank_is_logged_for_another_optimizer_and_a_lost_gpu_ends_no_job(
    cluster: Cluster, library: str, tmp_path: Path
) -> None:
    argv = f"{ADAMS.replace('adams', 'adam')} {FLAG} ranks"
    run = cluster.run(TRAIN, 2, argv=argv, library=library, folder=str(tmp_path), lost_at=4)
    assert len(run.results[0]["losses"]) == 4
    ranks = re.findall(r"^   rank +(\d) \| in use \(NVML\): (.*?) \|", run.log, re.MULTILINE)
    assert ranks == [
        *((str(rank), gib(used_bytes(i, rank))) for i in (1, 2) for rank in range(2)),
        ("0", gib(used_bytes(4, 0))),
        ("1", "not known"),
    ]
    last = gib(used_bytes(4, 0))
    assert f"{last} to {last} on rank 0, not known on 1 of 2 ranks |" in logged(run)[4]
    assert "this rank's GPU: NVML: GPU is lost" in run.logs[1]
    scalars = run.results[-1]["scalars"]
    assert scalars["adams/gpu-memory-used-bytes/rank-0"] == {i: used_bytes(i, 0) for i in (2, 4)}
    assert scalars["adams/gpu-memory-used-bytes/rank-1"] == {2: used_bytes(2, 1)}
    assert scalars["adams/torch-max-reserved-bytes/rank-1"] == {2: 39 * MIB, 4: 39 * MIB}


def test_rehearsal_says_that_there_is_no_gpu_and_trains_as_without(cluster: Cluster) -> None:
    run = cluster.run(RECORDED, 2, argv=f"{ADAMS} {FLAG}")
    words = f"{FLAG}: no GPU here (CPU rehearsal), no memory of one is logged"
    assert run.log.count(words) == 1 and words in run.logs[-1]
    assert not logged(run) and not run.results[-1]["scalars"]
    without = cluster.run(RECORDED, 2, argv=ADAMS)
    assert "GPU memory" not in without.log and FLAG not in without.log.partition("arguments")[0]
    assert without.results[0]["losses"] == run.results[0]["losses"]


@pytest.mark.parametrize("fault", ["no_driver", "other_gpus"])
def test_job_is_refused_before_its_first_step_where_nvml_does_not_answer(
    cluster: Cluster, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no_driver":
        own, words = None, "no NVIDIA driver: libnvidia-ml.so.1 is not found; install the driver"
    else:
        own, words = library, "NVML: GPU is lost; megatron-adams doctor says more"
    run = cluster.run(
        TRAIN,
        2,
        argv=f"{ADAMS} {FLAG}",
        check=False,
        library=own,
        folder=str(tmp_path),
        lost_at=0,
    )
    assert run.codes[1] != 0
    assert f"ValueError: {FLAG}: " in run.logs[1] and words in run.logs[1]
    assert "or remove the flag" in run.logs[1]
    assert " iteration        1/" not in run.log
