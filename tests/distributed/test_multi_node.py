"""A job of two nodes: what dies is started again, and the training goes on from its checkpoint.

Two torchrun agents on one machine, each with one rank, meet as on a cluster: over c10d, by the
PET_* variables that a job's script exports. Whatever is killed gets SIGKILL, and cannot save.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.cases import SCRIPT, TINY_GPT
from tests.distributed.checkpoint_files import differing
from tests.harness.cluster import REPO, Cluster
from tests.harness.thinning import thinned

TIMEOUT_S = 240
FLAGS = "--optimizer adams --use-distributed-optimizer --train-iters 6 --save-interval 2"

# The second node's rank stops before iteration 4, the first time that it gets there, and leaves its
# process's number in a file. Saved are iterations 2, 4 and 6.
HELD_UP = f"""
import os, pathlib, runpy, time

from megatron.training import training

if __name__ == "__main__":
    train_step = training.train_step

    def train_step_or_wait(*args, iteration, **kwargs):
        note = pathlib.Path(__file__).with_name("held_up")
        if iteration == 3 and os.environ["PET_NODE_RANK"] == "1" and not note.exists():
            note.with_suffix(".part").write_text(str(os.getpid()))
            note.with_suffix(".part").rename(note)
            time.sleep({TIMEOUT_S})
        return train_step(*args, iteration=iteration, **kwargs)

    training.train_step = train_step_or_wait
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


class TwoNodes:
    """A job of two nodes, each a torchrun agent.

    Args:
        folder: for script, logs and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        (folder / "script.py").write_text(HELD_UP)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        """Start a node's agent."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_NODE_RANK": str(node),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{self._port}",
            "PET_RDZV_ID": "two-nodes",
            # A node is taken for dead after three intervals (s) without a sign of life.
            "PET_RDZV_CONF": f"is_host={int(node == 0)},keep_alive_interval=3",
            "PET_LOCAL_ADDR": "127.0.0.1",
            "PET_MAX_RESTARTS": "2",
            # Otherwise the next life's ranks find the addresses of the dead in their store.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "-m", "megatron_adams.launch"]
        command += ["--cpu-rehearsal", str(self.folder / "script.py"), *TINY_GPT.split()]
        command += [
            *FLAGS.split(),
            "--save",
            str(self.checkpoints),
            "--load",
            str(self.checkpoints),
        ]
        with open(self.folder / f"node-{node}.log", "ab") as log:
            self.agents[node] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait_for_rank(self) -> int:
        """Wait until the second node's rank is held up before a step; return its process."""
        note = self.folder / "held_up"
        deadline = time.monotonic() + TIMEOUT_S
        while not note.exists():
            assert time.monotonic() < deadline, f"iteration 4 not reached\n{self.log()}"
            assert self.agents[0].poll() is None, self.log()
            time.sleep(0.05)
        return int(note.read_text())

    def log(self) -> str:
        """The nodes' logs."""
        files = sorted(self.folder.glob("node-*.log"))
        return "\n".join(f"--- {file.name}:\n{file.read_text()[-4000:]}" for file in files)

    def stop(self) -> None:
        """End the agents that still run, and with them their ranks."""
        for agent in self.agents.values():
            agent.terminate()
        for agent in self.agents.values():
            agent.wait()


@pytest.fixture(scope="module", params=thinned(["node", "rank"], full=["rank"]))
def two_nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TwoNodes:
    """A job whose second node lost its rank, or its agent with the rank; ended."""
    job = TwoNodes(tmp_path_factory.mktemp("two_nodes"))
    try:
        job.start(0)
        job.start(1)
        rank = job.wait_for_rank()
        if request.param == "node":
            job.agents[1].kill()
        os.kill(rank, signal.SIGKILL)
        if request.param == "node":
            job.agents[1].wait()
            job.start(1)  # as a cluster does, on the same node or on another
        for agent in job.agents.values():
            assert agent.wait(TIMEOUT_S) == 0, job.log()
    finally:
        job.stop()
    return job


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of the same training on two ranks that nothing stops."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    cluster.run("tests.distributed.cases:train", 2, argv=f"{FLAGS} --save {folder}")
    return folder


@pytest.mark.timeout(5 * TIMEOUT_S)
def test_job_that_lost_a_node_or_a_rank_ends_with_the_bits_of_an_uninterrupted_one(
    two_nodes: TwoNodes, uninterrupted: Path
) -> None:
    for iteration in ("iter_0000002", "iter_0000004", "iter_0000006"):
        assert differing(two_nodes.checkpoints / iteration, uninterrupted / iteration) == []
    assert differing(uninterrupted / "iter_0000004", uninterrupted / "iter_0000006") != []


@pytest.mark.timeout(5 * TIMEOUT_S)
def test_next_life_resumes_from_the_last_checkpoint(two_nodes: TwoNodes) -> None:
    # Rank 0, which says it, is on either node.
    logs = "".join(file.read_text() for file in two_nodes.folder.glob("node-*.log"))
    resumed = re.findall(r"successfully loaded checkpoint from .* at iteration (\d+)", logs)
    assert resumed == ["2"]
