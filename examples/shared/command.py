"""What the examples' commands share: flags as words, the environment, exit statuses.

Nothing here imports Megatron: it runs in the processes that are started."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]

Flags = dict[str, object]


class RunError(Exception):
    """A training process failed; the message says where its log is and how it ends."""


def command_line_flags(flags: Flags) -> list[str]:
    """Turn {"num-layers": 4, "bf16": True} into ["--num-layers", "4", "--bf16"]; False leaves a
    flag out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words += [f"--{name}", str(value)]
    return words


def training_environment(num_cpu_ranks: int) -> dict[str, str]:
    """Return the environment that a training process is started in.

    Args:
        num_cpu_ranks: how many ranks share the cores of this machine where it trains on them.
    """
    cores = len(os.sched_getaffinity(0))
    return {
        # Without it every rank of a CPU run would take all cores.
        "OMP_NUM_THREADS": str(max(1, cores // num_cpu_ranks)),
        # Required by Megatron for communication overlap on GPUs before Blackwell.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        # The package of this repository, wherever the command is given.
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
        ),
    }


def exit_code_of(program: Callable[[], object]) -> int:
    """Run a command-line program to its end, and say on stderr what stopped it.

    SIGTERM and SIGHUP end it as Ctrl-C does, through every `finally`.

    Returns:
        0, 2 for what the user has to change (ValueError), 1 for a failed run, 130 if stopped.
    """

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    name = Path(sys.argv[0]).name
    try:
        program()
    except ValueError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return 2
    except RunError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    return 0


def num_visible_gpus() -> int:
    """Return the number of GPUs that training would use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
