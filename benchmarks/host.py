"""Time how long Python takes for an optimizer step, if gradients stay and if they move.

    python benchmarks/host.py [--out FILE] [--device cpu|cuda] [--tensors 148 1000] [--rounds N]

The tensors have 16 elements, so that on a CPU a step consists of almost nothing but the host's
work. (The kernel is part of it.) On a GPU, the clock stops when the call returns. The clock is this
thread's CPU time, which other processes on the machine do not lengthen. Gradients move when
`zero_grad(set_to_none=True)`, torch's default, frees them and backward makes new ones.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
from contestants import BETAS, BOTH, FOREACH, FUSED, LR, WEIGHT_DECAY
from step import cpu_model

from megatron_adams import AdamS

NUMEL = 16
WARM_UP_ROUNDS = 3
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamS": AdamS,
    "AdamS, match_update_rms": lambda *args, **kwargs: AdamS(*args, match_update_rms=0.2, **kwargs),
    FUSED: lambda *args, **kwargs: torch.optim.AdamW(*args, fused=True, **kwargs),
    FOREACH: lambda *args, **kwargs: torch.optim.AdamW(*args, foreach=True, **kwargs),
}


class Case(NamedTuple):
    """One optimizer on a number of tensors; `moves`: whether gradients move before each step."""

    num_tensors: int
    optimizer: str
    moves: bool


class Subject:
    """An optimizer over tensors of its own, in two groups as Megatron makes them."""

    def __init__(self, name: str, num_tensors: int, device: torch.device) -> None:
        self._device = device
        self._params = [
            torch.nn.Parameter(torch.randn(NUMEL, device=device, dtype=torch.float32))
            for _ in range(num_tensors)
        ]
        for param in self._params:
            param.grad = torch.randn_like(param)
        groups = [
            {"params": self._params[::2], "weight_decay": WEIGHT_DECAY},
            {"params": self._params[1::2], "weight_decay": 0.0},
        ]
        self._optimizer = OPTIMIZERS[name](groups, lr=LR, betas=BETAS)

    def time_s(self, *, moves: bool) -> float:
        if moves:
            # The new ones are made while the old ones are there, so that none gets an old address.
            grads = [param.grad.clone() for param in self._params if param.grad is not None]
            for param, grad in zip(self._params, grads, strict=True):
                param.grad = grad
        self._synchronize()
        start = time.thread_time()
        self._optimizer.step()
        seconds = time.thread_time() - start
        self._synchronize()
        return seconds

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(tensors: list[int], num_rounds: int, device: torch.device) -> dict[Case, list[float]]:
    """Return the times of each case in seconds, one per round. In a round, all take turns."""
    subjects = {(n, name): Subject(name, n, device) for n in tensors for name in OPTIMIZERS}
    times: dict[Case, list[float]] = {
        Case(*subject, moves): [] for subject in subjects for moves in (False, True)
    }
    generator = random.Random(0)
    for index in range(WARM_UP_ROUNDS + num_rounds):
        for case in generator.sample([*times], len(times)):
            seconds = subjects[case[:2]].time_s(moves=case.moves)
            if index >= WARM_UP_ROUNDS:
                times[case].append(seconds)
    return times


COLUMNS = (
    "tensors",
    "optimizer",
    "gradients stay, ms",
    "quartiles",
    "gradients move, ms",
    "quartiles",
    "stay / torch fused",
    "move / torch fused",
)


def markdown(times: dict[Case, list[float]], facts: dict[str, str]) -> str:
    rows = []
    for num_tensors, name in dict.fromkeys(case[:2] for case in times):
        stay, move = (times[Case(num_tensors, name, moves)] for moves in (False, True))
        fused = [times[Case(num_tensors, FUSED, moves)] for moves in (False, True)]
        rows.append(
            (
                f"{num_tensors:,}",
                name,
                f"{median(stay) * 1e3:.3f}",
                f"{report.spread(stay):.1%}",
                f"{median(move) * 1e3:.3f}",
                f"{report.spread(move):.1%}",
                f"{median(stay) / median(fused[0]):.2f}",
                f"{median(move) / median(fused[1]):.2f}",
            )
        )
    lines = [f"- {name}: {value}\n" for name, value in facts.items()]
    return (
        "# What the host takes of a step\n\n"
        "Written by `python benchmarks/host.py`; [the README](../README.md) says what it times.\n\n"
        + "".join(lines)
        + "\n"
        + report.text_table(COLUMNS, rows, num_words=2)
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the table there, too")
    parser.add_argument("--device", choices=BOTH, default="cpu", help="default: %(default)s")
    parser.add_argument("--tensors", type=int, nargs="+", default=[148, 1000])
    parser.add_argument("--rounds", type=int, default=41, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # The tensors are too small for several threads.
    torch.set_num_threads(1)
    device = torch.device(args.device)
    facts = {"CPU": f"{cpu_model()}, 1 thread", "torch": torch.__version__}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    facts |= {"elements of a tensor": str(NUMEL), "rounds": str(args.rounds)}
    text = markdown(measure(args.tensors, args.rounds, device), facts)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
