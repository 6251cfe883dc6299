"""What the examples' commands share: flags as words, the environment, exit statuses.

Nothing here imports Megatron: it runs in the processes that are started."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

Flags = dict[str, object]


# What Megatron 0.19 needs where TransformerEngine is not installed: its own layers and no kernel
# of TransformerEngine or Apex.
WITHOUT_TRANSFORMER_ENGINE: Flags = {
    "transformer-impl": "local",
    "no-gradient-accumulation-fusion": True,
    "no-persist-layer-norm": True,
    "no-masked-softmax-fusion": True,
    "no-rope-fusion": True,
}


class RunError(Exception):
    """A training process failed; the message says where its log is and how it ends."""


def command_line_flags(flags: Flags) -> list[str]:
    """Turn {"num-layers": 4, "bf16": True} into ["--num-layers", "4", "--bf16"]; False leaves a
    flag out, and a list is several values."""
    words: list[str] = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not False:
            words += [f"--{name}", str(value)]
    return words


def training_environment(num_local_ranks: int) -> dict[str, str]:
    """Return the environment that training processes are started in.

    Args:
        num_local_ranks: how many ranks share the cores of this machine.
    """
    cores = len(os.sched_getaffinity(0))
    return {
        # Without it every rank would take all cores.
        "OMP_NUM_THREADS": str(max(1, cores // num_local_ranks)),
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
    import torch  # seconds, which a rehearsal need not wait for

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
