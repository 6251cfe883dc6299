"""Check that the kernel runs at all: each kind of state in a few sizes, against the oracle.

In a rehearsal the kernel runs on the emulator of tests/kernels. With --small there are only small
tensors and no CUDA graph; sanitizer.py watches that.
"""

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from megatron_adams import AdamS
from megatron_adams.kernels import PointerTable, compile, cuda
from megatron_adams.kernels.batch import Batch
from megatron_adams.kernels.modes import Mode
from megatron_adams.kernels.table import CHUNK
from megatron_adams.kernels.tuning import tuning_of
from tests.gpu.stages.stage import Stage
from tests.kernels.checks import (
    MISALIGNED,
    SCALARS,
    copy_batch,
    differences,
    expected,
    make_batch,
    scalar_cases,
    with_guards,
)
from tests.kernels.emulator import EmulatedDriver

FP32 = Mode("fp32", "fp32", "fp32", "none")
MODES = (
    FP32,
    Mode("fp32", "bf16", "fp32", "fp32"),  # Megatron's in bf16
    Mode("bf16", "bf16", "bf16", "remainder"),
    Mode("bf16", "bf16", "fp16", "fp16"),  # three entry points
    Mode("bf16", "e4m3", "fp32", "fp32"),
    Mode("bf16", "e5m2", "e4m3", "fp32"),
)
SMALL = (1, 17, 4099, CHUNK + 5, 0)
LARGE = (*SMALL, 1_000_003)


class Smoke:
    def __init__(self) -> None:
        self.stage = Stage("smoke")
        self.driver: Any = EmulatedDriver() if self.stage.is_rehearsal else cuda.CudaDriver()
        self._sizes = SMALL if self.stage.is_small or self.stage.is_rehearsal else LARGE
        self._modes = MODES[:1] if self.stage.is_rehearsal else MODES

    def run(self) -> int:
        stage = self.stage
        if not self.stage.is_small:
            with stage.check("compiled by NVRTC here") as found:
                found["words"] = f"{self._compile_s():.2f} s"
        for mode in self._modes:
            for case, options in (
                ("device_scalars", {}),
                ("l2", {"offsets": MISALIGNED}),
                ("decoupled", {"special": True}),
            ):
                with stage.check(f"{mode.name}, {case}, {options or 'aligned'}"), torch.no_grad():
                    self._step(mode, case, options)
        with stage.check("updates are counted and scaled"), torch.no_grad():
            self._guarded_step()
        if stage.is_rehearsal:
            return stage.exit_code
        with (
            stage.check("on a side stream"),
            torch.no_grad(),
            torch.cuda.stream(torch.cuda.Stream()),
        ):
            self._step(FP32, "decoupled", {})
            torch.cuda.current_stream().synchronize()
        with stage.check("AdamS, first step") as found:
            found["words"] = self._optimizer()
        if not self.stage.is_small:
            with stage.check("replay of a CUDA graph"), torch.no_grad():
                self._replay()
        return stage.exit_code

    def _compile_s(self) -> float:
        """Return the seconds of one compilation without the cache; without a GPU, for sm_90."""
        arch = "sm_90" if self.stage.is_rehearsal else cuda.arch_of(0)
        defines = {**FP32.defines(), **tuning_of(FP32).defines()}
        text = compile.source_text("device.cu")
        start = time.perf_counter()
        compile.compile_cuda(text, defines, arch)
        return time.perf_counter() - start

    def _launch(self, batch: Batch, scalars: Any, **options: Any) -> None:
        cuda.run(batch, scalars, PointerTable(), self.driver, **options)

    def _step(self, mode: Mode, case: str, options: dict[str, Any]) -> None:
        batch = make_batch(mode, self._sizes, device=self.stage.device, seed=1, **options)
        scalars = scalar_cases(self.stage.device)[case]
        for _ in range(1 if "special" in options else 2):
            want = expected(batch, scalars)
            self._launch(batch, scalars)
            _compare(batch, want)

    def _guarded_step(self) -> None:
        for only_count in (True, False):
            batch = make_batch(FP32, self._sizes, device=self.stage.device, seed=2)
            batch = with_guards(batch, sums=True, factors=not only_count)
            want = expected(batch, SCALARS, only_count=only_count)
            self._launch(batch, SCALARS, only_count=only_count)
            _compare(batch, want)

    def _optimizer(self) -> str:
        """Take two steps of the optimizer that users have; return their times."""
        params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in self._sizes]
        optimizer = AdamS(params, lr=0.01, kernel="cuda")
        times = []
        for _ in range(2):
            for param in params:
                param.grad = torch.randn_like(param)
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        assert all(param.isfinite().all() for param in params)
        return f"{times[0] * 1e3:.1f} ms, the second {times[1] * 1e3:.2f} ms"

    def _replay(self) -> None:
        batch = make_batch(FP32, self._sizes, device="cuda", seed=3)
        scalars = scalar_cases("cuda")["device_scalars"]
        table = PointerTable()
        skipped = replace(scalars, found_inf=torch.ones(1, device="cuda"))
        cuda.run(batch, skipped, table, self.driver)
        before = copy_batch(batch, "cpu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda.run(batch, scalars, table, self.driver)
        _compare(batch, before)
        for lr in (3e-3, 0.5):
            scalars.lr.fill_(lr)
            want = expected(batch, scalars)
            graph.replay()
            _compare(batch, want)


def _compare(got: Batch, want: Batch) -> None:
    found = differences(got, want)
    assert not found, f"{len(found)} tensors are wrong, as {found[0]}"


if __name__ == "__main__":
    sys.exit(Smoke().run())
