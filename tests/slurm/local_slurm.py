"""A Slurm of one machine: munged, slurmctld and a slurmd for each virtual node, in one folder.

Debian's packages bring the programs; no file of the system's is read or written, and every daemon
is stopped by its process. The nodes share the machine: they differ by name and port, and count GPUs
that do not exist.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
REPOSITORY = Path(__file__).resolve().parents[2]
INSTALL = Path(__file__).with_name("install.sh")

# Each line makes a wait shorter or takes out what one machine does not have, cgroups for example.
# - cred_expire: a requeued job starts only when the credential of its last start has run out.
# - OverTimeLimit: a job on a busy machine is not killed at the limit that warned it.
# - GraceTime: how long a preempted job may take to save; it is requeued by then in any case.
_CONFIG = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PluginDir=/usr/lib/x86_64-linux-gnu/slurm-wlm
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
CommunicationParameters=DisableIPv6
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
OverTimeLimit=10
ReturnToService=2
GresTypes=gpu
PrologFlags=Alloc
Prolog={folder}/prolog
"""
_NODE = (
    "NodeName={name} NodeAddr=127.0.0.1 NodeHostname=localhost Port={port} CPUs=4 RealMemory=4000 "
    "Gres=gpu:2 State=UNKNOWN\n"
)
_PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=300 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=guarded Nodes=ALL PriorityTier=1 State=UP
"""
# Only the jobs of one partition get the prolog: it finds no GPU here, and drains their nodes. Slurm
# sets SLURM_JOB_GPUS itself where the GPUs are devices.
_PROLOG = """\
#!/bin/bash
[[ $SLURM_JOB_PARTITION == guarded ]] || exit 0
export SLURM_JOB_GPUS=0
export MEGATRON_ADAMS_PYTHON={python} PYTHONPATH={repository} PATH={folder}:$PATH
exec {repository}/examples/jobs/slurm/prolog.sh
"""
# What the prolog tells the machine's log.
_LOGGER = """\
#!/bin/bash
echo "$@" >>{folder}/prolog.log
"""


def what_is_missing() -> str:
    """Return why a Slurm cannot be started here, as the reason of a skip; "" where it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return (
            f"no {', '.join(missing)}: install Debian's packages with "
            "`MEGATRON_ADAMS_TEST_SLURM=install make test`, or by hand as tests/slurm/install.sh"
        )
    if os.geteuid() != 0:
        return "Slurm's daemons start their jobs' processes for other users: run the tests as root"
    return ""


def free_ports(number: int) -> list[int]:
    """Return TCP ports of 127.0.0.1 that nothing listens on."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until(
    condition: Callable[[], object], what: str, timeout_s: float, report: Callable[[], str]
) -> None:
    """Return as soon as `condition()` is true.

    Raises:
        AssertionError: it was not within `timeout_s`; with `what`, and what `report` returns.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s\n{report()}"
        time.sleep(0.1)


class LocalSlurm:
    """Daemons that run until `stop`.

    Args:
        folder: an empty folder, for configuration, state and logs. A socket lies in it, so that its
            path must be short (108 characters).
        nodes: the names of the virtual nodes.
    """

    def __init__(self, folder: Path, nodes: tuple[str, ...]) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("munge", "state", *(f"spool.{node}" for node in nodes)):
            (folder / name).mkdir()
        # munged refuses a key that others can read. --force: only root has to reach its socket.
        (folder / "munge").chmod(0o711)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        controller_port, *ports = free_ports(1 + len(nodes))
        config = _CONFIG.format(folder=folder, controller_port=controller_port)
        for name, port in zip(nodes, ports, strict=True):
            config += _NODE.format(name=name, port=port)
        (folder / "slurm.conf").write_text(config + _PARTITIONS)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        for index in range(2):  # a GPU that Slurm hands out is a file that exists
            (folder / f"gpu{index}").touch()
        (folder / "plugstack.conf").touch()
        for name, text in ("prolog", _PROLOG), ("logger", _LOGGER):
            text = text.format(folder=folder, repository=REPOSITORY, python=sys.executable)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._start(
                "munged", "--foreground", "--force", f"--socket={folder}/munge/socket",
                f"--key-file={key}", f"--pid-file={folder}/munge/pid",
                f"--seed-file={folder}/munge/seed",
            )  # fmt: skip
            socket_path = folder / "munge" / "socket"
            wait_until(socket_path.exists, "socket of munged", 20, self.report)
            self._start("slurmctld", "-D", "-i")
            for node in nodes:
                self._start("slurmd", "-D", "-N", node)
            wait_until(
                lambda: (
                    self.output("sinfo", "-N", "--noheader", "--format=%T").split()
                    == ["idle"] * (3 * len(nodes))
                ),
                "idle nodes",
                30,
                self.report,
            )
        except BaseException:
            self.stop()
            raise

    def _start(self, program: str, *arguments: str) -> None:
        with open(self.folder / f"{program}.out", "ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], env=self.environment, stdout=output, stderr=output
                )
            )

    def stop(self) -> None:
        """End every job, then the daemons, slurmctld and slurmd before the munged that they ask."""
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
            self.output("scancel", "--signal=KILL", "--full", "--user=root")
            deadline = time.monotonic() + 10
            while self.output("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def output(self, *command: str) -> str:
        """What one of Slurm's commands prints, its errors included."""
        run = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return run.stdout.strip()

    def report(self) -> str:
        """The end of every daemon's log."""
        # Slurm's daemons write the same to their outputs and logs; munged has the first alone.
        files = [self.folder / "munged.out", *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"--- {file.name}:\n{file.read_text()[-2000:]}" for file in files)
