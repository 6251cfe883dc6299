"""Run the kernels under AddressSanitizer and UBSan, on random batches; for test_sanitizers.py.

    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
        python -m tests.kernels.sanitize [name of a fault in mutate.py]

prints how many checks there were. What a sanitizer finds goes to stderr.
"""

import random
import sys
import tempfile
from pathlib import Path

import torch

from megatron_adams.kernels import PointerTable, cuda, host
from megatron_adams.kernels.compile import host_arch, host_flags, load_library, source_text
from megatron_adams.kernels.table import CHUNK
from tests.kernels.batteries import Subject
from tests.kernels.checks import check, make_batch, scalar_cases, with_guards
from tests.kernels.emulator import FLAGS, SOURCE, build, device_text
from tests.kernels.mutate import FAULTS, planted
from tests.kernels.test_backends import REPRESENTATIVES

NUM_BATCHES = 12
MODES = (
    *(REPRESENTATIVES[i] for i in (0, 1, 2, 4)),
    REPRESENTATIVES[4]._replace(is_guarded=True),
)
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1")


def _libraries(modes, source, folder):
    for mode in modes:
        name = f"{mode.name}.so"
        build(device_text(mode, source), mode, (*FLAGS, *_SANITIZERS), folder / name)
        emulated = load_library((folder / name).read_bytes(), mode.name)
        text = source_text("host.cpp", source)
        build(text, mode, (*host_flags(host_arch()), *_SANITIZERS), folder / name)
        yield mode, emulated, load_library((folder / name).read_bytes(), mode.name)


def _random_batch(mode, generator):
    near = (0, 1, 15, 16, 17, 255, 256, 4096, CHUNK, 2 * CHUNK)
    sizes = [
        max(0, generator.choice(near) + generator.randint(-2, 2))
        for _ in range(generator.randint(1, 8))
    ]
    offsets = generator.choice(((0,), (1,), [generator.randint(0, 16) for _ in range(7)]))
    special = generator.random() < 0.5
    batch = make_batch(mode, sizes, offsets=offsets, special=special, seed=len(sizes))
    return with_guards(batch, sums=mode.is_guarded, factors=mode.is_guarded)


@torch.no_grad()
def main() -> None:
    generator = random.Random(0)
    num_checks = 0
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        modes, source = MODES, SOURCE
        if len(sys.argv) > 1:
            (fault,) = (fault for fault in FAULTS if fault.name == sys.argv[1])
            modes, source = (fault.mode,), planted(fault, Path(folder) / "source")
        for mode, emulated, compiled in _libraries(modes, source, Path(folder)):
            subject = Subject(load=lambda _, library=emulated: library)
            host.load = lambda _, library=compiled: library
            for order in range(NUM_BATCHES):
                scalars = scalar_cases()[generator.choice(sorted(scalar_cases()))]
                state = generator.getstate()
                for run in (
                    lambda batch, scalars, order=order, subject=subject: cuda.run(
                        batch, scalars, PointerTable(), subject.driver(order=order)
                    ),
                    lambda batch, scalars: host.run(batch, scalars, PointerTable()),
                ):
                    generator.setstate(state)
                    found = check(run, _random_batch(mode, generator), scalars)
                    assert not found, (mode.name, found)
                    num_checks += 1
    print(f"{num_checks} checks")


if __name__ == "__main__":
    main()
