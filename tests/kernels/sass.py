"""What NVRTC makes of the kernels: registers, memory accesses. Needs no GPU.

    python -m tests.kernels.sass [sm_90 ...]                   # a table of all modes' registers
    python -m tests.kernels.sass --alternatives [sm_90 ...]    # a table of tuning.py's alternatives

cuobjdump is the one of triton's wheel, which comes with the CUDA builds of torch.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_adams.kernels.compile import cubin
from megatron_adams.kernels.modes import ALL_MODES, Mode
from megatron_adams.kernels.tuning import Tuning, tuning_of

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


@lru_cache(maxsize=4)
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
    """How many accesses move tensors in the code of one entry point, by their width in bits."""

    loads: Counter[int]
    stores: Counter[int]


def expected_accesses(mode: Mode, entry_point: str, tuning: Tuning | None = None) -> Accesses:
    """What the loops over groups consist of: one with, and one without the unrolling."""
    tuning = tuning or tuning_of(mode)
    read = [mode.grad, mode.exp_avg]
    if mode.main != "none":
        read.append(mode.main)
    if mode.main in ("none", "remainder"):
        read.append(mode.param)
    written = [dtype for dtype in (mode.exp_avg, mode.main, mode.param) if dtype != "none"]
    group = tuning.group or 16 // min(_BYTES[dtype] for dtype in (*read, *written))
    groups = 1 if tuning.unroll == 1 else tuning.unroll + 1

    def accesses(dtypes: Iterable[str]) -> Counter[int]:
        found: Counter[int] = Counter()
        for dtype in dtypes:
            width = min(group * _BYTES[dtype], 16)
            found[8 * width] += groups * group * _BYTES[dtype] // width
        return found

    return Accesses(accesses(read), accesses(written if entry_point == "adams_update" else ()))


def found_accesses(image: bytes, entry_point: str) -> Accesses:
    """All loads from and stores to global memory; other than tensors' are at most 64 bits wide."""
    found = Accesses(Counter(), Counter())
    for name, count in instructions(image, entry_point).items():
        kind, *modifiers = name.split(".")
        if kind in ("LDG", "STG"):
            widths = [int(word.lstrip("US")) for word in modifiers if word.lstrip("US").isdigit()]
            (found.loads if kind == "LDG" else found.stores)[widths[-1] if widths else 32] += count
    return found


def compile_all(
    modes: Iterable[Mode], arch: str, tuning: Tuning | None = None
) -> dict[Mode, bytes]:
    """The cubins of modes; NVRTC runs on all CPUs."""
    modes = tuple(modes)
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda mode: cubin(mode, arch, tuning=tuning), modes)
        return dict(zip(modes, images, strict=True))


def blocks_per_multiprocessor(registers: int, block: int = 256) -> int:
    """Blocks that fit: a warp takes of 65,536 registers 256 at a time; 2,048 threads at most."""
    warps = block // 32
    return min(64 // warps, 65536 // (warps * 256 * -(-registers * 32 // 256)))


# As benchmarks/step.py has them.
SHOWN_MODES = tuple(
    Mode(*dtypes.split())
    for dtypes in (
        "fp32 fp32 fp32 none",
        "fp32 bf16 fp32 fp32",
        "fp32 bf16 fp32 remainder",
        "bf16 bf16 bf16 remainder",
        "bf16 bf16 bf16 none",
        "bf16 e4m3 fp32 fp32",
        "bf16 bf16 fp16 fp16",
        "bf16 bf16 e4m3 fp32",
    )
)
ALTERNATIVES = (
    Tuning(),
    Tuning(group=4),
    Tuning(group=4, hardware_conversions=True),
    Tuning(group=8, hardware_conversions=True),
    Tuning(group=4, unroll=2, hardware_conversions=True),
    Tuning(group=4, block=512, hardware_conversions=True),
    Tuning(group=4, min_blocks=8, hardware_conversions=True),
    Tuning(group=4, load="no_allocate", store="streaming", hardware_conversions=True),
)


def describe(tuning: Tuning) -> str:
    """What differs from a Tuning without arguments."""
    changed = [
        f"{name}={value}"
        for name, value in tuning._asdict().items()
        if value != Tuning._field_defaults[name]
    ]
    return ", ".join(changed) or "none"


def print_alternatives(archs: Iterable[str]) -> None:
    print(
        "adams_update, compiled with other constants (megatron_adams/kernels/tuning.py): registers"
    )
    print("of a thread, threads that a multiprocessor runs at once, bytes spilled, and all wide")
    print("accesses in the code, loads and stores, by their bits.\n")
    print("| arch | mode | constants | registers | threads | spilled | loads | stores |")
    print("| --- | --- | --- | ---: | ---: | ---: | --- | --- |")
    for arch in archs:
        images = {tuning: compile_all(SHOWN_MODES, arch, tuning) for tuning in ALTERNATIVES}
        for mode in SHOWN_MODES:
            for tuning in ALTERNATIVES:
                image = images[tuning][mode]
                used = resources(image)["adams_update"]
                threads = tuning.block * blocks_per_multiprocessor(used.registers, tuning.block)
                cells = [arch, mode.name, describe(tuning), used.registers, threads]
                cells += [used.stack + used.local]
                for found in found_accesses(image, "adams_update"):
                    wide = [f"{found[bits]} of {bits}" for bits in (128, 64) if found[bits]]
                    cells.append(", ".join(wide) or "none")
                print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    arguments = sys.argv[1:]
    if "--alternatives" in arguments:
        arguments.remove("--alternatives")
        print_alternatives(arguments or ("sm_90",))
        return
    archs = arguments or ARCHS
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
