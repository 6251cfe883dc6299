"""Whether a machine is fit for a job with AdamS, and what to do where it is not.

`examine` is what `megatron-adams doctor` prints. It makes no CUDA context: it runs before a job,
often as another user, and a context takes hundreds of MB on every GPU, fails where the compute
mode lets one process in, and a process that hangs in the driver would keep the node. NVML and the
packages' metadata answer all that is asked, in a few seconds.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_adams.doctor import gpus, kernels, megatron, software
from megatron_adams.doctor.report import Check, Report, Status

__all__ = ["Check", "Question", "Report", "Status", "examine"]


@dataclass(frozen=True)
class Question:
    """What a machine is to be fit for.

    Attributes:
        for_gpu: False: for a rehearsal on CPU processes, which needs no GPU.
        flags: a job's launch flags; None: none are given.
        world_size: of that job; None: the least that the flags allow.
        expected_driver: the driver's version, or its first parts.
        expected_gpus: how many GPUs CUDA has to show.
        is_running: a job is on the GPUs already.
        imports_megatron: False: its version alone is looked at.
        ignored: shell patterns of names of checks that do not count.
        is_strict: warnings count, and what is not known.
    """

    for_gpu: bool = True
    flags: tuple[str, ...] | None = None
    world_size: int | None = None
    expected_driver: str | None = None
    expected_gpus: int | None = None
    is_running: bool = False
    imports_megatron: bool = True
    ignored: Sequence[str] = ()
    is_strict: bool = False


def examine(question: Question) -> Report:
    """Look at this machine; nothing is changed on it."""
    report = Report(
        purpose="gpu" if question.for_gpu else "cpu-rehearsal",
        host=socket.gethostname(),
        is_strict=question.is_strict,
        ignored=tuple(question.ignored),
    )
    versions = software.versions()
    machine = None
    gpu_checks: list[Check] = []
    if question.for_gpu:
        machine, gpu_checks = gpus.read(
            torch_cuda=versions.torch_cuda,
            expected_driver=question.expected_driver,
            expected_gpus=question.expected_gpus,
            is_running=question.is_running,
        )
    probe = None
    if question.imports_megatron:
        probe = megatron.start(
            question.flags,
            for_gpu=question.for_gpu,
            world_size=question.world_size,
            capability=None if machine is None else machine.capability,
        )
    report.facts["versions"] = versions.facts()
    report.facts |= {"driver": None, "gpus": []} if machine is None else machine.facts()
    report.add(software.check(versions, machine, for_gpu=question.for_gpu))
    report.add(gpu_checks)
    arguments = report.facts["flags"] = None
    if probe is not None:
        answer, checks = megatron.finish(probe)
        report.add(checks)
        arguments = report.facts["flags"] = answer.get("flags")
    found, checks = kernels.check(
        kernels.wanted((arguments or {}).get("arguments") or None, for_gpu=question.for_gpu),
        () if machine is None else machine.archs,
    )
    report.facts["kernels"] = found.facts()
    report.add(checks)
    return report
