"""The launcher under torchrun, on the example's script: what a user types."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.cases import SCRIPT, TINY_GPT
from tests.distributed.cluster import REPO

TIMEOUT_S = 240


def torchrun(*arguments: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def launch(flags: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "megatron_adams.launch", "--cpu-rehearsal"]
    return torchrun(*launcher, str(SCRIPT), *TINY_GPT.split(), *flags.split(), num_ranks=num_ranks)


def losses(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if "lm loss:" in line and "iteration" in line]
    return [line.partition("lm loss:")[2].split()[0] for line in lines]


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_asynchronous_save_and_resume_under_torchrun(tmp_path: Path) -> None:
    base = "--optimizer adams --use-distributed-optimizer --train-iters 6 "
    whole = launch(f"{base} --save {tmp_path} --save-interval 3 --async-save")
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert "optimizer ....................................... adams" in whole.stdout
    resumed = launch(f"{base} --load {tmp_path} --ckpt-step 3")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert len(losses(whole.stdout)) == 6
    # Megatron logs the first iterations after a resume as a mean over two.
    assert losses(resumed.stdout)[2:] == losses(whole.stdout)[5:] != []


def test_unsupported_flag_ends_the_job_with_its_sentence() -> None:
    run = launch("--optimizer adams --train-iters 1 --optimizer-cpu-offload")
    assert run.returncode != 0
    assert "--optimizer-cpu-offload with --optimizer adams: not supported" in run.stderr
