"""Compare steps in a CUDA graph with plain steps: time and bits, for many tensors.

A rehearsal takes few small tensors, and the stand-in for CUDA graphs in tests/.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_adams import AdamS
from tests.gpu.stages.stage import Stage
from tests.harness import cuda_graph_stand_in

Optimizer = torch.optim.Optimizer


def gpt2_numels() -> list[int]:
    """Return the sizes of the 148 tensors of GPT-2 124M."""
    width = 768
    layer = [width, width, 3 * width**2, 3 * width, width**2, width]
    layer += [width, width, 4 * width**2, 4 * width, 4 * width**2, width]
    return [50257 * width, 1024 * width, *layer * 12, width, width]


LISTS = {"148 tensors of GPT-2 124M": gpt2_numels(), "1,000 tensors of 64K": [65536] * 1000}
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "AdamS": lambda params: AdamS(params, lr=1e-3, capturable=True),
    "torch AdamW, fused": lambda params: torch.optim.AdamW(
        params, lr=torch.tensor(1e-3, device=params[0].device), fused=True, capturable=True
    ),
}


class Graphs:
    def __init__(self) -> None:
        self._stage = Stage("graphs")

    def run(self) -> int:
        stage = self._stage
        lists = {"3 tensors": [5, 1000, 7]} if stage.is_rehearsal else LISTS
        # torch's own optimizer needs a real GPU.
        names = ["AdamS"] if stage.is_rehearsal else list(OPTIMIZERS)
        # The stand-in records the launches of the host kernel.
        with cuda_graph_stand_in.installed() if stage.is_rehearsal else nullcontext():
            for list_name, numels in lists.items():
                for name in names:
                    with stage.check(f"{name}, {list_name}") as found:
                        found.update(self._compare(OPTIMIZERS[name], numels))
        return stage.exit_code

    def _build(
        self, make: Callable[[list[Any]], Optimizer], numels: list[int]
    ) -> tuple[list[Tensor], Optimizer]:
        generator = torch.Generator(self._stage.device).manual_seed(0)

        def random(numel: int) -> Tensor:
            return torch.randn(numel, generator=generator, device=self._stage.device)

        params = [torch.nn.Parameter(random(numel)) for numel in numels]
        for param in params:
            param.grad = random(param.numel()) * 1e-2
        return params, make(params)

    def _compare(self, make: Callable[[list[Any]], Optimizer], numels: list[int]) -> dict[str, Any]:
        """Return the times of a step and a replay in us, without pauses; assert equal bits."""
        num_steps = 4 if self._stage.is_rehearsal else 50
        plain_params, plain = self._build(make, numels)
        params, optimizer = self._build(make, numels)
        # The first step makes the state. Before the capture, a step must run on a side stream.
        plain.step()
        if not self._stage.is_rehearsal:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        plain_us = self._time_us(plain.step, num_steps)
        replay_us = self._time_us(graph.replay, num_steps)
        are_equal = all(torch.equal(a, b) for a, b in zip(plain_params, params, strict=True))
        assert are_equal, "the bits of replayed steps are others than those of plain ones"
        words = f"a step {plain_us:.0f} us, a replay {replay_us:.0f} us, equal bits"
        return {"plain_us": plain_us, "replay_us": replay_us, "words": words}

    def _time_us(self, step: Callable[[], object], num_steps: int) -> float:
        """Return the median time of three rounds. A round ends when the device is done."""

        def wait() -> None:
            if not self._stage.is_rehearsal:
                torch.cuda.synchronize()

        times = []
        for _ in range(3):
            wait()
            start = time.perf_counter()
            for _ in range(num_steps):
                step()
            wait()
            times.append((time.perf_counter() - start) / num_steps)
        return median(times) * 1e6


if __name__ == "__main__":
    sys.exit(Graphs().run())
