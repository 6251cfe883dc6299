"""The GPU form of the kernel, executed on the CPU: `EmulatedDriver` in place of a GPU.

source/device.cu is compiled by g++ behind shim.h, which has what it takes from CUDA. The table, the
arguments and the choice of entry points are the product's own (kernels/cuda.py).
"""

import ctypes
import hashlib
import random
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from megatron_adams.kernels import compile as compiling
from megatron_adams.kernels.cache import KernelCache
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.tuning import Tuning, tuning_of

SOURCE = Path(compiling.__file__).parent / "source"
_SHIM = Path(__file__).parent / "shim.h"
# -O1 takes a third of -O3's time, and the tests run small tensors. Uninitialized memory is filled
# with a pattern, as registers of a GPU hold anything.
FLAGS = (
    *("-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"),
    "-ftrivial-auto-var-init=pattern",
)

# LANES in shim.h.
_LANES = 32


class _Grid(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(ctypes.c_longlong)),
        ("num_blocks", ctypes.c_longlong),
        ("warps", ctypes.POINTER(ctypes.c_int)),
        ("num_warps", ctypes.c_int),
        ("lanes", ctypes.POINTER(ctypes.c_int)),
    )


def device_text(mode: Mode, source: Path = SOURCE) -> str:
    """The emulated kernel of a mode: shim.h, device.cu with its includes, and the exports."""
    names = mode.entry_points + (mode.count_entry_points if mode.is_guarded else ())
    exports = (f"EMULATED({entry_point})" for entry_point in names)
    return "\n".join((_SHIM.read_text(), compiling.source_text("device.cu", source), *exports, ""))


def build(
    text: str, mode: Mode, flags: Sequence[str], output: Path, tuning: Tuning | None = None
) -> None:
    """Compile a text for a mode into a shared library, by the mode's own tuning or another."""
    defines = {**mode.defines(), **(tuning or tuning_of(mode)).defines()}
    macros = (f"-D{name}={value}" for name, value in defines.items())
    command = ["g++", *flags, *macros, "-x", "c++", "-", "-o", str(output)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise compiling.CompileError(done.stderr)


def load_emulator(
    mode: Mode,
    source: Path = SOURCE,
    flags: Sequence[str] = FLAGS,
    tuning: Tuning | None = None,
) -> ctypes.CDLL:
    """The emulated kernel of a mode, from the cache of compiled kernels or compiled for it."""
    text = device_text(mode, source)
    tuning = tuning or tuning_of(mode)
    digest = hashlib.sha256(f"{text} {mode} {flags} {tuning}".encode()).hexdigest()[:32]

    def compiled() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            build(text, mode, flags, Path(folder) / "emulator.so", tuning)
            return (Path(folder) / "emulator.so").read_bytes()

    image = KernelCache().get(f"emulated-{mode.name}.{digest}.so", compiled)
    return compiling.load_library(image, mode.name)


load_once = cache(load_emulator)


@dataclass(frozen=True)
class Launch:
    """A recorded launch, and what it was given."""

    mode: Mode
    entry_point: str
    num_blocks: int
    arguments: tuple[ctypes._SimpleCData, ...]


@dataclass
class EmulatedDriver:
    """cuda.Driver on the CPU.

    Attributes:
        order: of blocks, warps and lanes: 0 forward, 1 reversed, otherwise the seed of a shuffle.
        is_recording: what `is_capturing` says; then nothing is executed, as in a capture.
        blocks: the only blocks that are executed; None: all of them.
        load: mode -> the library.
        constants: what the library was compiled with; None: the mode's own.
        launches: all launches so far.
    """

    order: int = 0
    is_recording: bool = False
    blocks: Sequence[int] | None = None
    load: object = load_once
    constants: Tuning | None = None
    launches: list[Launch] = field(default_factory=list)

    def is_capturing(self, device: torch.device) -> bool:
        return self.is_recording

    def tuning(self, mode):
        return self.constants or tuning_of(mode)

    def launch(self, mode, entry_point, num_blocks, arguments, device) -> None:
        assert device == torch.device("cpu")
        assert num_blocks > 0  # CUDA: invalid argument
        # The values as they are now: a launch copies its arguments.
        copies = tuple(type(argument)(argument.value) for argument in arguments)
        self.launches.append(Launch(mode, entry_point, num_blocks, copies))
        if not self.is_recording:
            self.execute(self.launches[-1])

    def replay(self) -> None:
        """Execute all recorded launches, as the replay of a CUDA graph does."""
        for launch in self.launches:
            self.execute(launch)

    def execute(self, launch: Launch) -> None:
        blocks = range(launch.num_blocks) if self.blocks is None else self.blocks
        warps, lanes = range(self.tuning(launch.mode).block // _LANES), range(_LANES)
        grid = _Grid(
            (ctypes.c_longlong * len(blocks))(*self._ordered(blocks)),
            len(blocks),
            (ctypes.c_int * len(warps))(*self._ordered(warps)),
            len(warps),
            (ctypes.c_int * len(lanes))(*self._ordered(lanes)),
        )
        library = self.load(launch.mode)
        address = ctypes.c_void_p.in_dll(library, f"emulated_{launch.entry_point}").value
        types = [type(argument) for argument in launch.arguments]
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *types)(address)
        if function(ctypes.addressof(grid), *launch.arguments) != 0:
            raise AssertionError(f"{launch.entry_point}: lanes of a warp diverge at a reduction")

    def _ordered(self, indices: Sequence[int]) -> Sequence[int]:
        if self.order < 2:
            return indices[:: -1 if self.order else 1]
        return random.Random(self.order).sample(indices, len(indices))
