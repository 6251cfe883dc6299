"""Time AdamS's step against other optimizers and against the memory stream that bounds it.

    python benchmarks/step.py [--out DIR] [--device cpu|cuda] [--sizes 50M ...] [--rounds N]

Contestants of one mode and size take turns, one step each, in an order that changes every round;
before each step the caches are overwritten, as forward and backward passes do. The README beside
this file explains the results: step.json (all times), step.csv and step.md (medians), step.png.
"""

import argparse
import gc
import importlib.metadata
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
from contestants import FP32, MODES, Contestant, adams, make_tensors, peers_of, stream
from report import REFERENCE, Results, Row

from megatron_adams.kernels import Mode, compile

WARM_UP_ROUNDS = 2
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Clock:
    """Times a step on one device, from cold caches."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._evictor = torch.zeros(evicted_bytes(device) // 4, dtype=torch.int32, device=device)

    def time_s(self, step: Callable[[], None]) -> float:
        self._evictor.add_(1)
        if not self._is_cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits until all is queued: its time is measured, not Python's.
        torch.cuda._sleep(10_000_000)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def evicted_bytes(device: torch.device) -> int:
    """How much is written between two steps: 256 MiB, or twice the CPU's largest cache.

    Servers have caches in which a good part of 50 million parameters would last until the next
    contestant's step.
    """
    if device.type != "cpu":
        return 2**28
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")]  # as 32768K
    return max([2**28, *(2 * 2**10 * int(size.removesuffix("K")) for size in sizes)])


def measure(contestants: list[Contestant], clock: Clock, num_rounds: int) -> dict[str, list[float]]:
    """Return the times of each contestant in seconds, a round each, by name."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    generator = random.Random(0)
    for index in range(WARM_UP_ROUNDS + num_rounds):
        # No contestant always comes after the same one, of whose tensors the caches may keep some.
        for contestant in generator.sample(contestants, len(contestants)):
            seconds = clock.time_s(contestant.step)
            if index >= WARM_UP_ROUNDS:
                times[contestant.name].append(seconds)
    return times


def run(args: argparse.Namespace) -> Results:
    device = torch.device(args.device)
    clock = Clock(device)
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for numel in args.sizes:
        for mode in args.modes:
            rows += measure_mode(mode, numel, clock, args.rounds, device, missing)
            gc.collect()  # what a library holds in cycles is as large as the tensors
    return Results(machine_facts(device, args), missing, rows)


def measure_mode(
    mode: Mode,
    numel: int,
    clock: Clock,
    num_rounds: int,
    device: torch.device,
    missing: dict[str, str],
) -> list[Row]:
    """Measure what takes part in a mode at a size; see `contestants.peers_of` for `missing`."""
    tensors = make_tensors(mode, numel, device)
    contestants = [adams(tensors), stream(tensors), *peers_of(tensors, missing)]
    if mode != FP32:
        reference = adams(make_tensors(FP32, numel, device))
        contestants.append(replace(reference, name=REFERENCE))
    times = measure(contestants, clock, num_rounds)
    print(f"{numel / 1e6:g}M {mode.name}:")
    rows = []
    for contestant in contestants:
        name = contestant.name
        rows.append(Row(numel, mode.name, name, contestant.bytes_per_param, times[name]))
        print(f"  {name:30} {rows[-1].median_s * 1e3:9.3f} ms", flush=True)
    return rows


def machine_facts(device: torch.device, args: argparse.Namespace) -> dict[str, str]:
    """What the numbers depend on."""
    facts = {
        "rounds": str(args.rounds),
        "torch": torch.__version__,
        "written between steps": f"{evicted_bytes(device) / 2**20:g} MiB",
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["CUDA"] = str(torch.version.cuda)
    else:
        compiler = compile.host_compiler()
        facts["device"] = f"{_cpu_model()}, {torch.get_num_threads()} threads"
        facts["compiler"] = "none" if compiler is None else f"{compiler.version}"
        facts["target"] = compile.host_arch()
    for package in ("deepspeed", "transformer-engine", "apex"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def parse_size(text: str) -> int:
    factor = {"k": 10**3, "M": 10**6, "G": 10**9}.get(text[-1], 1)
    numel = int(text.rstrip("kMG")) * factor
    if numel <= 0 or numel % 16:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a positive multiple of 16, which the stream's vectors are"
        )
    return numel


def parse_mode(text: str) -> Mode:
    by_name = {mode.name: mode for mode in MODES}
    if text not in by_name:
        raise argparse.ArgumentTypeError(f"{text}: must be one of {', '.join(by_name)}")
    return by_name[text]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/step"), help="default: %(default)s")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[10**6, 10**7, 5 * 10**7, 10**8],
        help="elements, as 50M; default: 1M 10M 50M 100M",
    )
    parser.add_argument("--modes", type=parse_mode, nargs="+", default=list(MODES), metavar="MODE")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = run(args)
    report.write(results, args.out)
    print(report.markdown(results))
    print(f"written: {args.out}/step.md, step.csv, step.json, step.png")


if __name__ == "__main__":
    main()
