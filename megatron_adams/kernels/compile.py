"""The kernel sources, compiled for one mode: a shared library for the CPU, a cubin for a GPU.

Called by host.py, cuda.py, the commands and the doctor; goes through the cache in cache.py. It
imports no torch, and NVRTC's bindings only where they are used.
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_adams.kernels.cache import KernelCache, logger
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.tuning import Tuning, tuning_of

# Part of every entry's name: to be raised when what an entry holds changes its meaning.
_FORMAT = 1
_SOURCE = Path(__file__).parent / "source"
_CPUINFO = Path("/proc/cpuinfo")
_COMPILER_TIMEOUT_S = 300
# cuda.core 1.2.2 replaces its own __spec__ while it is being imported, so that Python lets a second
# thread import from half of it.
_cuda_core_import = threading.Lock()
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')

# The x86-64 psABI's levels, by the names of /proc/cpuinfo; each needs those before it.
_LEVELS = {
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
    "x86-64-v3": "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}
HOST_ARCHS = tuple(_LEVELS)

_HOST_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    # Every operation rounded on its own, as `update` and the GPU do it; but no operation traps or
    # sets errno, or the loop would not be vectorized.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# Likewise: no contraction, subnormals kept, division and square root correctly rounded.
_CUDA_OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "fma": False,
    "ftz": False,
    "prec_div": True,
    "prec_sqrt": True,
    "device_as_default_execution_space": True,
}


class CompileError(RuntimeError):
    """A kernel cannot be compiled or loaded; says what was tried and what the compiler said."""


class Compiler(NamedTuple):
    """A C++ compiler: its command with its fixed arguments, and the first line of its version."""

    command: tuple[str, ...]
    version: str


class Recipe(NamedTuple):
    """A kernel's name in the cache, which says all that it depends on, and how it is compiled."""

    name: str
    build: Callable[[], bytes]


def host_library(mode: Mode, kernels: KernelCache | None = None) -> ctypes.CDLL:
    """Return the host form of a mode's kernel, compiled at its first use on this machine.

    Without a compiler, a cached library of any compiler is taken: its bits are the same.

    Raises:
        CompileError: no compiler, a compiler that fails, or a library that cannot be loaded.
    """
    kernels = kernels or KernelCache()
    arch, compiler = host_arch(), host_compiler()
    if compiler is None:
        image = kernels.find(host_cache_pattern(mode, arch))
        if image is None:
            raise CompileError(
                "no C++ compiler: CXX is not set, and neither g++ nor clang++ is on PATH; install "
                "one (apt-get install g++, dnf install gcc-c++), or fill the cache where there is "
                f"one (megatron-adams precompile --arch {arch})"
            )
    else:
        image = kernels.get(*host_recipe(mode, arch, compiler))
    return load_library(image, mode.name)


def cubin(
    mode: Mode, arch: str, kernels: KernelCache | None = None, *, tuning: Tuning | None = None
) -> bytes:
    """Return the CUDA form of a mode's kernel, compiled at its first use.

    Args:
        arch: of the GPU, as "sm_90".
        tuning: by default the mode's own.

    Raises:
        CompileError: no NVRTC, or it fails.
    """
    return (kernels or KernelCache()).get(*cuda_recipe(mode, arch, tuning))


def host_recipe(mode: Mode, arch: str, compiler: Compiler) -> Recipe:
    """Return how the host form is compiled for an architecture of `host_arch`'s."""
    text = source_text("host.cpp")
    identity = _digest(compiler.version, *compiler.command[1:])
    return Recipe(
        _host_name(mode, arch, text, identity),
        lambda: _timed(mode, arch, lambda: compile_host(text, mode.defines(), compiler, arch)),
    )


def cuda_recipe(mode: Mode, arch: str, tuning: Tuning | None = None) -> Recipe:
    """Return how the CUDA form is compiled for an architecture such as "sm_90".

    Args:
        tuning: by default the mode's own.

    Raises:
        CompileError: no NVRTC.
    """
    text = source_text("device.cu")
    defines = {**mode.defines(), **(tuning or tuning_of(mode)).defines()}
    digest = _digest(_FORMAT, text, defines, _CUDA_OPTIONS, nvrtc_version())
    return Recipe(
        f"{mode.name}.{arch}.{digest}.cubin",
        lambda: _timed(mode, arch, lambda: compile_cuda(text, defines, arch)),
    )


def host_cache_pattern(mode: Mode, arch: str) -> str:
    """Return the shell pattern of a host kernel's name in the cache, by whatever compiler."""
    return _host_name(mode, arch, source_text("host.cpp"), "*")


def _host_name(mode: Mode, arch: str, text: str, compiler: str) -> str:
    digest = _digest(_FORMAT, text, mode.defines(), host_flags(arch))
    return f"{mode.name}.{arch}.{digest}.{compiler}.so"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _timed(mode: Mode, arch: str, build: Callable[[], bytes]) -> bytes:
    start = time.perf_counter()
    image = build()
    logger.info("compiled kernel %s for %s in %.2f s", mode.name, arch, time.perf_counter() - start)
    return image


def source_text(name: str, folder: Path = _SOURCE) -> str:
    """Return a source with its local includes in place, each once: what is compiled and hashed.

    `#line` keeps the file names and line numbers in compilers' messages. An include must not stand
    in a conditional, where its text might be dropped, and be missing later.

    Args:
        name: of a file in `folder`.
        folder: by default the package's.
    """
    return "\n".join(_expand(name, folder, set())) + "\n"


def _expand(name: str, folder: Path, seen: set[str]) -> list[str]:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((folder / name).read_text("utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            lines.append(line)
        else:
            if include[1] not in seen:
                lines += _expand(include[1], folder, seen)
            lines.append(f'#line {number + 1} "{name}"')
    return lines


def host_compiler() -> Compiler | None:
    """Return $CXX (a command, with arguments or without), else g++ or clang++ of PATH, or None.

    Raises:
        CompileError: $CXX, or what PATH has, does not say its version.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        return _identify(tuple(command))
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return _identify((path,))
    return None


@cache
def _identify(command: tuple[str, ...]) -> Compiler:
    output = _run((*command, "--version"), "")
    return Compiler(command, output.partition("\n")[0])


def _run(command: tuple[str, ...], text: str) -> str:
    """Run a compiler with `text` as its input; return what it prints."""
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=_COMPILER_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise CompileError(f"{shlex.join(command)}: {exc}") from exc
    if done.returncode != 0:
        raise CompileError(
            f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def host_arch() -> str:
    """Return the highest x86-64 level of this CPU, as "x86-64-v3"; elsewhere "aarch64" and so on.

    A level and not "native": a cache in a home folder is shared by unlike machines.
    """
    if platform.machine() != "x86_64":
        return platform.machine()
    with _CPUINFO.open(encoding="utf-8") as cpuinfo:
        # The first CPU's: the rest of the file takes milliseconds on a machine with many.
        flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    arch = "x86-64"
    for level, needed in _LEVELS.items():
        if not set(needed.split()) <= set(flags):
            break
        arch = level
    return arch


def host_flags(arch: str) -> tuple[str, ...]:
    """Return the flags of the host compiler for an architecture of `host_arch`'s."""
    return (*_HOST_FLAGS, f"-march={arch}") if arch.startswith("x86-64") else _HOST_FLAGS


def compile_host(text: str, defines: Mapping[str, str], compiler: Compiler, arch: str) -> bytes:
    """Return a shared library.

    Raises:
        CompileError: the compiler fails.
    """
    macros = (f"-D{name}={value}" for name, value in defines.items())
    try:
        with tempfile.TemporaryDirectory(prefix="megatron-adams-") as folder:
            library = Path(folder) / "kernel.so"
            flags = (*host_flags(arch), *macros, "-x", "c++", "-", "-o", str(library))
            _run((*compiler.command, *flags), text)
            return library.read_bytes()
    except OSError as exc:
        raise CompileError(f"no library from {compiler.command[0]}: {exc}") from exc


def compile_cuda(text: str, defines: Mapping[str, str], arch: str) -> bytes:
    """Return a cubin; needs no GPU and no driver.

    Raises:
        CompileError: no NVRTC, or it fails.
    """
    try:
        with _cuda_core_import:
            from cuda.core import Program, ProgramOptions
    except ImportError as exc:
        raise _no_nvrtc(exc) from exc
    macros = list(defines.items()) or None  # it refuses an empty list
    try:
        options = ProgramOptions(name="device.cu", arch=arch, define_macro=macros, **_CUDA_OPTIONS)
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as exc:  # cuda.core exports no class of its exceptions
        raise CompileError(f"NVRTC for {arch} with {dict(defines)}: {exc}") from exc


def nvrtc_version() -> str:
    """Return the version of the NVRTC that `compile_cuda` uses, as "13.0".

    Raises:
        CompileError: there is none.
    """
    _, major, minor = _nvrtc("nvrtcVersion")
    return f"{major}.{minor}"


def cuda_archs() -> tuple[str, ...]:
    """Return the architectures that this NVRTC compiles for, as "sm_90", without variants.

    Raises:
        CompileError: there is no NVRTC.
    """
    _, archs = _nvrtc("nvrtcGetSupportedArchs")
    return tuple(f"sm_{arch}" for arch in archs)


def _nvrtc(function: str) -> tuple[Any, ...]:
    # cuda.bindings and not cuda.core: 3 ms instead of 100 where torch is imported, and this is
    # on the way to a kernel that lies in the cache.
    try:
        from cuda.bindings import nvrtc

        return tuple(getattr(nvrtc, function)())
    except (ImportError, RuntimeError) as exc:  # RuntimeError: the bindings find no library
        raise _no_nvrtc(exc) from exc


def _no_nvrtc(exc: Exception) -> CompileError:
    return CompileError(
        f"no NVRTC ({exc}): the CUDA builds of torch bring it and cuda-bindings; without one, "
        "pip install 'cuda-core[cu13]', or [cu12] for CUDA 12"
    )


def load_library(image: bytes, name: str) -> ctypes.CDLL:
    """Load a shared library from memory.

    So what the cache has checked is what runs, and no folder needs to be writable, or mounted
    without noexec.

    Raises:
        CompileError: it cannot be loaded.
    """
    try:
        # Never closed: dlopen would take the next library under this number for this one.
        descriptor = os.memfd_create(name)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(image)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError as exc:
        raise CompileError(f"the compiled kernel {name} cannot be loaded: {exc}") from exc
