"""What the job files tell Slurm, by stand-ins for its commands: what no Slurm here can show."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
JOBS = REPO / "examples" / "jobs" / "slurm"

# srun writes down how it was called, and exits with the status of a file.
STAND_INS = {
    "srun": """\
name=$(printf '%s\\n' "$@" | grep -A 1 'node.sh$' | tail -n 1)
{ echo "$name"; printf '%s\\n' "$@"; env | grep '^PET_\\|^SLURM_WAIT\\|^TORCH_'; } >"$CALLS/$name"
if [[ -e $CALLS/limit-near-$name ]]; then
  kill -USR1 $PPID  # as Slurm does
  sleep 0.3
  echo "$name is over" >>"$CALLS/requests"
fi
exit "$(cat "$CALLS/status-$name" 2>/dev/null || echo 0)"
""",
    "scancel": """\
echo "scancel $@" >>"$CALLS/requests"
""",
    "scontrol": """\
echo "$@" >>"$CALLS/requests"
[[ $* != *"show hostnames"* ]] || printf '%s\\n' gpu07 gpu08
[[ $* != *"show job"* ]] || cat "$CALLS/job"
""",
}


class Start:
    """One start of a job file.

    Attributes:
        output: what it printed.
        status: its exit status.
    """

    def __init__(self, folder: Path, file: str, *arguments: str, **environment: str) -> None:
        self._folder = folder
        for name, body in STAND_INS.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}")
            (folder / name).chmod(0o755)
        if not (folder / "job").exists():
            (folder / "job").write_text("JobId=7 JobState=RUNNING Reason=None PreemptTime=None X=1")
        run = subprocess.run(
            ["bash", JOBS / file, *arguments],
            env={
                **os.environ,
                "PATH": f"{folder}:{os.environ['PATH']}",
                "CALLS": str(folder),
                "SLURM_SUBMIT_DIR": str(REPO),
                "SLURM_JOB_ID": "70007",
                "SLURM_JOB_NODELIST": "gpu[07-08]",
                "SLURM_NNODES": "2",
                "SLURM_GPUS_ON_NODE": "8",
                "JOB_LOGS": str(folder / "logs"),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        self.output, self.status = run.stdout, run.returncode

    def srun(self, step: str) -> list[str]:
        """The arguments of a step's srun, and the variables that torchrun and srun read."""
        return (self._folder / step).read_text().splitlines()

    @property
    def was_requeued(self) -> bool:
        return "requeue 70007" in (self._folder / "requests").read_text().splitlines()


def fail(folder: Path, step: str, status: int) -> None:
    (folder / f"status-{step}").write_text(str(status))


def test_rendezvous_comes_from_slurms_variables(tmp_path: Path) -> None:
    train = Start(tmp_path, "pretrain.sbatch", "train.py", "--model", "1b").srun("train")
    for setting in (
        "PET_NNODES=2",
        "PET_NPROC_PER_NODE=8",
        "PET_RDZV_BACKEND=c10d",
        f"PET_RDZV_ENDPOINT=gpu07:{15000 + 70007 % 15000}",
        "PET_RDZV_ID=70007-0",
        "PET_MAX_RESTARTS=0",
        "PET_SHUTDOWN_TIMEOUT=600",
        "SLURM_WAIT=120",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ):
        assert setting in train
    assert "python\ntrain.py\n--model\n1b\n" in "\n".join(train)


def test_users_settings_win(tmp_path: Path) -> None:
    settings = {"MASTER_ADDR": "10.0.0.7", "PET_NPROC_PER_NODE": "4", "PET_MAX_RESTARTS": "2"}
    train = Start(tmp_path, "pretrain.sbatch", "train.py", **settings).srun("train")
    assert {"PET_NPROC_PER_NODE=4", "PET_MAX_RESTARTS=2"} <= {*train}
    assert any(line.startswith("PET_RDZV_ENDPOINT=10.0.0.7:") for line in train)


def test_doctor_expects_the_gpus_that_slurm_gave(tmp_path: Path) -> None:
    start = Start(tmp_path, "pretrain.sbatch", "train.py", JOB_DOCTOR_FLAGS="--strict --quick")
    asked = " ".join(start.srun("doctor"))
    assert "megatron_adams.cli doctor --expect-gpus 8 --strict --quick" in asked
    rehearsal = Start(tmp_path, "pretrain.sbatch", "train.py", "--cpu-rehearsal")
    asked = " ".join(rehearsal.srun("doctor"))
    assert "megatron_adams.cli doctor --cpu-rehearsal" in asked and "--expect-gpus" not in asked


@pytest.mark.parametrize("step", ["doctor", "train"])
def test_pyxis_runs_every_step_in_the_container(tmp_path: Path, step: str) -> None:
    image = {"JOB_IMAGE": "/images/adams.sqsh", "JOB_MOUNTS": "/data:/data"}
    contained = Start(tmp_path, "pretrain-pyxis.sbatch", "train.py", **image).srun(step)
    assert "--container-image=/images/adams.sqsh" in contained
    assert f"--container-mounts={REPO}:{REPO},/data:/data" in contained
    plain = Start(tmp_path, "pretrain.sbatch", "train.py").srun(step)
    assert [word for word in contained if "container" not in word] == plain


def test_pyxis_without_an_image_says_so(tmp_path: Path) -> None:
    start = Start(tmp_path, "pretrain-pyxis.sbatch", "train.py")
    assert start.status != 0 and "JOB_IMAGE: set it to an image" in start.output


def test_both_files_ask_slurm_for_the_same() -> None:
    files = [(JOBS / name).read_text() for name in ("pretrain.sbatch", "pretrain-pyxis.sbatch")]
    one, two = (re.findall(r"^#SBATCH .*", text, re.MULTILINE) for text in files)
    assert one == two
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@600"} <= {*one}


@pytest.mark.parametrize(
    ("job", "status", "requeued", "said"),
    [
        ("JobState=RUNNING PreemptTime=None", 0, False, "done"),
        ("JobState=RUNNING PreemptTime=None", 1, True, "crash 1 of 3: to the queue again"),
        ("JobState=RUNNING SuspendTime=None", 1, True, "crash 1 of 3"),  # no preemption set up
        ("JobState=RUNNING PreemptTime=2026-01-02T03:04:05", 1, True, "it is preempted"),
        ("JobState=RUNNING PreemptTime=2026-01-02T03:04:05", 0, True, "it is preempted"),
        ("JobState=COMPLETING PreemptTime=None", 143, False, "Slurm is ending it"),  # a scancel
    ],
)
def test_end_of_a_start(tmp_path: Path, job: str, status: int, requeued: bool, said: str) -> None:
    (tmp_path / "job").write_text(f"JobId=70007 {job} X=1\n")
    fail(tmp_path, "train", status)
    start = Start(tmp_path, "pretrain.sbatch", "train.py")
    assert said in start.output
    assert start.was_requeued == requeued
    assert start.status == (0 if requeued else status)


@pytest.mark.parametrize("step", ["doctor", "train"])
def test_sigusr1_stops_the_steps_and_requeues(tmp_path: Path, step: str) -> None:
    (tmp_path / f"limit-near-{step}").touch()
    fail(tmp_path, "train", 1)  # torchrun after SIGTERM
    start = Start(tmp_path, "pretrain.sbatch", "train.py")
    requests = (tmp_path / "requests").read_text().splitlines()
    assert "scancel --signal=TERM 70007" in requests
    assert requests.index(f"{step} is over") < requests.index("requeue 70007")
    assert start.was_requeued and "crash" not in start.output
    # A signal that came before there was a training must not let it start.
    assert (tmp_path / "train").exists() == (step == "train")


def test_node_that_is_not_fit_is_no_crash_and_is_not_retried(tmp_path: Path) -> None:
    fail(tmp_path, "doctor", 1)
    start = Start(tmp_path, "pretrain.sbatch", "train.py")
    assert start.status == 1 and not start.was_requeued
    assert "a node is not fit" in start.output
    assert not (tmp_path / "train").exists()


def test_nothing_to_run_is_refused(tmp_path: Path) -> None:
    start = Start(tmp_path, "pretrain.sbatch")
    assert start.status == 2 and "give the script and its flags" in start.output


def test_submitting_from_another_folder_is_refused(tmp_path: Path) -> None:
    start = Start(tmp_path, "pretrain.sbatch", "train.py", SLURM_SUBMIT_DIR=str(tmp_path))
    assert start.status == 2 and "submit from the repository's root" in start.output
