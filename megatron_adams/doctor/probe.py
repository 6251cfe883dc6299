"""The process that imports Megatron for the doctor: one JSON request, one line of JSON.

    python -m megatron_adams.doctor.probe '{"flags": ["--optimizer", "adams"], ...}'

Started by megatron.py with CUDA_VISIBLE_DEVICES="". Megatron's checks ask torch.cuda for the GPU's
architecture: the rehearsal's stand-in answers, so that none is touched.
"""

import contextlib
import json
import sys
import warnings
from typing import Any

import torch

from megatron_adams import cpu_rehearsal


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Import Megatron, and check flags where some are given; the keys are launch_check's."""
    flags = request["flags"]
    if request["rehearses"] and flags is not None:
        try:
            flags = [*flags, *cpu_rehearsal.rehearsal_flags(flags)]
        except cpu_rehearsal.RehearsalError as exc:
            return {**_megatron(request), "flags": _refused(str(exc))}
    found = _megatron(request)
    found["flags"] = None
    if flags is not None and found["refused"] is None:
        from megatron_adams.megatron import launch_check

        found["flags"] = launch_check.check_flags(flags, request["world_size"])
    return found


def _refused(message: str) -> dict[str, Any]:
    return {"refused": message, "unknown": [], "warnings": [], "world_size": None, "arguments": {}}


def _megatron(request: dict[str, Any]) -> dict[str, Any]:
    cpu_rehearsal.install()
    if request["capability"] is not None:
        _set_capability(*request["capability"])
    from megatron_adams.megatron import launch_check

    return launch_check.check_megatron()


def _set_capability(major: int, minor: int) -> None:
    """Have torch.cuda answer with the architecture of this machine's GPUs."""
    stand_in: Any = torch.cuda.get_device_properties(0)
    properties = stand_in._replace(major=major, minor=minor)
    vars(torch.cuda)["get_device_capability"] = lambda *args: (major, minor)
    vars(torch.cuda)["get_device_properties"] = lambda *args: properties


def main() -> None:
    """Print the answer in the last line of stdout."""
    request = json.loads(sys.argv[1])
    # What Megatron prints while it is imported is no answer.
    with contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            found = answer(request)
        except ImportError as exc:
            sys.exit(f"{type(exc).__name__}: {exc}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
