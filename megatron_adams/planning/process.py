"""Starts the process that computes a plan, and reads its answer."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_adams.planning.results import Plan

# How much of what the process printed is shown where it failed.
_TAIL = 3000


class PlanError(ValueError):
    """There is no plan; the message says what to change.

    Attributes:
        is_refusal: whether the flags are to blame, and not the planner.
    """

    def __init__(self, message: str, *, is_refusal: bool) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


def compute(
    flags: Sequence[str], num_ranks: int, report: Callable[[str], None] = lambda line: None
) -> Plan:
    """Count the bytes of every rank of a job.

    Args:
        flags: of the training script, as on its command line.
        num_ranks: processes of the job.
        report: is called with a line of progress now and then.

    Raises:
        PlanError: Megatron or `plan` refuses the flags, or planning failed.
    """
    if num_ranks < 1:
        raise PlanError(f"{num_ranks} ranks: must be at least 1", is_refusal=True)
    request = json.dumps({"flags": [str(flag) for flag in flags], "num_ranks": num_ranks})
    command = [sys.executable, "-m", "megatron_adams.planning.worker"]
    answer: dict[str, object] = {}
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            command,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                # Where it has ended already, its exit code says so.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(request)
                    process.stdin.close()
                for line in process.stdout:
                    answer = json.loads(line)
                    if "progress" in answer:
                        report(str(answer["progress"]))
            except BaseException:
                process.kill()
                raise
        if "refused" in answer:
            raise PlanError(str(answer["refused"]), is_refusal=True)
        if "plan" not in answer:
            log.seek(0)
            raise PlanError(
                f"planning failed with exit code {process.returncode}:\n{log.read()[-_TAIL:]}",
                is_refusal=False,
            )
    return Plan.from_json(answer["plan"])


def _environment() -> dict[str, str]:
    """This process's, without its GPUs, its place in a job, and the network."""
    package = Path(__file__).resolve().parents[2]
    path = [str(package), os.environ.get("PYTHONPATH", "")]
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(("TORCHELASTIC_", "PET_", "NVTE_"))
    }
    return {
        **inherited,
        "CUDA_VISIBLE_DEVICES": "",
        # Megatron wants it with tensor parallelism.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
