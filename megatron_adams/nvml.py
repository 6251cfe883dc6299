"""What the driver says of the GPUs, through NVML (nvidia-ml-py): the one module that asks it.

Called by the doctor and by megatron/training/gpu_memory.py; imports the standard library alone at
its top. NVML answers without CUDA: no context is made on any GPU, and nothing stays there.

Few GPUs support every call, and not every user is permitted each. Such a call is answered by an
`Unanswered` that says why, never by a number that looks healthy, and never by an exception.
"""

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeAlias, TypeVar

# Where a call's absence says nothing bad of the GPU, by the names of pynvml's constants.
_HARMLESS = {
    "NVML_ERROR_NOT_SUPPORTED": "not supported by this GPU",
    "NVML_ERROR_INVALID_ARGUMENT": "not supported by this GPU",
    "NVML_ERROR_VGPU_ECC_NOT_SUPPORTED": "not supported by this virtual GPU",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "not supported by this driver",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH": "not supported by this driver",
    "NVML_ERROR_DEPRECATED": "not supported by this driver",
    "NVML_ERROR_NO_PERMISSION": "not permitted for this user",
    "NVML_ERROR_NO_DATA": "not known by the driver",
}

# What NVML's start can fail with -> why, and what to do.
_REFUSALS = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": (
        "no NVIDIA driver: libnvidia-ml.so.1 is not found",
        "install the driver, or start the container with its GPUs (docker run --gpus all, srun "
        "--gpus-per-node)",
    ),
    "NVML_ERROR_DRIVER_NOT_LOADED": (
        "the NVIDIA driver is not loaded, or this machine has no NVIDIA GPU",
        "load it as root (modprobe nvidia), and look into dmesg for why it was not",
    ),
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "the driver's kernel module and its libraries have different versions",
        "the driver was updated under a running system: reboot the node, or reload the module; in "
        "a container, start it again",
    ),
    "NVML_ERROR_NO_PERMISSION": (
        "this user may not open the GPUs' devices (/dev/nvidiactl)",
        "add the user to the devices' group, or ask the scheduler for GPUs",
    ),
}
_OTHER_REFUSAL = "look into dmesg for errors of the driver (NVRM, Xid); reboot the node"

# Bits of nvmlDeviceGetCurrentClocksEventReasons, by nvml.h's names.
_CLOCK_LIMITS = {
    0x0001: "GpuIdle",
    0x0002: "ApplicationsClocksSetting",
    0x0004: "SwPowerCap",
    0x0008: "HwSlowdown",
    0x0010: "SyncBoost",
    0x0020: "SwThermalSlowdown",
    0x0040: "HwThermalSlowdown",
    0x0080: "HwPowerBrakeSlowdown",
    0x0100: "DisplayClockSetting",
}
_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
_FABRIC_STATES = {0: "not supported", 1: "not started", 2: "in progress", 3: "completed"}


class NvmlError(RuntimeError):
    """NVML cannot be asked at all.

    Attributes:
        reason: why.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Unanswered:
    """In place of a value that NVML did not give.

    Attributes:
        reason: why.
        is_failure: the GPU is lost or broken; False where the call is not supported or permitted.
    """

    reason: str
    is_failure: bool = False


T = TypeVar("T")
Answer: TypeAlias = T | Unanswered


@dataclass(frozen=True)
class Memory:
    """The memory of a GPU or a MIG instance, in bytes. `used` counts all processes."""

    total: int
    used: int
    free: int


@dataclass(frozen=True)
class Clock:
    """In MHz."""

    now: int
    max: int


@dataclass(frozen=True)
class EccErrors:
    """Uncorrected errors of a GPU's memory and caches.

    Attributes:
        since_load: volatile: since the driver was loaded, or the GPU reset.
        lifetime: aggregate.
    """

    since_load: int
    lifetime: int


@dataclass(frozen=True)
class RemappedRows:
    """Rows of memory that spare ones have replaced (A100 and later).

    Attributes:
        num: because of uncorrected errors.
        is_pending: one will be replaced at the next reset.
        has_failed: there was no spare one.
    """

    num: int
    is_pending: bool
    has_failed: bool


@dataclass(frozen=True)
class NvLinks:
    """How many links a GPU has, and how many of them are up."""

    num: int
    num_up: int


@dataclass(frozen=True)
class Process:
    """A compute process on a GPU.

    Attributes:
        pid: as NVML names it: in a container it may be the host's.
        used: bytes; None where NVML does not say.
    """

    pid: int
    used: int | None


@dataclass(frozen=True)
class Fabric:
    """How far an NVSwitch system's fabric manager is with a GPU.

    Attributes:
        state: one of _FABRIC_STATES.
        is_well: of a completed one.
    """

    state: str
    is_well: bool


@dataclass(frozen=True)
class MigInstance:
    """A part of a GPU in MIG mode."""

    uuid: Answer[str]
    memory: Answer[Memory]


@dataclass(frozen=True)
class Gpu:
    """What NVML says of a GPU.

    Attributes:
        index: NVML's, in the order of PCI bus ids; not always CUDA's.
        clock_limits: what holds the clocks down now, by nvml.h's names.
    """

    index: int
    uuid: Answer[str]
    name: Answer[str]
    bus_id: Answer[str]
    compute_capability: Answer[tuple[int, int]]
    memory: Answer[Memory]
    processes: Answer[tuple[Process, ...]]
    sm_clock: Answer[Clock]
    memory_clock: Answer[Clock]
    clock_limits: Answer[tuple[str, ...]]
    temperature_c: Answer[int]
    ecc_is_on: Answer[bool]
    ecc_errors: Answer[EccErrors]
    remapped_rows: Answer[RemappedRows]
    retired_pages_pending: Answer[bool]
    nvlinks: Answer[NvLinks]
    fabric: Answer[Fabric]
    compute_mode: Answer[str]
    mig_instances: Answer[tuple[MigInstance, ...] | None]
    """None where MIG mode is off."""

    @property
    def failure(self) -> str | None:
        """Why the GPU is lost or broken; None where every call had an answer, or needs none."""
        answers = (getattr(self, field.name) for field in fields(self))
        failed = (a for a in answers if isinstance(a, Unanswered) and a.is_failure)
        return next((answer.reason for answer in failed), None)

    @property
    def arch(self) -> Answer[str]:
        """As NVRTC names it: "sm_90"."""
        if isinstance(self.compute_capability, Unanswered):
            return self.compute_capability
        return "sm_{}{}".format(*self.compute_capability)


class Nvml:
    """NVML, started; `session` makes one.

    Args:
        pynvml: the module of nvidia-ml-py.
    """

    def __init__(self, pynvml: Any) -> None:
        self._pynvml = pynvml

    def driver(self) -> Answer[str]:
        """The driver's version, as "580.65.06"."""
        return self._ask(lambda: str(self._pynvml.nvmlSystemGetDriverVersion()))

    def cuda(self) -> Answer[tuple[int, int]]:
        """The CUDA version of the driver, or of the compatibility package that is in its place."""

        def version() -> tuple[int, int]:
            number = self._pynvml.nvmlSystemGetCudaDriverVersion_v2()
            return number // 1000, number % 1000 // 10

        return self._ask(version)

    def gpus(self) -> list[Gpu]:
        """All GPUs of the machine that this user may open, whatever CUDA_VISIBLE_DEVICES says.

        Raises:
            NvmlError: not even their number is known.
        """
        count = self._ask(self._pynvml.nvmlDeviceGetCount)
        if isinstance(count, Unanswered):
            raise NvmlError(f"NVML does not count the GPUs: {count.reason}", _OTHER_REFUSAL)
        return [self._gpu(index) for index in range(count)]

    def memory_of(self, uuid: str) -> Answer[Memory]:
        """The memory of a GPU or a MIG instance.

        Args:
            uuid: NVML's ("GPU-...", "MIG-..."), or CUDA's, which has no prefix.
        """
        nvml = self._pynvml
        names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
        for name in names:
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(name)
            except nvml.NVMLError as exc:
                if exc.value in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                    continue
                return Unanswered(f"NVML: {exc}", is_failure=True)
            return self._ask(partial(self._memory, handle))
        return Unanswered(f"NVML knows no GPU of the UUID {uuid}", is_failure=True)

    def _gpu(self, index: int) -> Gpu:
        handle = self._ask(lambda: self._pynvml.nvmlDeviceGetHandleByIndex(index))
        if isinstance(handle, Unanswered):
            lost = Unanswered(handle.reason, is_failure=True)
            names = [field.name for field in fields(Gpu) if field.name != "index"]
            return Gpu(index, **dict.fromkeys(names, lost))
        nvml, ask = self._pynvml, self._ask
        return Gpu(
            index=index,
            uuid=ask(lambda: str(nvml.nvmlDeviceGetUUID(handle))),
            name=ask(lambda: str(nvml.nvmlDeviceGetName(handle))),
            bus_id=ask(lambda: _text(nvml.nvmlDeviceGetPciInfo(handle).busId)),
            compute_capability=ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            memory=ask(lambda: self._memory(handle)),
            processes=ask(lambda: self._processes(handle)),
            sm_clock=ask(lambda: self._clock(handle, nvml.NVML_CLOCK_SM)),
            memory_clock=ask(lambda: self._clock(handle, nvml.NVML_CLOCK_MEM)),
            clock_limits=ask(lambda: self._clock_limits(handle)),
            temperature_c=ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            ecc_is_on=ask(lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0])),
            ecc_errors=ask(lambda: self._ecc_errors(handle)),
            remapped_rows=ask(lambda: _remapped(nvml.nvmlDeviceGetRemappedRows(handle))),
            retired_pages_pending=ask(
                lambda: bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
            ),
            nvlinks=ask(lambda: self._nvlinks(handle)),
            fabric=ask(lambda: self._fabric(handle)),
            compute_mode=ask(
                lambda: _COMPUTE_MODES.get(mode := nvml.nvmlDeviceGetComputeMode(handle), str(mode))
            ),
            mig_instances=ask(lambda: self._mig_instances(handle)),
        )

    def _ask(self, call: Callable[[], T]) -> Answer[T]:
        try:
            return call()
        except AttributeError as exc:
            return Unanswered(f"not supported by this nvidia-ml-py ({exc})")
        except self._pynvml.NVMLError as exc:
            for name, reason in _HARMLESS.items():
                if getattr(self._pynvml, name, None) == exc.value:
                    return Unanswered(reason)
            return Unanswered(f"NVML: {exc}", is_failure=True)

    def _memory(self, handle: Any) -> Memory:
        try:
            # `used` of version 1 has what the driver reserves for itself.
            version = self._pynvml.nvmlMemory_v2
            memory = self._pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
        except (AttributeError, self._pynvml.NVMLError):
            memory = self._pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Memory(int(memory.total), int(memory.used), int(memory.free))

    def _processes(self, handle: Any) -> tuple[Process, ...]:
        # With its version: without, a driver that lacks it ends in an error that is no NVMLError.
        found = self._pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        return tuple(Process(int(each.pid), each.usedGpuMemory) for each in found)

    def _clock(self, handle: Any, kind: int) -> Clock:
        now = self._pynvml.nvmlDeviceGetClockInfo(handle, kind)
        return Clock(now, self._pynvml.nvmlDeviceGetMaxClockInfo(handle, kind))

    def _clock_limits(self, handle: Any) -> tuple[str, ...]:
        try:
            bits = self._pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        except (AttributeError, self._pynvml.NVMLError):
            # Its name before driver 535.
            bits = self._pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        known = [name for bit, name in _CLOCK_LIMITS.items() if bits & bit]
        unknown = bits & ~sum(_CLOCK_LIMITS)
        return (*known, *([hex(unknown)] if unknown else []))

    def _ecc_errors(self, handle: Any) -> EccErrors:
        nvml = self._pynvml
        kind = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return EccErrors(
            *(
                nvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter)
                for counter in (nvml.NVML_VOLATILE_ECC, nvml.NVML_AGGREGATE_ECC)
            )
        )

    def _nvlinks(self, handle: Any) -> NvLinks:
        states = [bool(self._pynvml.nvmlDeviceGetNvLinkState(handle, 0))]
        # Behind a GPU's last link some drivers say "not supported", and some "invalid argument".
        with suppress(self._pynvml.NVMLError):
            for link in range(1, self._pynvml.NVML_NVLINK_MAX_LINKS):
                states.append(bool(self._pynvml.nvmlDeviceGetNvLinkState(handle, link)))
        return NvLinks(len(states), sum(states))

    def _fabric(self, handle: Any) -> Fabric:
        info = self._pynvml.c_nvmlGpuFabricInfo_v2_t()
        self._pynvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
        state = _FABRIC_STATES.get(info.state, str(info.state))
        return Fabric(state, info.status == self._pynvml.NVML_SUCCESS)

    def _mig_instances(self, handle: Any) -> tuple[MigInstance, ...] | None:
        nvml = self._pynvml
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return None
        found = []
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            # A place that no instance has.
            with suppress(nvml.NVMLError):
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                uuid = self._ask(partial(nvml.nvmlDeviceGetUUID, instance))
                memory = self._ask(partial(self._memory, instance))
                found.append(MigInstance(uuid, memory))
        return tuple(found)


@contextmanager
def session() -> Iterator[Nvml]:
    """Start NVML, and end it.

    Raises:
        NvmlError: nvidia-ml-py is not installed, there is no driver, or it refuses.
    """
    try:
        # The module's name; the package is nvidia-ml-py, and the one named pynvml is another.
        pynvml = importlib.import_module("pynvml")
    except ImportError as exc:
        raise NvmlError(
            f"nvidia-ml-py cannot be imported ({exc})", "pip install 'megatron-adams[tools]'"
        ) from exc
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        for name, (reason, remedy) in _REFUSALS.items():
            if getattr(pynvml, name) == exc.value:
                raise NvmlError(reason, remedy) from exc
        raise NvmlError(f"NVML does not start: {exc}", _OTHER_REFUSAL) from exc
    try:
        yield Nvml(pynvml)
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def visible(gpus: Sequence[Gpu], setting: str | None) -> tuple[list[Gpu], str | None]:
    """Which GPUs CUDA shows to a process, by its rules for CUDA_VISIBLE_DEVICES.

    Args:
        gpus: of the machine.
        setting: the variable's value; None where it is not set.
    Returns:
        The GPUs, in CUDA's order if all are alike; and the first entry that names none, behind
        which CUDA reads nothing.
    """
    if setting is None:
        return [*gpus], None
    shown: list[Gpu] = []
    for entry in setting.split(",") if setting.strip() else []:
        found = [gpu for gpu in gpus if _is_named(gpu, entry.strip())]
        # An abbreviated UUID must be that of one GPU alone, and none may be named twice.
        if len(found) != 1 or (found[0] in shown and not entry.strip().startswith("MIG-")):
            return shown, entry.strip()
        shown += [gpu for gpu in found if gpu not in shown]
    return shown, None


def _is_named(gpu: Gpu, entry: str) -> bool:
    if entry.isdecimal():
        return gpu.index == int(entry)
    if entry.startswith("MIG-"):
        if isinstance(gpu.mig_instances, Unanswered):
            return False
        uuids = [instance.uuid for instance in gpu.mig_instances or ()]
        return any(isinstance(uuid, str) and uuid.startswith(entry) for uuid in uuids)
    is_uuid = entry.startswith("GPU-") and isinstance(gpu.uuid, str)
    return is_uuid and str(gpu.uuid).startswith(entry)


def _remapped(rows: tuple[int, int, int, int]) -> RemappedRows:
    _, uncorrected, is_pending, has_failed = rows
    return RemappedRows(uncorrected, bool(is_pending), bool(has_failed))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
