"""Time the CUDA kernel with other constants than the product's, and choose the best ones.

    python benchmarks/tune.py [--out DIR] [--seconds N] [--modes MODE ...] [--knobs KNOB ...]

Every variant is compiled from the product's own source (megatron_adams/kernels/tuning.py). It must
first give the default's bits on the same inputs, and is then timed in turn with the default. The
sweep first changes one constant at a time, then combines the best values of each, and then chooses
the chunk for small problems. It writes sweep.csv (all variants) and best.json (the winners).
`step.py --suite confirm --tuning best.json` measures the winners once more.

Without a GPU, `--device cpu` runs everything on the tests' emulator. This shows that the script
works; the times mean nothing.
"""

import argparse
import csv
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
import step
from contestants import (
    BF16,
    BF16_REMAINDER,
    BOTH,
    COPIED_BYTES,
    FP8_PARAMS,
    FP16_STATE,
    FP32,
    MIXED,
    REMAINDER,
    SCALARS,
    Contestant,
    Tensors,
    adams_kernel,
    bytes_per_param,
    copy,
    make_driver,
    make_tensors,
)
from workloads import size_name

from megatron_adams.kernels import CompileError, Mode, PointerTable, compile, cuda
from megatron_adams.kernels.batch import update_table
from megatron_adams.kernels.tuning import Tuning, tuning_of

MODES = (FP32, MIXED, REMAINDER, BF16_REMAINDER, BF16, FP8_PARAMS, FP16_STATE)
# BASE is expected to be best for every mode that it changes. From there, KNOBS are changed one at a
# time.
BASE = {"group": 4, "hardware_conversions": True}
KNOBS: dict[str, tuple[Any, ...]] = {
    "group": (4, 0, 8),
    "hardware_conversions": (True, False),
    "unroll": (1, 2, 4),
    "block": (256, 128, 512),
    "min_blocks": (None, 4, 6, 8),
    "load": ("plain", "streaming", "no_allocate", "prefetch_256B"),
    "store": ("plain", "streaming"),
    "chunk": (None, 4096, 8192, 16384, 32768, 65536),
}
SMALL_CHUNKS = (None, 1024, 2048, 4096, 8192, 16384, 32768)
MAX_COMBINATIONS = 18
ROUNDS = 10
# The median of fewer rounds is not used.
MIN_ROUNDS = 3


class Variant(NamedTuple):
    """A kernel's constants, and how many elements a block takes; None: the product's number."""

    tuning: Tuning
    chunk: int | None = None

    @property
    def knobs(self) -> dict[str, Any]:
        return {**self.tuning._asdict(), "chunk": self.chunk}

    def changed(self, default: "Variant") -> dict[str, Any]:
        """Return the constants that differ."""
        return {k: v for k, v in self.knobs.items() if v != default.knobs[k]}

    def words(self, default: "Variant") -> str:
        return " ".join(f"{k}={v}" for k, v in self.changed(default).items()) or "default"


def default_of(mode: Mode) -> Variant:
    return Variant(tuning_of(mode))


def variant_of(mode: Mode, knobs: dict[str, Any]) -> Variant:
    """Return the default of a mode with other values of some constants."""
    constants = dict(knobs)
    chunk = constants.pop("chunk", None)
    return Variant(tuning_of(mode)._replace(**constants), chunk)


@dataclass
class Trial:
    """A variant, tried on tensors of a mode.

    Attributes:
        bits: "equal" if its results are the default's, or else what happened; then it has no times.
        times_s: the times of one launch, one per round.
        ratios: each of those divided by the default's time just before it.
    """

    mode: Mode
    numel: int
    variant: Variant
    bits: str = ""
    registers: int | None = None
    spilled_bytes: int | None = None
    times_s: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    part_of_copy: float = 0.0

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def is_timed(self) -> bool:
        return len(self.times_s) >= MIN_ROUNDS

    def row(self) -> dict[str, str]:
        timed = self.is_timed
        return dict(
            zip(
                report.SWEEP_COLUMNS,
                (
                    self.mode.name,
                    size_name(self.numel),
                    self.variant.words(default_of(self.mode)),
                    "" if self.registers is None else str(self.registers),
                    "" if self.spilled_bytes is None else str(self.spilled_bytes),
                    f"{median(self.times_s) * 1e3:.4f}" if timed else "",
                    f"{report.spread(self.times_s):.2%}" if timed else "",
                    f"{self.part_of_copy:.1%}" if timed else "",
                    f"{self.ratio:.4f}" if timed else "",
                    self.bits,
                ),
                strict=True,
            )
        )


class Sweep:
    """One run of the sweep. At any time, the files have all results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._device = torch.device(args.device)
        is_tried = self._device.type == "cpu"
        evicted = step.TRIED_BYTES if is_tried else step.evicted_bytes(self._device)
        self._clock = step.Clock(self._device, evicted)
        self._copy = copy(self._device, step.TRIED_BYTES if is_tried else COPIED_BYTES["cuda"])
        self._start = time.perf_counter()
        self._identities: dict[tuple[Mode, Tuning], str] = {}
        self._failures: dict[tuple[Mode, Tuning], str] = {}
        self._expected: dict[Mode, list[Tensor]] = {}
        # Variants with the same machine code and chunks as another one, which was timed for both.
        self._same: dict[tuple[Mode, int, Variant], Variant] = {}
        self.trials: list[Trial] = []

    def run(self) -> None:
        modes, numel = self._args.modes, self._args.numel
        self._compile((mode, v.tuning) for mode in modes for v in self._parts_of_base(mode))
        singles = {mode: self._singles(mode) for mode in modes}
        self._compile((mode, v.tuning) for mode in modes for v in singles[mode])
        for mode in modes:
            self._time(mode, numel, singles[mode])
        combined = {mode: self._combinations(mode) for mode in modes}
        self._compile((mode, v.tuning) for mode in modes for v in combined[mode])
        for mode in modes:
            self._time(mode, numel, combined[mode])
        if "chunk" in self._args.knobs:
            for small in self._args.small:
                for mode in modes:
                    tuning = self._best(mode, numel).tuning
                    self._time(mode, small, [Variant(tuning, chunk) for chunk in SMALL_CHUNKS])

    def is_over(self) -> bool:
        return time.perf_counter() - self._start > self._args.seconds

    def _say(self, words: str) -> None:
        print(f"{time.perf_counter() - self._start:6.1f} s  {words}", flush=True)

    def _compile(self, wanted: Iterable[tuple[Mode, Tuning]]) -> None:
        """Compile missing kernels, on all CPUs."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._identities]
        if self.is_over() or not missing:
            return
        with ThreadPoolExecutor() as pool:
            results = pool.map(lambda key: self._compile_one(*key), missing)
            self._identities.update(zip(missing, results, strict=True))
        self._say(f"{len(missing)} kernels compiled")

    def _compile_one(self, mode: Mode, tuning: Tuning) -> str:
        """Compile one kernel; return an identity that is the same for equal machine code."""
        try:
            if self._device.type == "cuda":
                from megatron_adams.kernels.cuda import arch_of

                image = compile.cubin(mode, arch_of(self._device), tuning=tuning)
                return hashlib.sha256(image).hexdigest()
            make_driver(self._device, mode, tuning)
        except CompileError as exc:
            self._failures[mode, tuning] = f"does not compile: {str(exc).splitlines()[-1]}"
        return str(tuning)

    @torch.no_grad()
    def _time(self, mode: Mode, numel: int, variants: Sequence[Variant]) -> None:
        """Time variants in turn with the default, on one tensor."""
        if self.is_over() or not variants:
            return
        default = default_of(mode)
        tensors = make_tensors(mode, (numel,), self._device)
        trials = self._admitted(tensors, variants)
        reference = Trial(mode, numel, default, "equal", *self._resources(mode, default.tuning))
        steps = {
            trial.variant: _contestant(tensors, trial.variant) for trial in [*trials, reference]
        }
        copies: list[float] = []
        generator = random.Random(0)
        for index in range(1 + ROUNDS):
            if self.is_over():
                break
            copied = self._time_one(self._copy)
            for trial in generator.sample(trials, len(trials)):
                beside = self._time_one(steps[default])
                taken = self._time_one(steps[trial.variant])
                if index == 0:  # a kernel's first launch loads it
                    continue
                reference.times_s.append(beside)
                trial.times_s.append(taken)
                trial.ratios.append(taken / beside)
            if index > 0:
                copies.append(copied)
        reference.ratios = [1.0] * len(reference.times_s)
        known = {trial.variant for trial in self._timed(mode, numel)}
        for trial in (reference, *trials):
            if trial.is_timed and trial.variant not in known:
                rate = self._copy.num_bytes / median(copies)
                num_bytes = bytes_per_param(mode) * numel
                trial.part_of_copy = num_bytes / median(trial.times_s) / rate
                self.trials.append(trial)
        self._say(
            f"{mode.name}, {size_name(numel)}: {len(trials)} variants, "
            f"best so far: {self._best(mode, numel).words(default)}"
        )
        self.write()

    def _time_one(self, contestant: Contestant) -> float:
        return self._clock.time(contestant.step, head_start_s=4e-4).device_s

    def _admitted(self, tensors: Tensors, variants: Sequence[Variant]) -> list[Trial]:
        """Return trials of the variants that compile, are new, and give the default's bits."""
        mode, numel = tensors.mode, tensors.numel
        default = default_of(mode)
        names: dict[tuple[str, int, int], Variant] = {}

        def kernel_of(variant: Variant) -> tuple[str, int, int]:
            identity = self._identities[mode, variant.tuning]
            return identity, variant.tuning.block, _num_chunks(tensors, variant.chunk)

        for known in (default, *(trial.variant for trial in self._timed(mode, numel))):
            names.setdefault(kernel_of(known), known)
        admitted = []
        # Variants with the fewest changes come first: if several are equal, the first is named.
        for variant in sorted(variants, key=lambda v: len(v.changed(default))):
            if (mode, variant.tuning) not in self._identities or self.is_over():
                continue
            name = names.setdefault(kernel_of(variant), variant)
            self._same[mode, numel, variant] = name
            if name != variant or variant == default:
                continue
            trial = Trial(mode, numel, variant)
            failure = self._failures.get((mode, variant.tuning))
            if failure is not None:
                trial.bits = failure
            else:
                trial.registers, trial.spilled_bytes = self._resources(mode, variant.tuning)
                trial.bits = self._compare(mode, variant)
            if trial.bits == "equal":
                admitted.append(trial)
            else:
                self.trials.append(trial)
                self._say(f"{mode.name}, {variant.words(default)}: {trial.bits}")
        return admitted

    def _resources(self, mode: Mode, tuning: Tuning) -> tuple[int | None, int | None]:
        """Return the registers and bytes of local memory of a thread of adams_update, on a GPU."""
        if self._device.type != "cuda":
            return None, None
        from cuda.bindings import driver
        from launcher import Kernel

        from megatron_adams.kernels.cuda import arch_of, call_driver

        kernel = Kernel(
            compile.cubin(mode, arch_of(self._device), tuning=tuning), "adams_update"
        ).function
        attributes = driver.CUfunction_attribute
        registers, local = (
            call_driver("cuFuncGetAttribute", attribute, kernel)
            for attribute in (
                attributes.CU_FUNC_ATTRIBUTE_NUM_REGS,
                attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
            )
        )
        return registers, local

    def _compare(self, mode: Mode, variant: Variant) -> str:
        """Return "equal", or which tensors differ from the default's results."""
        if mode not in self._expected:
            self._expected[mode] = self._results(mode, default_of(mode))
        try:
            found = self._results(mode, variant)
        except RuntimeError as exc:
            return f"failed: {str(exc).splitlines()[0]}"
        wrong = [
            str(index)
            for index, pair in enumerate(zip(found, self._expected[mode], strict=True))
            if not same_bits(*pair)
        ]
        return f"differ in tensors {' '.join(wrong)}" if wrong else "equal"

    def _results(self, mode: Mode, variant: Variant) -> list[Tensor]:
        """Return everything that two steps write, for tensors with every kind of number."""
        tensors = awkward_tensors(mode, self._device, self._args.checked)
        driver = make_driver(self._device, mode, variant.tuning)
        table = _table(variant.chunk)
        for _ in range(2):
            cuda.run(tensors.batch(), SCALARS, table, driver)
        self._clock.synchronize()
        scalings = [number for scaling in tensors.fp8 or () for number in scaling]
        columns = (
            *(tensors.params, tensors.exp_avgs, tensors.mains),
            *(tensors.exp_avg_scales, tensors.main_scales, scalings),
        )
        return [tensor for column in columns for tensor in column or ()]

    def _timed(self, mode: Mode, numel: int) -> list[Trial]:
        return [t for t in self.trials if (t.mode, t.numel) == (mode, numel) and t.is_timed]

    def _best(self, mode: Mode, numel: int) -> Variant:
        """Return the variant to choose: see `winner`."""
        return winner(self._timed(mode, numel), default_of(mode))

    def _combinations(self, mode: Mode) -> list[Variant]:
        """Return combinations of the best two values of each knob, the most promising first."""
        numel = self._args.numel
        timed = {t.variant: t.ratio for t in self._timed(mode, numel)}
        ratios = {
            variant: timed[name]
            for (*key, variant), name in self._same.items()
            if key == [mode, numel] and name in timed
        }
        base = self._base(mode)
        if variant_of(mode, base) not in ratios:
            return []
        known = ratios[variant_of(mode, base)]
        choices = []
        for knob in self._args.knobs:
            # How changing this knob alone changed the time.
            factors = {
                value: ratios[variant] / known
                for value in KNOBS[knob]
                if (variant := variant_of(mode, {**base, knob: value})) in ratios
            }
            choices.append([(knob, v, factors[v]) for v in sorted(factors, key=factors.get)[:2]])
        promised: dict[Variant, float] = {}
        for choice in product(*choices):
            factor = 1.0
            for _, _, one in choice:
                factor *= one
            variant = variant_of(mode, {**base, **{knob: v for knob, v, _ in choice}})
            if variant not in ratios:
                promised[variant] = factor
        return sorted(promised, key=promised.__getitem__)[:MAX_COMBINATIONS]

    def _parts_of_base(self, mode: Mode) -> list[Variant]:
        """Return the default, and variants with one constant of BASE each."""
        parts = [variant_of(mode, {knob: BASE[knob]}) for knob in BASE if knob in self._args.knobs]
        return [default_of(mode), *parts]

    def _base(self, mode: Mode) -> dict[str, Any]:
        """Return the constants to start from: those of BASE that make another kernel."""
        default, *parts = (
            self._identities.get((mode, variant.tuning)) for variant in self._parts_of_base(mode)
        )
        knobs = [knob for knob in BASE if knob in self._args.knobs]
        return {
            knob: BASE[knob] for knob, part in zip(knobs, parts, strict=True) if part != default
        }

    def _singles(self, mode: Mode) -> list[Variant]:
        """Return the default, the base, and variants of the base with one constant changed."""
        base = self._base(mode)
        changed = [{**base, knob: v} for knob in self._args.knobs for v in KNOBS[knob]]
        variants = [variant_of(mode, knobs) for knobs in (base, *changed)]
        return [*dict.fromkeys([default_of(mode), *variants])]

    def best(self) -> dict[str, dict[str, Any]]:
        """Return the contents of best.json: the constants to change, by mode and by size."""
        found = {}
        for mode in self._args.modes:
            default = default_of(mode)
            if not self._timed(mode, self._args.numel):
                continue
            large = self._best(mode, self._args.numel)
            found[mode.name] = large.changed(default)
            for numel in self._args.small:
                timed = self._timed(mode, numel)
                if timed:
                    # A mode has one tuning for all sizes, so only chunks are compared.
                    same = [t for t in timed if t.variant.tuning == large.tuning]
                    chosen = winner(same, Variant(large.tuning))
                    found[f"{mode.name} up to {size_name(numel)}"] = {"chunk": chosen.chunk}
        return found

    def write(self) -> None:
        self._args.out.mkdir(parents=True, exist_ok=True)
        with (self._args.out / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, report.SWEEP_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(trial.row() for trial in self.trials)
        (self._args.out / "best.json").write_text(json.dumps(self.best(), indent=1) + "\n")


def winner(trials: Sequence[Trial], default: Variant) -> Variant:
    """Return the variant to choose among those that were timed on the same tensors.

    The noise is the spread of the default's times, each divided by the one before. A variant must
    beat the default by more than the noise. Among those that are within the noise of the fastest,
    the one with the fewest changes wins.
    """
    reference = next((t for t in trials if t.variant == default), None)
    if reference is None:
        return default
    start = reference.ratio
    noise = report.spread([after / before for before, after in pairwise(reference.times_s)])
    better = [t for t in trials if t is not reference and t.ratio < start * (1 - noise)]
    if not better:
        return default
    fastest = min(t.ratio for t in better)
    ties = [t for t in better if t.ratio <= fastest * (1 + noise)]
    return min(ties, key=lambda t: (len(t.variant.changed(default)), t.ratio)).variant


def _contestant(tensors: Tensors, variant: Variant) -> Contestant:
    return adams_kernel(str(variant), tensors, variant.tuning, variant.chunk)


def _table(chunk: int | None) -> PointerTable:
    return PointerTable() if chunk is None else PointerTable(chunk)


def _num_chunks(tensors: Tensors, chunk: int | None) -> int:
    table = _table(chunk)
    update_table(tensors.batch(), table)
    return table.num_chunks


def awkward_tensors(mode: Mode, device: torch.device, numel: int) -> Tensors:
    """Make tensors with normal numbers, all magnitudes, and any bits; some are misaligned."""
    third = numel // 3 + 1
    sizes = (numel, third, third, third, 17, 1)
    made = make_tensors(mode, [size + 1 for size in sizes], device)
    generator = torch.Generator(device).manual_seed(1)

    def of_all_magnitudes(like: Tensor) -> Tensor:
        exponents = torch.empty(like.shape, dtype=torch.float32, device=device)
        exponents.uniform_(-60, 30, generator=generator)
        return (like.float().sign() * exponents.exp2()).to(like.dtype)

    def any_bits(like: Tensor) -> Tensor:
        num_bytes = like.numel() * like.element_size()
        drawn = torch.empty(num_bytes, dtype=torch.int16, device=device)
        return drawn.random_(0, 256, generator=generator).to(torch.uint8).view(like.dtype)

    def changed(column: list[Tensor] | None) -> list[Tensor] | None:
        if column is None:
            return None
        first, second, third, *rest = column
        is_float = second.dtype.is_floating_point
        magnitudes = of_all_magnitudes(second) if is_float else any_bits(second)
        # A tensor that begins at another's second element is not aligned.
        return [
            t[1:] if index == 3 else t[:-1]
            for index, t in enumerate([first, magnitudes, any_bits(third), *rest])
        ]

    grads, params, exp_avgs = map(changed, (made.grads, made.params, made.exp_avgs))
    return made._replace(grads=grads, params=params, exp_avgs=exp_avgs, mains=changed(made.mains))


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal bit by bit. All NaNs count as equal."""
    if found.dtype.is_floating_point:
        found, expected = (t.float() if t.element_size() < 4 else t for t in (found, expected))
        nan = found.isnan()
        if not torch.equal(nan, expected.isnan()):
            return False
        found, expected = (t.masked_fill(nan, 0.0).view(torch.int32) for t in (found, expected))
    return torch.equal(found, expected)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="default: %(default)s")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=BOTH, default=default_device)
    parser.add_argument("--modes", type=step.parse_mode, nargs="+", default=list(MODES))
    parser.add_argument("--knobs", choices=KNOBS, nargs="+", default=list(KNOBS), metavar="KNOB")
    parser.add_argument("--seconds", type=float, default=120, help="default: %(default)s")
    on_cpu = default_device == "cpu"
    size = {"type": step.parse_size, "help": "elements; default: %(default)s"}
    parser.add_argument("--numel", default=64_000 if on_cpu else 25 * 10**7, **size)
    parser.add_argument(
        *("--small",),
        default=[16_000] if on_cpu else [10**6, 4 * 10**6, 2 * 10**7],
        nargs="*",
        **size,
    )
    parser.add_argument("--checked", default=8_000 if on_cpu else 2 * 10**6, **size)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sweep = Sweep(args)
    try:
        sweep.run()
    finally:
        sweep.write()
    rows = [trial.row() for trial in sweep.trials]
    print(report.sweep_table(rows))
    print("best.json:")
    for name, knobs in sweep.best().items():
        print(f"  {name}: {' '.join(f'{k}={v}' for k, v in knobs.items()) or 'default'}")
    if sweep.is_over():
        print(f"stopped after {args.seconds:g} s: not all was tried")
    print(f"written: {args.out}/sweep.csv, {args.out}/best.json")


if __name__ == "__main__":
    main()
