"""Record what the numbers of a run depend on: the machine, its GPU, and versions."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable

from tests.gpu.stages.stage import Stage

PACKAGES = (
    *("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy", "pytest"),
    *("pytest-xdist", "pytest-timeout", "hypothesis", "megatron-core", "transformer-engine"),
)
_SMI = (
    *("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm"),
    *("clocks.mem", "clocks.max.mem", "power.limit", "ecc.mode.current", "mig.mode.current"),
    *("persistence_mode", "compute_mode", "temperature.gpu"),
)


def output_of(*command: str) -> str:
    """Return what a program prints, or why it prints nothing, in one line."""
    if shutil.which(command[0]) is None:
        return f"unknown: no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=8, check=False)
    except subprocess.TimeoutExpired:
        return f"unknown: {command[0]} does not end"
    return " ".join(done.stdout.split()) or f"unknown: {' '.join(done.stderr.split())[:200]}"


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    stage = Stage("facts")

    def say(name: str, value: object) -> None:
        stage.record(name, value=value)
        print(f"{name}: {value}", flush=True)

    if shutil.which("nvidia-smi") is not None:
        values = output_of("nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader")
        known = dict(zip(_SMI, values.split(", "), strict=False))
        say("GPU", known.pop("name", values))
        say("driver", known.pop("driver_version", "unknown"))
        for name, value in known.items():
            say(name, value)
    say("kernel", f"{platform.system()} {platform.release()}")
    say("Python", sys.version.split()[0])
    say("CPUs", f"{os.cpu_count()}, {platform.machine()}")
    say("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    for package in PACKAGES:
        say(package, version_of(package))
    for command in ("gcc", "g++", "ncu", "compute-sanitizer"):
        say(command, output_of(command, "--version")[:160])
    # Last, because it takes longest.
    _say_what_torch_knows(say)
    return 0


def _say_what_torch_knows(say: Callable[[str, object], None]) -> None:
    import torch

    from megatron_adams.kernels.compile import CompileError, nvrtc_version, source_text

    digest = hashlib.sha256(source_text("device.cu").encode()).hexdigest()
    say("source of the kernel", digest[:16])
    say("torch's CUDA", torch.version.cuda)
    try:
        say("NVRTC", nvrtc_version())
    except CompileError as error:
        say("NVRTC", f"missing: {error}")
    say("GPUs", torch.cuda.device_count())
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        say("multiprocessors", properties.multi_processor_count)
        say("L2", f"{properties.L2_cache_size / 2**20:.0f} MiB")
        say("free GPU memory", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB")


if __name__ == "__main__":
    sys.exit(main())
