"""Compile the kernel sources for one mode: to a shared library for the CPU, or a cubin for a GPU.

Called by host.py, cuda.py, the commands and the doctor; goes through the cache in cache.py. It does
not import torch, and imports NVRTC's bindings only where they are used.
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
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_adams.kernels.cache import KernelCache, logger
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.tuning import Tuning, tuning_of

# Part of every entry's name. Raise it when the contents of an entry change their meaning.
_FORMAT = 1
_SOURCE = Path(__file__).parent / "source"
INSTALL_NVRTC = "pip install 'megatron-adams[cu13]', or [cu12] for CUDA 12"
_CPUINFO = Path("/proc/cpuinfo")
_COMPILER_TIMEOUT_S = 300
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')

# The levels of the x86-64 psABI, and the flags of /proc/cpuinfo that each needs in addition to
# those of the levels before it.
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
    # Every operation is rounded on its own, as in `update` and on the GPU. No operation may trap or
    # set errno: the compiler would not vectorize the loop.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# The same for a GPU: no contraction, subnormals kept, division and square root correctly rounded.
_CUDA_FLAGS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--device-as-default-execution-space",
)


class CompileError(RuntimeError):
    """A kernel cannot be compiled or loaded; says what was tried, and the compiler's message."""


class Compiler(NamedTuple):
    """A C++ compiler: its command with fixed arguments, and the first line of its version."""

    command: tuple[str, ...]
    version: str


class Recipe(NamedTuple):
    """How to compile a kernel, and its name in the cache, which covers all that it depends on."""

    name: str
    build: Callable[[], bytes]


def host_library(mode: Mode, kernels: KernelCache | None = None) -> ctypes.CDLL:
    """Return a mode's kernel for the CPU, compiled at its first use on this machine.

    If there is no compiler, take a cached library of any compiler: it gives the same bits.

    Raises:
        CompileError: there is no compiler, it fails, or the library cannot be loaded.
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
    """Return a mode's kernel for a GPU, compiled at its first use.

    Args:
        arch: the GPU's architecture, such as "sm_90".
        tuning: by default the mode's own.

    Raises:
        CompileError: there is no NVRTC, or it fails.
    """
    return (kernels or KernelCache()).get(*cuda_recipe(mode, arch, tuning))


def host_recipe(mode: Mode, arch: str, compiler: Compiler) -> Recipe:
    """Return how the kernel for the CPU is compiled for an architecture as `host_arch` names it."""
    text = source_text("host.cpp")
    identity = _digest(compiler.version, *compiler.command[1:])
    return Recipe(
        _host_name(mode, arch, text, identity),
        lambda: _timed(mode, arch, lambda: compile_host(text, mode.defines(), compiler, arch)),
    )


def cuda_recipe(mode: Mode, arch: str, tuning: Tuning | None = None) -> Recipe:
    """Return how the kernel for a GPU is compiled for an architecture such as "sm_90".

    Args:
        tuning: by default the mode's own.

    Raises:
        CompileError: no NVRTC.
    """
    text = source_text("device.cu")
    defines = {**mode.defines(), **(tuning or tuning_of(mode)).defines()}
    digest = _digest(_FORMAT, text, defines, _CUDA_FLAGS, nvrtc_version())
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
    """Return a source with its local includes in place, each once.

    This text is compiled and hashed. `#line` keeps file names and line numbers right in compilers'
    messages. An include must not be inside a conditional: its text might be dropped there and then
    be missing later.

    Args:
        name: the name of a file in `folder`.
        folder: by default the package's folder of sources.
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
    """Return $CXX (a command, possibly with arguments), else g++ or clang++ from PATH, or None.

    Raises:
        CompileError: the compiler does not print its version.
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
    """Return this CPU's highest x86-64 level, such as "x86-64-v3"; on other machines "aarch64" etc.

    It is a level, not "native", because different machines may share a cache in a home folder.
    """
    if platform.machine() != "x86_64":
        return platform.machine()
    with _CPUINFO.open(encoding="utf-8") as cpuinfo:
        # Only the first CPU's line: on a machine with many CPUs, reading the rest takes
        # milliseconds.
        flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    arch = "x86-64"
    for level, needed in _LEVELS.items():
        if not set(needed.split()) <= set(flags):
            break
        arch = level
    return arch


def host_flags(arch: str) -> tuple[str, ...]:
    """Return the C++ compiler's flags for an architecture as `host_arch` names it."""
    return (*_HOST_FLAGS, f"-march={arch}") if arch.startswith("x86-64") else _HOST_FLAGS


def compile_host(text: str, defines: Mapping[str, str], compiler: Compiler, arch: str) -> bytes:
    """Compile a source into a shared library, and return the file's contents.

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
    """Compile a source into a cubin, and return it. This needs no GPU and no driver.

    Raises:
        CompileError: no NVRTC, or it fails.
    """
    flags = (f"--gpu-architecture={arch}", *cuda_flags(defines))
    encoded = [flag.encode() for flag in flags]
    _, program = _nvrtc("nvrtcCreateProgram", text.encode(), b"device.cu", 0, None, None)
    try:
        (error,) = _nvrtc("nvrtcCompileProgram", program, len(encoded), encoded)
        if error.value != 0:
            log = _output(program, "ProgramLog").rstrip(b"\0\n").decode()
            raise CompileError(f"NVRTC for {arch} with {dict(defines)}: {error.name}\n{log}")
        return _output(program, "CUBIN")
    finally:
        _nvrtc("nvrtcDestroyProgram", program)


def cuda_flags(defines: Mapping[str, str]) -> list[str]:
    """Return NVRTC's flags for a source with these macros, without the architecture."""
    return [*_CUDA_FLAGS, *(f"--define-macro={name}={value}" for name, value in defines.items())]


def _output(program: Any, what: str) -> bytes:
    """Return what NVRTC has of a program: its "CUBIN" or its "ProgramLog"."""
    _, size = _nvrtc(f"nvrtcGet{what}Size", program)
    output = bytearray(size)
    _nvrtc(f"nvrtcGet{what}", program, output)
    return bytes(output)


def nvrtc_version() -> str:
    """Return the version of the NVRTC that `compile_cuda` uses, such as "13.0".

    Raises:
        CompileError: there is none.
    """
    _, major, minor = _nvrtc("nvrtcVersion")
    return f"{major}.{minor}"


def cuda_archs() -> tuple[str, ...]:
    """Return the architectures that this NVRTC compiles for, such as "sm_90", without variants.

    Raises:
        CompileError: there is no NVRTC.
    """
    _, archs = _nvrtc("nvrtcGetSupportedArchs")
    return tuple(f"sm_{arch}" for arch in archs)


def _nvrtc(function: str, *arguments: Any) -> tuple[Any, ...]:
    """Call a function of NVRTC's; return its error code, and behind that its results."""
    try:
        from cuda.bindings import nvrtc

        return tuple(getattr(nvrtc, function)(*arguments))
    except (ImportError, RuntimeError) as exc:  # RuntimeError: the bindings find no library
        raise _no_nvrtc(exc) from exc


def _no_nvrtc(exc: Exception) -> CompileError:
    return CompileError(
        f"no NVRTC ({exc}): the CUDA builds of torch 2.10 and later bring it and cuda-bindings; "
        f"without one, {INSTALL_NVRTC}"
    )


def load_library(image: bytes, name: str) -> ctypes.CDLL:
    """Load a shared library from memory.

    This way, exactly what the cache has checked runs, and no folder has to be writable or mounted
    without noexec.

    Raises:
        CompileError: it cannot be loaded.
    """
    try:
        # The descriptor is never closed. If another library got the same number, dlopen would take
        # it for this one.
        descriptor = os.memfd_create(name)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(image)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError as exc:
        raise CompileError(f"the compiled kernel {name} cannot be loaded: {exc}") from exc
