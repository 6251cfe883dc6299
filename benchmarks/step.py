"""Time AdamS's step against other optimizers and against the memory that bounds it.

    python benchmarks/step.py [--out DIR] [--device cpu|cuda] [--sizes 50M ...] [--rounds N]
    python benchmarks/step.py --suite gpu
    python benchmarks/step.py --suite forms
    python benchmarks/step.py --suite confirm --tuning best.json

Contestants of one group take turns, one step each, in an order that changes every round. Before
each step the caches are overwritten, as forward and backward passes do. README.md in this folder
explains the results: step.json (all times), step.csv and step.md (medians), step.png.
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
from contestants import (
    ADAMS,
    APEX_SHAPE,
    BF16,
    BF16_REMAINDER,
    BOTH,
    COPIED_BYTES,
    EPS,
    FOREACH,
    FORMS,
    FP8_PARAMS,
    FP16_STATE,
    FP32,
    FUSED,
    HYPERPARAMETERS,
    MIXED,
    MODES,
    PEERS,
    REMAINDER,
    TUNED,
    Contestant,
    adams,
    adams_kernel,
    bytes_needed,
    copy,
    make_tensors,
    peers_of,
    stream,
)
from report import REFERENCE, Memory, Results, Row
from workloads import GPT2, LISTS, LLAMA, Workload, one_tensor, shrunk

from megatron_adams import AdamS
from megatron_adams.kernels import Mode, compile
from megatron_adams.kernels.tuning import tuning_of

WARM_UP_ROUNDS = 2
# How many bytes are copied, and are overwritten before a step, if a script is only tried out.
TRIED_BYTES = 2**16
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# torch.cuda._sleep counts clock cycles. No GPU has more in a second.
_CLOCKS_PER_S = 2e9


class Time(NamedTuple):
    """The time of one step, in seconds.

    Attributes:
        device_s: the device's time; on a CPU, the whole time.
        host_s: the time until the call returned.
    """

    device_s: float
    host_s: float


class Clock:
    """Times a step on one device, with cold caches.

    Args:
        num_bytes: how much memory is overwritten before each step; see `evicted_bytes`.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._is_cuda = device.type == "cuda"
        self._evictor = torch.zeros(num_bytes // 4, dtype=torch.int32, device=device)

    def time(self, step: Callable[[], object], *, head_start_s: float = 0.0) -> Time:
        """Time one step.

        Args:
            head_start_s: how long a GPU waits before it begins. If that is longer than Python takes
                to queue the step, the GPU's time is measured and not Python's.
        """
        self.evict()
        if not self._is_cuda:
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            return Time(seconds, seconds)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(head_start_s * _CLOCKS_PER_S))
        begin.record()
        start = time.perf_counter()
        step()
        host_s = time.perf_counter() - start
        end.record()
        end.synchronize()
        return Time(begin.elapsed_time(end) / 1e3, host_s)

    def evict(self) -> None:
        """Fill the caches with other memory."""
        self._evictor.add_(1)
        if self._is_cuda:
            # This read makes the GPU write the cache back now, and not during the step.
            self._evictor.sum()

    def synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def evicted_bytes(device: torch.device) -> int:
    """Return how much is written between two steps: 256 MiB, or twice the CPU's largest cache.

    In a server's cache, a good part of 50 million parameters would last until the next contestant's
    step.
    """
    if device.type != "cpu":
        return 2**28
    sizes = [path.read_text().strip() for path in _CPU_CACHES.glob("index*/size")]  # as 32768K
    return max([2**28, *(2 * 2**10 * int(size.removesuffix("K")) for size in sizes)])


def measure(contestants: list[Contestant], clock: Clock, num_rounds: int) -> dict[str, list[float]]:
    """Return the times of each contestant in seconds, one per round, by name."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    # The first step may compile something. No wait is long enough for that.
    head_starts = dict.fromkeys(times, 0.02)
    generator = random.Random(0)
    for index in range(WARM_UP_ROUNDS + num_rounds):
        # The order is random, because the caches may keep something of the contestant before.
        for contestant in generator.sample(contestants, len(contestants)):
            name = contestant.name
            taken = clock.time(contestant.step, head_start_s=head_starts[name])
            head_starts[name] = min(2 * taken.host_s + 2e-4, 0.1)
            if index >= WARM_UP_ROUNDS:
                times[name].append(taken.device_s)
    return times


def wall_s(contestant: Contestant, clock: Clock, step_s: float) -> float:
    """Return the time of one step among many without a pause: Python and the device overlap."""
    num_steps = max(3, min(50, round(0.05 / step_s)))
    contestant.step()
    clock.synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        contestant.step()
    clock.synchronize()
    return (time.perf_counter() - start) / num_steps


class Group(NamedTuple):
    """The contestants that are measured together.

    Attributes:
        mode: the mode of all contestants except the reference, AdamS on fp32 tensors.
        workloads: the first one that fits the memory is measured.
        without: the names of contestants that do not take part.
        tuned: the constants of a second AdamS. If they are given, only the two and the copy take
            part.
        has_forms: whether AdamS's forms take part, and no other optimizer.
    """

    mode: Mode
    workloads: tuple[Workload, ...]
    without: frozenset[str] = frozenset()
    tuned: dict[str, Any] | None = None
    has_forms: bool = False

    @property
    def name(self) -> str:
        return f"{self.workloads[0].name}, {self.mode.name}"


def groups_of(args: argparse.Namespace) -> Iterator[Group]:
    """Yield the groups that the arguments ask for."""
    if args.suite == "gpu":
        yield from _gpu_suite()
    elif args.suite == "forms":
        yield from _forms_suite()
    elif args.suite == "confirm":
        yield from _confirm_suite(json.loads(args.tuning.read_text()))
    else:
        for numel in args.sizes:
            for mode in args.modes:
                yield Group(mode, (one_tensor(numel),))
        for workload in args.lists:
            for mode in args.modes:
                yield Group(mode, (workload,))


# What the suite leaves out. The reference in every group, and peers that are slow to build, would
# take most of a minute. torch's foreach is slow, and needs the most memory.
_SHORT = frozenset({REFERENCE, *(p.name for p in PEERS if p.name not in (FUSED, APEX_SHAPE))})
_NO_PEERS = frozenset(peer.name for peer in PEERS)
_LARGE = tuple(one_tensor(numel) for numel in (10**9, 5 * 10**8, 25 * 10**7))


def _gpu_suite() -> Iterator[Group]:
    """Yield the groups of the suite, the most telling first. They take a minute on an H100."""
    large_modes = (FP32, MIXED, REMAINDER, BF16_REMAINDER, BF16, FP8_PARAMS)
    for mode in large_modes[:2]:
        yield Group(mode, _LARGE, _SHORT)
    for workload in LISTS:
        for mode in (FP32, MIXED):
            yield Group(mode, (workload,), _SHORT - {FOREACH})
    for mode in large_modes[2:]:
        yield Group(mode, _LARGE, _SHORT)
    for mode in (*large_modes, FP16_STATE):
        yield Group(mode, (one_tensor(10**8),), _SHORT - {FOREACH})
    for mode in (FP32, MIXED):
        yield Group(mode, (one_tensor(10**6),), _SHORT - {FOREACH})


def _forms_suite() -> Iterator[Group]:
    """Yield the groups that compare the forms of AdamS with each other."""
    for mode in (FP32, MIXED):
        for workloads in (_LARGE, (GPT2,)):
            yield Group(mode, workloads, _NO_PEERS, has_forms=True)


def _confirm_suite(best: dict[str, dict[str, Any]]) -> Iterator[Group]:
    """Yield each mode of best.json at three sizes, and the two usual modes with lists, too."""
    for mode in MODES:
        if mode.name not in best:
            continue
        for workloads in (_LARGE, (one_tensor(10**8),), (one_tensor(10**6),)):
            yield Group(mode, workloads, tuned=knobs_for(best, mode, workloads[0]))
        for workload in (GPT2, LLAMA) if mode in (FP32, MIXED) else ():
            yield Group(mode, (workload,), tuned=knobs_for(best, mode, workload))


def knobs_for(best: dict[str, dict[str, Any]], mode: Mode, workload: Workload) -> dict[str, Any]:
    """Return the constants that best.json has for a mode and a problem of this size.

    The key "MODE up to SIZE" has what differs for SIZE elements and fewer.
    """
    knobs = dict(best[mode.name])
    prefix = f"{mode.name} up to "
    sizes = {
        parse_size(key.removeprefix(prefix)): value
        for key, value in best.items()
        if key.startswith(prefix)
    }
    fitting = [size for size in sizes if workload.numel <= size]
    return {**knobs, **(sizes[min(fitting)] if fitting else {})}


class Session:
    """One run. It measures group after group, and writes all results after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._device = torch.device(args.device)
        self._clock = Clock(
            self._device, max(TRIED_BYTES, evicted_bytes(self._device) // args.shrink)
        )
        self._copy = copy(self._device, max(TRIED_BYTES, COPIED_BYTES[args.device] // args.shrink))
        self._start = time.perf_counter()
        self.results = Results(machine_facts(self._device, args), {}, [], [])

    def run(self) -> None:
        for group in groups_of(self._args):
            self._run(group)
        if self._args.suite == "gpu" and self._is_in_time("peak memory"):
            print("peak memory", flush=True)
            self.results.memory.extend(measure_memory(self._shrunk(GPT2), self._device))
            self._write()

    def _run(self, group: Group) -> None:
        missing = self.results.missing
        if not self._is_in_time(group.name):
            return
        for workload in map(self._shrunk, group.workloads):
            name = f"{workload.name}, {group.mode.name}"
            needed = bytes_needed(workload, group.mode, self._device.type, group.without)
            free = free_bytes(self._device)
            if needed > free:
                missing[name] = f"needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free"
                print(f"{name}: not measured, {missing[name]}", flush=True)
                continue
            try:
                self.results.rows.extend(self._measure(group, workload))
            except torch.OutOfMemoryError:
                missing[name] = f"out of memory, of which {free / 1e9:.3g} GB were free"
            finally:
                gc.collect()  # a library's reference cycles can hold as much memory as the tensors
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            if name not in missing:
                break
        self._write()

    def _measure(self, group: Group, workload: Workload) -> list[Row]:
        """Measure the contestants of a group."""
        mode, without = group.mode, group.without
        tensors = make_tensors(mode, workload.numels, self._device)
        contestants = [self._copy]
        if group.tuned is not None:
            knobs = dict(group.tuned)
            chunk = knobs.pop("chunk", None)
            contestants += [
                adams_kernel(ADAMS, tensors),
                adams_kernel(TUNED, tensors, tuning_of(mode)._replace(**knobs), chunk),
            ]
        elif group.has_forms:
            contestants += [adams(tensors, name) for name in (ADAMS, *FORMS)]
        else:
            contestants.append(adams(tensors))
            if not workload.is_list:
                contestants.append(stream(tensors))
            contestants += peers_of(tensors, self.results.missing, without)
            if mode != FP32 and REFERENCE not in without:
                reference = adams(make_tensors(FP32, workload.numels, self._device))
                contestants.append(replace(reference, name=REFERENCE))
        times = measure(contestants, self._clock, self._args.rounds)
        print(f"{workload.name}, {mode.name}:")
        rows = []
        for contestant in contestants:
            seconds = times[contestant.name]
            row = Row(
                workload.name,
                workload.numel,
                mode.name,
                contestant.name,
                contestant.num_bytes,
                seconds,
                wall_s(contestant, self._clock, min(seconds)),
            )
            rows.append(row)
            print(f"  {row.name:30} {row.median_s * 1e3:9.3f} ms {row.gb_per_s:8.1f} GB/s")
        print(f"  {time.perf_counter() - self._start:.1f} s since the start", flush=True)
        return rows

    def _shrunk(self, workload: Workload) -> Workload:
        return shrunk(workload, self._args.shrink)

    def _is_in_time(self, name: str) -> bool:
        seconds = self._args.seconds
        if seconds is None or time.perf_counter() - self._start < seconds:
            return True
        self.results.missing[name] = f"the {seconds:g} seconds were over"
        print(f"{name}: not measured, {self.results.missing[name]}", flush=True)
        return False

    def _write(self) -> None:
        report.write_json(self.results, self._args.out, stem_of(self._args))


def stem_of(args: argparse.Namespace) -> str:
    """Return the name of the result files. One folder can hold those of all suites."""
    return args.suite if args.suite in ("confirm", "forms") else "step"


def free_bytes(device: torch.device) -> int:
    """Return how many bytes are free for tensors."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo does not say MemAvailable: must be a Linux from 3.14 on")


def measure_memory(workload: Workload, device: torch.device) -> list[Memory]:
    """Measure the memory that each optimizer needs in addition to fp32 params and gradients.

    Only a GPU's allocator counts. On a CPU the steps run all the same, to try the script out.
    """
    makers: dict[str, Callable[[Any], Callable[[], object]]] = {
        ADAMS: lambda tensors: _over_new(tensors, partial(AdamS, eps=EPS)),
        **{
            peer.name: peer.build
            for peer in PEERS
            if peer.name in (FUSED, FOREACH, APEX_SHAPE) and device.type in peer.devices
        },
    }
    found = []
    for name, make in makers.items():
        gc.collect()
        memory = _memory_of(name, make, workload, device)
        if memory is not None:
            found.append(memory)
            print(f"  {name:30} {memory.held / 1e6:.1f} MB, at most {memory.peak / 1e6:.1f} MB")
    return found


def _memory_of(
    name: str,
    make: Callable[[Any], Callable[[], object]],
    workload: Workload,
    device: torch.device,
) -> Memory | None:
    tensors = make_tensors(FP32, workload.numels, device)
    tensors.exp_avgs.clear()  # every optimizer makes its own
    if device.type != "cuda":
        make(tensors)()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make(tensors)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    return Memory(workload.name, workload.numel, name, held, peak)


def _over_new(tensors: Any, make: Callable[..., Any]) -> Callable[[], object]:
    parameters = [torch.nn.Parameter(param) for param in tensors.params]
    for parameter, grad in zip(parameters, tensors.grads, strict=True):
        parameter.grad = grad
    optimizer = make(parameters, **HYPERPARAMETERS)
    return optimizer.step


def machine_facts(device: torch.device, args: argparse.Namespace) -> dict[str, str]:
    """Return what the numbers depend on."""
    facts = {
        "rounds": str(args.rounds),
        "torch": torch.__version__,
        "written between steps": f"{evicted_bytes(device) / 2**20:g} MiB",
    }
    if args.shrink != 1:
        facts["shrunk"] = (
            f"all tensors, and what is copied and written between steps, to 1/{args.shrink}: to "
            "try the script out"
        )
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["CUDA"] = str(torch.version.cuda)
        facts["NVRTC"] = compile.nvrtc_version()
    else:
        compiler = compile.host_compiler()
        facts["device"] = f"{cpu_model()}, {torch.get_num_threads()} threads"
        facts["compiler"] = "none" if compiler is None else f"{compiler.version}"
        facts["target"] = compile.host_arch()
        if args.suite == "confirm":
            facts["kernel"] = "the tests' emulator: the times say nothing"
    for package in ("deepspeed", "transformer-engine", "apex"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def cpu_model() -> str:
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


def parse_list(text: str) -> Workload:
    by_name = dict(zip(("gpt2", "many", "llama"), LISTS, strict=True))
    if text not in by_name:
        raise argparse.ArgumentTypeError(f"{text}: must be one of {', '.join(by_name)}")
    return by_name[text]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/step"), help="default: %(default)s")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=BOTH, default=default_device)
    parser.add_argument(
        "--suite",
        choices=("gpu", "forms", "confirm"),
        help="a fixed choice of modes, sizes and lists, in place of the three options below",
    )
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="*",
        help="elements of one tensor, as 50M; default: 1M 10M 50M 100M, on a GPU also 300M 1G",
    )
    parser.add_argument(
        "--lists", type=parse_list, nargs="*", default=[], metavar="LIST", help="gpt2, many, llama"
    )
    parser.add_argument("--modes", type=parse_mode, nargs="+", default=list(MODES), metavar="MODE")
    parser.add_argument("--tuning", type=Path, help="best.json of tune.py, for --suite confirm")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="begin no group after so many; default: none")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide all sizes by this, to try the script out"
    )
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    args = parser.parse_args(argv)
    if args.sizes is None:
        more = [3 * 10**8, 10**9] if args.device == "cuda" else []
        args.sizes = [10**6, 10**7, 5 * 10**7, 10**8, *more]
    if (args.suite == "confirm") != (args.tuning is not None):
        parser.error("--suite confirm and --tuning best.json: must be given together")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    session = Session(args)
    session.run()
    report.write(session.results, args.out, stem_of(args))
    print(report.markdown(session.results))
    stem = stem_of(args)
    print(f"written: {args.out}/{stem}.md, {stem}.csv, {stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
