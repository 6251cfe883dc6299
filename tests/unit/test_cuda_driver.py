"""The CUDA launch path below the kernel: cuda.bindings, against a libcuda that launches nothing.

fake_cuda.c prints what the driver is told; what a GPU makes of it, tests/gpu shows.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_adams.kernels import Batch, Mode, PointerTable, Scalars
from megatron_adams.kernels.batch import kernel_arguments
from megatron_adams.kernels.compile import cubin
from tests.harness.c_library import compile_c

pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed")

from megatron_adams.kernels import cuda

ROOT = Path(__file__).parents[2]
# What a kernel takes, by ADAMS_PARAMETERS: p a pointer, i an int, f a float.
PARAMETERS = re.search(
    r"#define ADAMS_PARAMETERS((?:.*\\\n)*.*)",
    (ROOT / "megatron_adams/kernels/source/multi_tensor.h").read_text(),
)[1]
TYPES = "".join(
    "p" if "*" in parameter else {"int": "i", "float": "f"}[re.search(r"\w+", parameter)[0]]
    for parameter in PARAMETERS.split(",")
)
FP32, SCALED = Mode("fp32", "fp32", "fp32", "none"), Mode("fp32", "bf16", "fp16", "fp32")
MODES = (FP32, FP32._replace(is_guarded=True), SCALED)

SET_UP = """
import contextlib
import torch

class Stream:
    cuda_stream = 0x77

# Device 1 of a machine with Hopper GPUs.
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: 1
torch.cuda.current_stream = lambda device=None: Stream
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False

from megatron_adams.kernels import CompileError, Mode, PointerTable, Scalars, cuda, select_backend
from megatron_adams.kernels.batch import Batch, kernel_arguments

FP32 = Mode("fp32", "fp32", "fp32", "none")
SCALED = Mode("fp32", "bf16", "fp16", "fp32")
GPU = torch.device("cuda", 1)
"""

LAUNCH = """
for mode in (FP32, FP32._replace(is_guarded=True), SCALED):
    cuda.load(mode, GPU)
    print("loaded")
tensors = {n: [torch.randn(s) for s in (5, 20000)] for n in ("params", "grads", "exp_avgs")}
for name, scalar, found_inf in (
    ("numbers", 0.0, None), ("pointers", torch.tensor(0.5), torch.zeros(1))
):
    table = PointerTable()
    scalars = Scalars(scalar, scalar, scalar, found_inf, 0.9, 0.95, 1e-8, 0.1, True)
    cuda.run(Batch(**tensors), scalars, table, cuda.CudaDriver())
    values = [argument.value or 0 for argument in kernel_arguments(table, scalars).values]
    print("expected", *(v.hex() if isinstance(v, float) else v for v in values))
"""

REFUSE = """
for requested in ("cuda", "auto"):
    try:
        print(requested, select_backend(GPU, FP32, requested))
    except CompileError as error:
        print(requested, error)
"""


@pytest.fixture(scope="module")
def run_with_fake_driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    compile_c(Path(__file__).with_name("fake_cuda.c"), folder / "libcuda.so.1")

    # Once, and not in each of the processes below the fake driver.
    for mode in MODES:
        cubin(mode, "sm_90")

    def run(script: str, **environment: str) -> list[str]:
        """Run a script behind SET_UP; return the lines that it and the driver have printed."""
        paths = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        done = subprocess.run(
            [sys.executable, "-u", "-c", SET_UP + script],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": paths,
                "PYTHONPATH": str(ROOT),
                "FAKE_CUDA_TYPES": TYPES,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_kernels_are_loaded_at_start_and_launched_with_their_arguments(run_with_fake_driver):
    lines = run_with_fake_driver(LAUNCH)
    names = ("adams_update", "adams_update adams_rms", "adams_measure adams_update adams_finish")
    loads = []
    for entry_points in names:
        first, *rest = entry_points.split()
        loads += ["context 0x1001", "module ELF", f"function {first}"]
        loads += [*(f"function {name}" for name in rest), "loaded"]
    assert lines[: len(loads)] == loads
    # What is loaded is not loaded again.
    launches = [line for line in lines[len(loads) :] if not line.startswith("context")]
    assert [line.split()[0] for line in launches] == ["launch", "expected"] * 2
    for launched, expected in zip(launches[::2], launches[1::2], strict=True):
        _, *geometry = launched.split()[:9]
        # One block for each chunk of the two tensors: 5 and 20,000 elements of 16,384.
        assert geometry == ["3", "1", "1", "256", "1", "1", "0", "0x77"]
        got, want = launched.split()[9:], expected.split()[1:]
        assert len(got) == len(want) == len(TYPES)
        for kind, mine, theirs in zip(TYPES, got, want, strict=True):
            if kind == "f":
                assert float.fromhex(mine) == float.fromhex(theirs)
            else:
                assert int(mine) == int(theirs)


def test_kernel_that_the_driver_does_not_load_is_found_at_start(run_with_fake_driver):
    lines = run_with_fake_driver(REFUSE, FAKE_CUDA_REFUSES="1")
    by_name, chosen = (line for line in lines if not line.startswith("context"))
    assert by_name.startswith("cuda the driver does not load the kernel g32-p32-m32-w0 for cuda:1:")
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU, no kernel image is available" in by_name
    assert chosen == "auto foreach"


class RecordingDriver(cuda.CudaDriver):
    """Launches nothing."""

    def __init__(self, *, is_capturing: bool) -> None:
        super().__init__()
        self._is_capturing = is_capturing
        self.num_launches = 0

    def is_capturing(self, device: torch.device) -> bool:
        return self._is_capturing

    def launch(self, *_: object) -> None:
        self.num_launches += 1


@pytest.mark.parametrize(
    ("stream", "is_capturing", "is_recorded"),
    [("its own", False, False), ("another", False, True), ("another", True, False)],
)
def test_table_is_kept_for_a_stream_that_it_was_not_allocated_on(
    monkeypatch, stream, is_capturing, is_recorded
):
    """The next table takes its memory else, while the kernel of that stream still waits to run."""
    table, scalars = PointerTable(), Scalars(0.1, 1.0, 1.0, None, 0.9, 0.95, 1e-8, 0.0, True)
    batch = Batch(**{name: [torch.randn(3)] for name in ("params", "grads", "exp_avgs")})
    driver = RecordingDriver(is_capturing=is_capturing)
    cuda.run(batch, scalars, table, RecordingDriver(is_capturing=False))
    # As it would be on a GPU.
    table.device = torch.device("cuda")
    table._rows_stream = table._amax_stream = "its own"
    recorded = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *pair: recorded.append(pair))
    cuda.launch(table, scalars, driver)
    assert driver.num_launches == 1
    assert [id(tensor) for tensor, _ in recorded] == (
        [id(table.rows), id(table.amax)] if is_recorded else []
    )
    assert {name for _, name in recorded} <= {stream}


def test_scalars_on_another_gpu_are_copied_and_not_waited_for():
    """The device meta stands for it: reading a number there is an error."""
    table = PointerTable()
    table.device = torch.device("meta", 1)
    number = torch.zeros(1, dtype=torch.float64, device="meta")
    found_inf = torch.zeros(1, device="meta")
    scalars = Scalars(number, number, 1.0, found_inf, 0.9, 0.95, 1e-8, 0.0, True)
    keepalive = kernel_arguments(table, scalars).keepalive
    assert len(keepalive) == 3 and {tensor.dtype for tensor in keepalive} == {torch.float32}
    with pytest.raises(RuntimeError):
        number.item()
