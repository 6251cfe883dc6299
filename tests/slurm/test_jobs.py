"""The Slurm jobs of examples/jobs/slurm, submitted to a Slurm of one machine.

One fixture runs all jobs at the same time, because most of their time is spent waiting; each test
reads what one of them left.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.cases import TINY_GPT
from tests.distributed.checkpoint_files import differing
from tests.slurm.local_slurm import LocalSlurm, wait_until

REPO = Path(__file__).resolve().parents[2]
JOB = "examples/jobs/slurm/pretrain.sbatch"
PACED = str(Path(__file__).with_name("paced_gpt.py"))
TIMEOUT_S = 240
LAUNCH = ["-m", "torch.distributed.run"]
LAUNCH += ["-m", "megatron_adams.launch", "--cpu-rehearsal", PACED, *TINY_GPT.split()]
LAUNCH += ["--optimizer", "adams", "--use-distributed-optimizer", "--exit-signal-handler"]
LAUNCH += ["--train-iters", "9", "--ckpt-format", "torch_dist"]

# A node that is not fit: no compiler, and a cache of kernels that cannot be written.
BROKEN_PYTHON = f"""\
#!/bin/bash
if [[ $SLURMD_NODENAME == n4 ]]; then
  export PATH=/nonexistent CXX=/nonexistent/c++ MEGATRON_ADAMS_CACHE_DIR=/proc/nonexistent
fi
exec {sys.executable} "$@"
"""

pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)


class Jobs:
    """Submits jobs, and reads what they leave.

    Args:
        folder: gets a subfolder for each job, with its output, logs and checkpoints.
    """

    def __init__(self, slurm: LocalSlurm, folder: Path) -> None:
        self.slurm = slurm
        self.folder = folder
        self._ids: dict[str, str] = {}
        self.environment = {
            **slurm.environment,
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "JOB_PYTHON": sys.executable,
            "JOB_DOCTOR_FLAGS": "--quick",  # without the import of Megatron: the training does it
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names do not resolve
            "PET_NPROC_PER_NODE": "1",
        }

    def submit(self, name: str, *words: str, **environment: str) -> None:
        """Submit a job from the repository's root; `words` are flags of sbatch, file, arguments."""
        folder = self.folder / name
        folder.mkdir()
        run = subprocess.run(
            ["sbatch", "--parsable", f"--output={folder}/output", *words],
            env={**self.environment, "JOB_LOGS": str(folder / "logs"), **environment},
            cwd=REPO,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        self._ids[name] = run.stdout.strip()

    def state(self, name: str) -> str:
        """A job's state, in Slurm's words."""
        shown = self.slurm.output("scontrol", "--oneliner", "show", "job", self._ids[name])
        found = re.search(r"JobState=(\S+)", shown)
        assert found, shown
        return found[1]

    def set_time_limit(self, name: str, minutes: int) -> None:
        """Change a job's time limit."""
        words = ("scontrol", "update", f"JobId={self._ids[name]}", f"TimeLimit={minutes}")
        assert self.slurm.output(*words) == ""

    def wait_for_restart(self, name: str, restart: int) -> None:
        """Return when a job has begun its restart of this number."""
        wait_until(
            lambda: f"restart {restart}: on " in self.output(name),
            f"restart {restart} of {name}",
            TIMEOUT_S,
            lambda: self.output(name) + self.logs(name)[-6000:],
        )

    def wait_for(self, name: str, *states: str) -> None:
        """Return when a job is in one of the states."""
        wait_until(
            lambda: self.state(name) in states,
            f"{name} in state {' or '.join(states)}",
            TIMEOUT_S,
            lambda: f"{self.state(name)}\n{self.output(name)}\n{self.logs(name)[-6000:]}",
        )

    def output(self, name: str) -> str:
        """What a job's script has printed."""
        path = self.folder / name / "output"
        return path.read_text() if path.exists() else ""

    def logs(self, name: str, pattern: str = "*") -> str:
        """The logs of a job's steps."""
        files = sorted((self.folder / name).glob(f"logs/restart-*/{pattern}"))
        return "\n".join(f"--- {file}:\n{file.read_text()}" for file in files)


@contextmanager
def uninterrupted_run(jobs: Jobs) -> Iterator[None]:
    """The same training without Slurm and without a stop, while the body runs."""
    folder = jobs.folder / "uninterrupted"
    folder.mkdir()
    environment = {**jobs.environment, "PACED_AT": "", "PET_NPROC_PER_NODE": "2"}
    command = [sys.executable, *LAUNCH, "--save", str(folder / "checkpoints")]
    with (
        open(folder / "output", "w") as log,
        subprocess.Popen(
            command, env={**environment, "PET_STANDALONE": "1"}, stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield
            assert process.wait(TIMEOUT_S) == 0, jobs.output("uninterrupted")[-4000:]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def jobs(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs, ended."""
    jobs = Jobs(slurm, tmp_path_factory.mktemp("jobs"))
    folder = jobs.folder / "preempted"
    save = ["--save", str(folder / "checkpoints"), "--load", str(folder / "checkpoints")]
    paced = {"PACED_AT": "3 6", "PACED_FOLDER": str(folder)}
    on_n1_n2 = ["--nodelist=n1,n2", "--gpus-per-node=1"]

    def wait_for_iteration(iteration: int) -> None:
        wait_until(
            (folder / str(iteration)).exists,
            f"iteration {iteration}",
            TIMEOUT_S,
            lambda: jobs.output("preempted") + jobs.logs("preempted")[-6000:],
        )

    jobs.submit("preempted", *on_n1_n2, "--signal=B:USR1@30", JOB, *LAUNCH, *save, **paced)
    with uninterrupted_run(jobs):
        wait_for_iteration(3)
        # Slurm looks at time limits every 30 s, and then sends what --signal says.
        jobs.set_time_limit("preempted", minutes=1)
        python = jobs.folder / "python"
        python.write_text(BROKEN_PYTHON)
        python.chmod(0o755)
        on_n3, on_n3_n4 = (
            ["--nodes=1", "--nodelist=n3", "--gpus-per-node=2"],
            ["--nodelist=n3,n4", "--gpus-per-node=1"],
        )
        crash = ["-c", "raise SystemExit(3)", "--cpu-rehearsal"]
        jobs.submit("crashing", *on_n3, JOB, *crash, JOB_MAX_CRASHES="2")
        # --strict: that AdamS would be slow is a fault.
        broken = {"JOB_PYTHON": str(python), "JOB_DOCTOR_FLAGS": "--quick --strict"}
        jobs.submit("broken", *on_n3_n4, JOB, *crash, **broken)
        recipe = ["examples/pretrain_gpt2/train.py", "--model", "124m", "--cpu-rehearsal"]
        recipe += ["--no-plan", "--out", str(jobs.folder / "recipe" / "out")]
        jobs.submit("recipe", *on_n3, JOB, *recipe, PET_NPROC_PER_NODE="2")
        jobs.wait_for_restart("preempted", 1)
        jobs.set_time_limit("preempted", minutes=60)
        wait_for_iteration(6)
        jobs.submit("urgent", *on_n1_n2, "--nodes=2", "--partition=high", "--wrap=true")
        for name, state in [
            ("urgent", "COMPLETED"),
            ("crashing", "FAILED"),
            ("broken", "FAILED"),
            ("recipe", "COMPLETED"),
            ("preempted", "COMPLETED"),
        ]:
            jobs.wait_for(name, state)
    return jobs


@pytest.fixture(scope="module")
def guarded(slurm: LocalSlurm, jobs: Jobs) -> str:
    """What Slurm says of a job's node and of the job, after the prolog failed on the node."""
    on_n4 = ["--partition=guarded", "--nodelist=n4", "--nodes=1", "--gpus-per-node=1"]
    jobs.submit("guarded", *on_n4, "--wrap=true")
    jobs.wait_for("guarded", "PENDING")

    def states() -> str:
        node = slurm.output(
            "sinfo", "--noheader", "--nodes=n4", "--partition=low", "--format=%T %E"
        )
        return f"{node}; {slurm.output('squeue', '--noheader', '--format=%r')}"

    wait_until(lambda: "held" in states(), "held job", TIMEOUT_S, states)
    return states()


def events(output: str) -> list[str]:
    """What a job's script has said, without times and logs' places."""
    said = re.findall(r"restart (\d+): (.*?)(?:; logs: .*)?$", output, re.MULTILINE)
    return [f"{restart}: {event}" for restart, event in said]


def test_time_limit_and_preemption_save_and_requeue(jobs: Jobs) -> None:
    assert events(jobs.output("preempted")) == [
        "0: on n[1-2]",
        "0: its time limit is near: SIGTERM to its steps",
        "0: its time limit is near: to the queue again",
        "1: on n[1-2]",
        "1: it is preempted: to the queue again",
        "2: on n[1-2]",
        "2: done",
    ]
    saved = (jobs.folder / "preempted" / "checkpoints").glob("iter_*")
    # Held before steps 4 and 7, told to stop, saved after them; no --save-interval is as short.
    assert sorted(path.name for path in saved) == ["iter_0000004", "iter_0000007", "iter_0000009"]


def test_stopped_job_ends_with_the_bits_of_an_uninterrupted_one(jobs: Jobs) -> None:
    stopped = jobs.folder / "preempted" / "checkpoints"
    whole = jobs.folder / "uninterrupted" / "checkpoints" / "iter_0000009"
    assert differing(stopped / "iter_0000009", whole) == []
    assert len(differing(stopped / "iter_0000007", whole)) > 10


def test_each_node_has_its_logs(jobs: Jobs) -> None:
    for restart in range(3):
        logs = jobs.folder / "preempted" / "logs" / f"restart-{restart}"
        names = sorted(re.sub(r"\.[^.]+\.log$", "", path.name) for path in logs.iterdir())
        assert names == ["doctor.0", "doctor.1", "train.0", "train.1"]


def test_recipe_trains_as_a_job(jobs: Jobs) -> None:
    assert events(jobs.output("recipe")) == ["0: on n3", "0: done"]
    assert "iteration        8/       8" in jobs.logs("recipe", "train.*")
    tracker = jobs.folder / "recipe" / "out" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "8"


def test_crashing_job_stays_down_at_its_limit(jobs: Jobs) -> None:
    assert events(jobs.output("crashing")) == [
        "0: on n3",
        "0: crash, exit status 3",
        "0: crash 1 of 2: to the queue again",
        "1: on n3",
        "1: crash, exit status 3",
        "1: crash 2 of 2 (JOB_MAX_CRASHES): it stays down",
    ]


def test_doctor_stops_the_job_before_the_training_and_names_the_node(jobs: Jobs) -> None:
    output = jobs.output("broken")
    assert events(output) == [
        "0: on n[3-4]",
        "0: a node is not fit: repair or drain it, or leave it out with --exclude, exit status 1",
    ]
    assert "node n4: NOT FIT" in output and "node n3" not in output
    assert "node n3: fit" in jobs.logs("broken", "doctor.*")
    assert jobs.logs("broken", "train.*") == ""


def test_prolog_drains_a_node_that_is_not_fit_and_says_why(slurm: LocalSlurm, guarded: str) -> None:
    assert guarded == "drained Prolog error; launch failed requeued held"
    said = (slurm.folder / "prolog.log").read_text()
    assert "megatron-adams-prolog node n4 is not fit" in said
    assert "NOT fit for a job on GPUs" in said
