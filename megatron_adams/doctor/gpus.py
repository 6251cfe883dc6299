"""Driver and GPUs, judged for a training job: what nvml.py reads becomes checks.

A call that a GPU does not support is "not known", never healthy. GPUs that CUDA_VISIBLE_DEVICES
hides are listed and not judged: another job may be on them.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_adams.doctor.report import Check, not_known, ok, problem, warning
from megatron_adams.nvml import Answer, Gpu, NvmlError, Unanswered, session, visible

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# The most that may be used on a GPU before a job starts: a CUDA context or two, no model.
_USED_BYTES = 2**30
_GIB = 2**30

# What holds clocks down, by nvml.h's names -> what it means.
_BAD_LIMITS = {
    "HwSlowdown": "the hardware slows the GPU down by half or more",
    "HwThermalSlowdown": "the hardware slows the GPU down, it is too hot",
    "HwPowerBrakeSlowdown": "the power supply asks the GPU to slow down",
    "SwThermalSlowdown": "the driver slows the GPU down, it or its memory is too hot",
}
_POOR_LIMITS = {
    "SwPowerCap": "the power limit holds the clocks down",
    "ApplicationsClocksSetting": "somebody has set application clocks",
    "SyncBoost": "another GPU of its sync-boost group holds the clocks down",
    "DisplayClockSetting": "a display holds the clocks down",
}
_COOLING = "look at fans, inlet temperature and power cabling; drain the node until it is cool"


@dataclass(frozen=True)
class Machine:
    """The GPUs of a machine.

    Attributes:
        driver: its version; None where it is not known.
        cuda: what the driver supports, as (13, 0); None where it is not known.
        gpus: those that CUDA shows.
        hidden: the others.
    """

    driver: str | None
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    hidden: tuple[Gpu, ...]

    @property
    def archs(self) -> tuple[str, ...]:
        """The architectures of the GPUs that CUDA shows, each once, as "sm_90"."""
        archs = (gpu.arch for gpu in self.gpus)
        return tuple(dict.fromkeys(arch for arch in archs if isinstance(arch, str)))

    @property
    def capability(self) -> tuple[int, int] | None:
        """The lowest compute capability of the GPUs; None where it is not known."""
        known = [
            gpu.compute_capability
            for gpu in self.gpus
            if not isinstance(gpu.compute_capability, Unanswered)
        ]
        return min(known, default=None)

    def facts(self) -> dict[str, Any]:
        """For --json."""
        cuda = None if self.cuda is None else "{}.{}".format(*self.cuda)
        return {
            "driver": {"version": self.driver, "cuda": cuda},
            "gpus": [
                {"visible": gpu in self.gpus, **_plain(gpu)}
                for gpu in sorted((*self.gpus, *self.hidden), key=lambda gpu: gpu.index)
            ],
        }


def _plain(gpu: Gpu) -> dict[str, Any]:
    """A GPU's values; what has no answer is {"not_known": why}."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"reason", "is_failure"}:
                return {"not_known": value["reason"]}
            return {name: plain(each) for name, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    values: dict[str, Any] = plain(asdict(gpu))
    return values


def read(
    *,
    torch_cuda: str | None,
    expected_driver: str | None = None,
    expected_gpus: int | None = None,
    is_running: bool = False,
) -> tuple[Machine | None, list[Check]]:
    """Ask NVML, and judge.

    Args:
        torch_cuda: the CUDA version that torch is built for, as "13.0"; None: it has none.
        expected_driver: the version that the cluster has, or its first parts ("580", "580.65").
        expected_gpus: how many CUDA has to show.
        is_running: a job is on the GPUs: its processes, memory and power cap are as they should be.
    Returns:
        None where NVML does not answer, and the checks.
    """
    try:
        with session() as nvml:
            driver, cuda, gpus = nvml.driver(), nvml.cuda(), nvml.gpus()
    except NvmlError as exc:
        return None, [problem("driver.nvml", exc.reason, exc.remedy)]
    setting = os.environ.get(_VISIBLE)
    shown, unknown_entry = visible(gpus, setting)
    machine = Machine(
        driver=None if isinstance(driver, Unanswered) else driver,
        cuda=None if isinstance(cuda, Unanswered) else cuda,
        gpus=tuple(shown),
        hidden=tuple(gpu for gpu in gpus if gpu not in shown),
    )
    checks = [
        *_driver_checks(driver, cuda, torch_cuda, expected_driver),
        *_number_checks(machine, setting, unknown_entry, expected_gpus),
        *_likeness_checks(machine.gpus),
    ]
    for gpu in machine.gpus:
        checks += _gpu_checks(gpu, is_running=is_running)
    return machine, checks


def _driver_checks(
    driver: Answer[str],
    cuda: Answer[tuple[int, int]],
    torch_cuda: str | None,
    expected: str | None,
) -> Iterator[Check]:
    name = "driver.version"
    if isinstance(driver, Unanswered):
        yield (problem if expected else not_known)(
            name, f"the driver's version is not known: {driver.reason}", "reinstall the driver"
        )
    elif expected is not None and f"{driver}.".startswith(f"{expected}.") is False:
        yield problem(
            name,
            f"driver {driver}, expected {expected}",
            f"install driver {expected} on this node, as on the others, or change --expect-driver",
        )
    else:
        yield ok(name, f"driver {driver}" + (", as expected" if expected else ""))
    name = "driver.cuda"
    if isinstance(cuda, Unanswered):
        yield not_known(name, f"the driver's CUDA version is not known: {cuda.reason}")
        return
    words = "the driver supports CUDA {}.{}".format(*cuda)
    if torch_cuda is None:
        yield ok(name, words)
        return
    major, minor = (int(part) for part in torch_cuda.split(".")[:2])
    if cuda[0] < major:
        yield problem(
            name,
            f"{words}, and torch is built for CUDA {torch_cuda}: its first call would fail",
            f"install a driver for CUDA {major} (or NVIDIA's cuda-compat package), or a torch for "
            f"CUDA {cuda[0]}",
        )
    elif cuda < (major, minor):
        # CUDA's minor version compatibility: a cubin runs, PTX of a newer compiler does not. The
        # kernels of this package are cubins.
        yield ok(name, f"{words}, torch's {torch_cuda} runs on it (same major version)")
    else:
        yield ok(name, f"{words}, torch needs {torch_cuda}")


def _number_checks(
    machine: Machine, setting: str | None, unknown_entry: str | None, expected: int | None
) -> Iterator[Check]:
    num, total = len(machine.gpus), len(machine.gpus) + len(machine.hidden)
    words = f"{num} of {total} GPU{'s' * (total != 1)} visible"
    if setting is not None:
        words += f" ({_VISIBLE}={setting})"
    name = "gpus.visible"
    if total == 0:
        yield problem(
            name,
            "the driver shows no GPU",
            "look into dmesg (Xid, 'fallen off the bus'); ask the scheduler for GPUs; start the "
            "container with them",
        )
    elif unknown_entry is not None:
        yield problem(
            name,
            f"{words}: its entry {unknown_entry!r} names no GPU here, or one twice, and CUDA "
            "reads none behind it",
            f"unset {_VISIBLE}, or name GPUs that nvidia-smi -L lists",
        )
    elif num == 0:
        yield problem(
            name,
            f"{words}: it hides every GPU",
            f"unset {_VISIBLE}, or ask the scheduler for GPUs (--gpus-per-node)",
        )
    elif expected is not None and num != expected:
        yield problem(
            name,
            f"{words}, expected {expected}",
            "look into dmesg for a GPU that is lost (Xid 79); drain the node; or change "
            "--expect-gpus",
        )
    else:
        yield ok(name, words + (", as expected" if expected is not None else ""))


def _likeness_checks(gpus: Sequence[Gpu]) -> Iterator[Check]:
    if len(gpus) < 2:
        return
    kinds: dict[str, list[int]] = {}
    for gpu in gpus:
        memory = gpu.memory if isinstance(gpu.memory, Unanswered) else gpu.memory.total // _GIB
        kinds.setdefault(f"{_word(gpu.name)}, {_word(memory)} GiB", []).append(gpu.index)
    if len(kinds) > 1:
        words = "; ".join(f"GPU {_list(indices)}: {kind}" for kind, indices in kinds.items())
        yield warning(
            "gpus.alike",
            f"the GPUs are of different kinds ({words}): the slowest and the smallest sets the "
            "pace and the memory of a job",
            f"name GPUs of one kind in {_VISIBLE}; CUDA numbers them as NVML does only with "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    else:
        yield ok("gpus.alike", f"all are {next(iter(kinds))}")
    links = {gpu.nvlinks for gpu in gpus if not isinstance(gpu.nvlinks, Unanswered)}
    if len(links) > 1 and len(kinds) == 1:
        words = ", ".join(
            f"GPU {gpu.index}: {gpu.nvlinks.num_up} of {gpu.nvlinks.num}"
            for gpu in gpus
            if not isinstance(gpu.nvlinks, Unanswered)
        )
        yield problem(
            "gpus.nvlink",
            f"NVLinks are up on some GPUs and down on others ({words})",
            "reset the GPUs (nvidia-smi --gpu-reset) or reboot the node; then have the links "
            "looked at (nvidia-smi nvlink -s)",
        )


def _gpu_checks(gpu: Gpu, *, is_running: bool) -> Iterator[Check]:
    prefix = f"gpu{gpu.index}"
    if gpu.failure is not None:
        yield problem(
            f"{prefix}.alive",
            f"GPU {gpu.index} does not answer: {gpu.failure}",
            "look into dmesg for its Xid; reset it (nvidia-smi --gpu-reset) or reboot the node; "
            "drain the node if it comes again",
        )
        return
    yield _of_name(gpu, prefix)
    yield from _of_memory(gpu, prefix, is_running=is_running)
    yield _of_clocks(gpu, prefix, is_running=is_running)
    yield _of_ecc(gpu, prefix)
    yield _of_repairs(gpu, prefix)
    yield _of_nvlinks(gpu, prefix)
    yield from _of_modes(gpu, prefix)


def _of_name(gpu: Gpu, prefix: str) -> Check:
    words = f"{_word(gpu.name)}, {_word(gpu.arch)}, {_word(gpu.bus_id)}"
    if isinstance(gpu.arch, Unanswered):
        return problem(
            f"{prefix}.name",
            f"{words}: no kernel can be chosen",
            "update the driver; nvidia-smi -q says what it knows of the GPU",
        )
    return ok(f"{prefix}.name", words)


def _of_memory(gpu: Gpu, prefix: str, *, is_running: bool) -> Iterator[Check]:
    name, memory = f"{prefix}.memory", gpu.memory
    if isinstance(memory, Unanswered):
        yield problem(
            name,
            f"memory is not known: {memory.reason}",
            "update the driver; a job's memory cannot be judged",
        )
        return
    words = f"{memory.free / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    processes = () if isinstance(gpu.processes, Unanswered) else gpu.processes
    users = _list([process.pid for process in processes])
    if processes:
        words += f"; compute process{'es' * (len(processes) > 1)} {users}"
    if isinstance(gpu.processes, Unanswered):
        words += f"; processes: {gpu.processes.reason}"
    if is_running:
        yield ok(name, words)
    elif memory.used > _USED_BYTES:
        whose = "" if processes else ", by no process that is seen from here"
        yield problem(
            name,
            f"{words}: {memory.used / _GIB:.1f} GiB are in use before the job starts{whose}",
            "end what an earlier job has left (ps, kill), or wait for the job that it is of; "
            "memory of no process goes with a reset (nvidia-smi --gpu-reset); beside a running "
            "job give --while-running",
        )
    elif processes:
        yield warning(
            name, words, "look at whose they are (ps); beside a running job give --while-running"
        )
    else:
        yield ok(name, words)


def _of_clocks(gpu: Gpu, prefix: str, *, is_running: bool) -> Check:
    name = f"{prefix}.clocks"
    clocks = [
        f"{kind} {clock.now} of {clock.max} MHz"
        if not isinstance(clock, Unanswered)
        else f"{kind} {clock.reason}"
        for kind, clock in (("SM", gpu.sm_clock), ("memory", gpu.memory_clock))
    ]
    words = ", ".join(clocks)
    if not isinstance(gpu.temperature_c, Unanswered):
        words += f", {gpu.temperature_c} °C"
    limits = gpu.clock_limits
    if isinstance(limits, Unanswered):
        return not_known(name, f"{words}; what holds the clocks down is {limits.reason}")
    bad = [f"{_BAD_LIMITS[limit]} ({limit})" for limit in limits if limit in _BAD_LIMITS]
    if bad:
        return problem(name, f"{words}: {'; '.join(bad)}", _COOLING)
    poor = [limit for limit in limits if limit != "GpuIdle"]
    if is_running:
        poor = [limit for limit in poor if limit != "SwPowerCap"]
    if poor:
        reasons = "; ".join(f"{_POOR_LIMITS.get(x, 'a reason without a name')} ({x})" for x in poor)
        return warning(
            name,
            f"{words}: {reasons}",
            "nvidia-smi -q -d PERFORMANCE,CLOCK,POWER; nvidia-smi --reset-applications-clocks and "
            "--power-limit set them back",
        )
    return ok(name, words + (", idle" if "GpuIdle" in limits else ""))


def _of_ecc(gpu: Gpu, prefix: str) -> Check:
    name, errors = f"{prefix}.ecc", gpu.ecc_errors
    if not isinstance(gpu.ecc_is_on, Unanswered) and not gpu.ecc_is_on:
        return warning(
            name,
            "ECC is off: flipped bits are not seen",
            "turn it on as root (nvidia-smi --ecc-config=1), and reboot",
        )
    if isinstance(errors, Unanswered):
        return not_known(name, f"ECC errors: {errors.reason}")
    words = f"uncorrected ECC errors: {errors.since_load} since the driver was loaded"
    words += f", {errors.lifetime} in the GPU's life"
    if errors.since_load:
        return problem(
            name,
            words,
            "drain the node and reset the GPU (nvidia-smi --gpu-reset) or reboot; replace it if "
            "errors come again",
        )
    if errors.lifetime:
        return warning(
            name, words, "nothing at once: watch it, and replace the GPU if the number grows"
        )
    return ok(name, words)


def _of_repairs(gpu: Gpu, prefix: str) -> Check:
    """Rows that are remapped, or, on GPUs before A100, pages that are retired: a GPU has one."""
    name, rows, pages = f"{prefix}.repairs", gpu.remapped_rows, gpu.retired_pages_pending
    reset = "drain the node and reset the GPU (nvidia-smi --gpu-reset), or reboot"
    if not isinstance(rows, Unanswered):
        words = f"{rows.num} row{'s' * (rows.num != 1)} of memory remapped"
        if rows.has_failed:
            return problem(
                name, f"{words}, and there is no spare row left", "have the GPU replaced"
            )
        if rows.is_pending:
            return problem(name, f"{words}, and more at the next reset", reset)
        return ok(name, words)
    if not isinstance(pages, Unanswered):
        if pages:
            return problem(name, "pages of memory are to be retired at the next reset", reset)
        return ok(name, "no page of memory is to be retired")
    return not_known(name, f"remapped rows and retired pages: {rows.reason}")


def _of_nvlinks(gpu: Gpu, prefix: str) -> Check:
    name, links = f"{prefix}.nvlink", gpu.nvlinks
    if isinstance(links, Unanswered):
        return not_known(name, f"NVLink: {links.reason}")
    words = f"{links.num_up} of {links.num} NVLinks up"
    if links.num_up == 0:
        return warning(
            name,
            f"{words}: GPUs talk over PCIe",
            "nvidia-smi nvlink -s; on a GPU without bridge or switch that is as it should be",
        )
    return ok(name, words)


def _of_modes(gpu: Gpu, prefix: str) -> Iterator[Check]:
    """Compute mode, MIG, fabric: said only where they are not as a job wants them."""
    if gpu.compute_mode == "prohibited":
        yield problem(
            f"{prefix}.mode",
            "compute mode is prohibited: no process gets a CUDA context",
            "nvidia-smi --compute-mode=0, as root",
        )
    if not isinstance(gpu.mig_instances, Unanswered) and gpu.mig_instances is not None:
        num = len(gpu.mig_instances)
        yield (warning if num else problem)(
            f"{prefix}.mig",
            f"MIG mode is on, with {num} instance{'s' * (num != 1)}: a process sees one of them, "
            "and NCCL does not connect two",
            "turn it off for training (nvidia-smi --mig=0, as root), or name one instance in "
            f"{_VISIBLE}",
        )
    fabric = gpu.fabric
    if isinstance(fabric, Unanswered) or fabric.state == "not supported":
        return
    if fabric.state != "completed" or not fabric.is_well:
        outcome = fabric.state if fabric.state != "completed" else "failed"
        yield problem(
            f"{prefix}.fabric",
            f"the NVSwitch fabric is not set up for this GPU ({outcome}): CUDA would not start",
            "start nvidia-fabricmanager (systemctl status nvidia-fabricmanager), of the driver's "
            "version",
        )


def _word(answer: Answer[Any]) -> str:
    return f"({answer.reason})" if isinstance(answer, Unanswered) else str(answer)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
