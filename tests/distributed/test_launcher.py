"""The launcher under torchrun, on the example's script: what a user types."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.cases import SCRIPT, TINY_GPT
from tests.harness.cluster import REPO, Cluster

TRAIN = "tests.distributed.cases:train"
TIMEOUT_S = 240


def torchrun(*arguments: str, num_ranks: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks, which a kill would leave behind
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def launch(
    flags: str, script: Path = SCRIPT, num_ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "megatron_adams.launch", "--cpu-rehearsal", str(script)]
    return torchrun(*launcher, *TINY_GPT.split(), *flags.split(), num_ranks=num_ranks)


def losses(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if "lm loss:" in line and "iteration" in line]
    return [line.partition("lm loss:")[2].split()[0] for line in lines]


BASE = "--optimizer adams --use-distributed-optimizer --train-iters 6"
ASYNCHRONOUS = (
    f"{BASE} --save-interval 3 --async-save --use-persistent-ckpt-worker --async-strategy mcore"
)

KILLS_ITS_WORKER = f"""
import os, runpy, signal

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.training import training

if __name__ == "__main__":
    train_step = training.train_step

    def train_step_after_kill(*args, iteration, **kwargs):
        if iteration == 5:
            # The save of iteration 3 is complete by then, however slow the machine is.
            training.maybe_finalize_async_save(blocking=True)
            if os.environ["RANK"] == "1":
                os.kill(PersistentAsyncCaller._persistent_process.pid, signal.SIGKILL)
        return train_step(*args, iteration=iteration, **kwargs)

    training.train_step = train_step_after_kill
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.mark.timeout(3 * TIMEOUT_S)
def test_asynchronous_save_under_torchrun_is_resumed(cluster: Cluster, tmp_path: Path) -> None:
    whole = launch(f"{ASYNCHRONOUS} --save {tmp_path}")
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert "scheduled an async checkpoint save at iteration       3" in whole.stdout
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert "optimizer ....................................... adams" in whole.stdout
    resumed = cluster.run(TRAIN, 2, argv=f"{BASE} --load {tmp_path} --ckpt-step 3")
    assert len(losses(whole.stdout)) == 6
    # Megatron logs the first iterations after a resume as a mean over two.
    assert losses(resumed.log)[2:] == losses(whole.stdout)[5:] != []


def test_death_of_the_checkpoint_worker_ends_the_job(tmp_path: Path) -> None:
    script = tmp_path / "kills_its_worker.py"
    script.write_text(KILLS_ITS_WORKER)
    checkpoints = tmp_path / "checkpoints"
    run = launch(f"{ASYNCHRONOUS} --save {checkpoints}", script=script)
    assert run.returncode != 0
    assert "the checkpoint worker (pid" in run.stdout + run.stderr
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_unsupported_flag_ends_the_job_with_its_sentence() -> None:
    run = launch("--optimizer adams --train-iters 1 --use-torch-fsdp2", num_ranks=1)
    assert run.returncode != 0
    assert "--use-torch-fsdp2 with --optimizer adams: not supported" in run.stderr
