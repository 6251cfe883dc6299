"""What NVRTC makes of the kernels: registers, memory accesses. Needs no GPU.

    python tests/kernels/sass.py [sm_90 ...]

prints a table of all modes' registers. cuobjdump is the one of triton's wheel, which comes with
the CUDA builds of torch.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_adams.kernels.compile import cubin
from megatron_adams.kernels.modes import ALL_MODES, Mode

ARCHS = ("sm_80", "sm_90", "sm_100")
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "e4m3": 1, "e5m2": 1, "remainder": 2}


def cuobjdump() -> Path | None:
    """The disassembler, or None where triton is not installed."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return path if path.exists() else None


class Resources(NamedTuple):
    """What a thread takes; bytes but for the registers."""

    registers: int
    stack: int
    local: int


def resources(image: bytes) -> dict[str, Resources]:
    """Of each entry point of a cubin."""
    output = _dump(image, "-res-usage")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}


def instructions(image: bytes, entry_point: str) -> Counter[str]:
    """How often each instruction stands in an entry point, by its name with its modifiers."""
    output = _dump(image, "-sass", "-fun", entry_point)
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", output))


def _dump(image: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(cuobjdump()), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Accesses(NamedTuple):
    """128-bit accesses of one iteration of the vector loop."""

    loads: int
    stores: int


def expected_accesses(mode: Mode, entry_point: str) -> Accesses:
    """16 bytes of the narrowest tensor, and as many elements of the others."""
    read = [mode.grad, mode.exp_avg]
    if mode.main != "none":
        read.append(mode.main)
    if mode.main in ("none", "remainder"):
        read.append(mode.param)
    written = [dtype for dtype in (mode.exp_avg, mode.main, mode.param) if dtype != "none"]
    vector = 16 // min(_BYTES[dtype] for dtype in (*read, *written))

    def accesses(dtypes: Iterable[str]) -> int:
        return sum(vector * _BYTES[dtype] // 16 for dtype in dtypes)

    stores = accesses(written) if entry_point == "adams_update" else 0
    return Accesses(accesses(read), stores)


def compile_all(modes: Iterable[Mode], arch: str) -> dict[Mode, bytes]:
    """The cubins of modes; NVRTC runs on all CPUs."""
    modes = tuple(modes)
    with ThreadPoolExecutor() as pool:
        return dict(zip(modes, pool.map(lambda mode: cubin(mode, arch), modes), strict=True))


def blocks_per_multiprocessor(registers: int) -> int:
    """Blocks of 256 threads that fit: a warp takes of 65,536 registers 256 at a time; 8 at most."""
    return min(8, 65536 // (8 * 256 * -(-registers * 32 // 256)))


def main() -> None:
    archs = sys.argv[1:] or ARCHS
    used = {
        arch: {mode: resources(image) for mode, image in compile_all(ALL_MODES, arch).items()}
        for arch in archs
    }
    print("Registers of adams_update, adams_measure and adams_finish; in brackets, the blocks of")
    print("adams_update that a multiprocessor runs at once; then the stack, if there is one.\n")
    print("| mode |", " | ".join(archs), "|")
    print("| --- |", " | ".join("---" for _ in archs), "|")
    for mode in ALL_MODES:
        cells = (_cell(used[arch][mode]) for arch in archs)
        print(f"| {mode.name} |", " | ".join(cells), "|")


def _cell(used: dict[str, Resources]) -> str:
    names = [name for name in ("adams_update", "adams_measure", "adams_finish") if name in used]
    registers = ", ".join(str(used[name].registers) for name in names)
    stack = sum(used[name].stack for name in names)
    blocks = blocks_per_multiprocessor(used["adams_update"].registers)
    return f"{registers} ({blocks})" + (f" stack {stack}" if stack else "")


if __name__ == "__main__":
    main()
