"""What importing Megatron shows, and what it says of a job's launch flags, from another process.

Importing Megatron takes seconds and reads the environment, and its layers look for a GPU: the
process that does it (probe.py) is shown none, so that no CUDA context can come of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adams.doctor.report import Check, ok, problem, warning

_TIMEOUT_S = 180.0
_PARENT = str(Path(__file__).parents[2])
_OWN_PREFIX = "--adams-"


@dataclass(frozen=True)
class Probe:
    """A process that imports Megatron, on its way.

    Attributes:
        flags: the launch flags that it checks; None: none were given.
    """

    process: "subprocess.Popen[str]"
    flags: tuple[str, ...] | None
    for_gpu: bool


def start(
    flags: Sequence[str] | None,
    *,
    for_gpu: bool,
    world_size: int | None,
    capability: tuple[int, int] | None,
) -> Probe:
    """Start the process; `finish` waits for it.

    Args:
        flags: a script's arguments; None: import Megatron alone.
        world_size: of the job; None: what the environment says, or the least that the flags allow.
        capability: of the GPUs, by which Megatron has rules; None: Hopper's.
    """
    request = {
        "flags": None if flags is None else [*flags],
        "rehearses": not for_gpu,
        "world_size": world_size,
        "capability": capability,
    }
    process = subprocess.Popen(
        # -P: a prolog of root's must not import what lies in the folder that it is run from.
        [sys.executable, "-P", "-m", "megatron_adams.doctor.probe", json.dumps(request)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            # Last: another Megatron on PYTHONPATH is the job's, too.
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _PARENT])),
            # Megatron prints on rank 0, and asks git for its version.
            "RANK": "0",
            "NO_VCS_VERSION": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Probe(process, None if flags is None else tuple(flags), for_gpu)


def finish(probe: Probe) -> tuple[dict[str, Any], list[Check]]:
    """Wait for the process; return what it says, {} where it ended without, and the checks."""
    try:
        printed, errors = probe.process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        probe.process.kill()
        probe.process.communicate()
        return {}, [
            problem(
                "megatron.import",
                f"importing Megatron has not ended after {_TIMEOUT_S:.0f} s",
                "a file system that is slow or hangs: try python -X importtime -c 'import "
                "megatron.core'",
            )
        ]
    lines = printed.splitlines()
    if probe.process.returncode != 0 or not lines:
        said = errors.strip().splitlines()
        return {}, [
            problem(
                "megatron.import",
                f"Megatron cannot be imported: {said[-1] if said else 'it ended without a word'}",
                "python -c 'import megatron_adams; megatron_adams.register()' shows where",
            )
        ]
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer, [*_import_checks(answer, probe), *_flag_checks(answer, probe)]


def _import_checks(answer: dict[str, Any], probe: Probe) -> Iterator[Check]:
    name = "megatron.import"
    if answer["refused"] is not None:
        yield problem(
            name,
            f"--optimizer adams cannot be registered: {answer['refused']}",
            f'pip install "megatron-core[training]{answer["supported"]}", or take the other '
            "Megatron off PYTHONPATH",
        )
    else:
        yield ok(name, f"Megatron-Core {answer['version']} imports, --optimizer adams registers")
    for package, state in (
        ("TransformerEngine", answer["transformer_engine"]),
        ("Apex", answer["apex"]),
    ):
        if state not in ("imported", "missing"):
            yield (problem if probe.for_gpu else warning)(
                f"megatron.{package.lower()}",
                f"{package} is installed and cannot be imported ({state}): Megatron goes on "
                "without it, and says nothing",
                f"install a {package} that was built for this torch and CUDA, or pip uninstall it",
            )


def _flag_checks(answer: dict[str, Any], probe: Probe) -> Iterator[Check]:
    if probe.flags is None or answer["flags"] is None:
        return
    name, found = "flags.accepted", answer["flags"]
    for unknown in (word for word in found["unknown"] if word.startswith("--")):
        is_own = unknown.startswith(_OWN_PREFIX)
        yield (problem if is_own else warning)(
            f"flags.unknown.{unknown.lstrip('-').partition('=')[0]}",
            f"{unknown.partition('=')[0]} is no flag of Megatron's or AdamS's",
            "correct it; it may stay if the script itself adds it (extra_args_provider)",
        )
    if found["refused"] is not None:
        yield problem(name, found["refused"], "change the flags as the message says")
        return
    arguments = found["arguments"]
    yield ok(
        name,
        f"Megatron and AdamS accept {len(probe.flags)} words of flags, for "
        f"{found['world_size']} rank{'s' * (found['world_size'] != 1)}",
    )
    if arguments["optimizer"] != "adams":
        yield warning(
            "flags.optimizer",
            f"--optimizer {arguments['optimizer']}: AdamS takes no part in this job",
            "give --optimizer adams, or judge the machine without flags",
        )
    for number, message in enumerate(found["warnings"]):
        yield warning(f"flags.warning.{number}", message, "see docs/hyperparameters.md")
    if (
        probe.for_gpu
        and arguments["transformer_impl"] == "transformer_engine"
        and answer["transformer_engine"] != "imported"
    ):
        yield problem(
            "flags.transformer-engine",
            "--transformer-impl transformer_engine (the default), and TransformerEngine cannot be "
            "imported here",
            "pip install 'megatron-adams[te]', use NVIDIA's PyTorch container, or give "
            "--transformer-impl local",
        )
