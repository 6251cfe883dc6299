"""The rules of PLAN-CPU.md and of PLAN-GPU-2.md and -3.md: the next run, and what runs decide.

The order depends only on the finished runs, so a study that was stopped goes on where it was. This
module does not import torch.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from schedule import Losses, Paired, Run, Variant, best_rate, rates_of

_ALL_KINDS = ("matrices", "embedding", "head", "norms")
# How much a variant's loss may exceed AdamW's to count as level, in nats per byte.
MARGIN = 0.01
# Rates are 1e-3 times powers of the square root of 2, so that runs have common ones.
BASE_RATE = 1e-3


def rate(index: int) -> float:
    """Return the peak learning rate with a place on the grid; neighbors differ by sqrt(2)."""
    return float(f"{BASE_RATE * 2 ** (index / 2):.3g}")


def index_of(lr: float) -> int:
    """Return the place of a rate on the grid."""
    return round(2 * math.log2(lr / BASE_RATE))


# The best rates of the first GPU study, or for what it did not find, the rates nearest to them.
_GPU_STARTS = {
    "AdamW": 0,
    "AdamS": -2,
    "AdamS cautious": 0,
    "AdamS Nesterov": -2,
    "AdamW cautious": 0,
    "AdamW Nesterov": 0,
}
# The best rates of the second one at as many tokens a step.
_GPU_3_STARTS = _GPU_STARTS | {"AdamS cautious": -2}


@dataclass(frozen=True)
class Setting:
    """A model, a number of tokens a step and a number of steps; `name` is the runs' axis.

    Attributes:
        origin: the setting whose best rates are tried first; None: `starts` are.
        upward: whether a larger or a smaller rate is tried second.
        starts: variant's name -> the place of its first rate on the grid; without it, the first of
            the variant's own rates is tried first.
        ramp: the batch grows: the steps are cut into as many equal parts, and a step of each has
            this many times `tokens_per_step`.
    """

    name: str
    tokens_per_step: int
    steps: int = 100
    num_layers: int = 3
    width: int = 48
    num_heads: int = 3
    tied: bool = False
    origin: str | None = "2k"
    upward: bool = True
    starts: Mapping[str, int] = field(default_factory=dict, hash=False)
    ramp: tuple[int, ...] = (1,)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("2k", 2048, origin=None),
        Setting("512", 512, upward=False),
        Setting("4k", 4096),
        Setting("8k", 8192),
        Setting("tied", 2048, tied=True, upward=False),
        Setting("wide", 2048, num_layers=2, width=96, upward=False),
        Setting("long", 2048, steps=400, upward=False),
        Setting("ramp", 512, upward=False, ramp=(1, 2, 4)),
        Setting("16k", 16_384),
        Setting("64k", 65_536),
        Setting("98k", 98_304, 225, 6, 512, 8, origin=None, upward=False, starts=_GPU_STARTS),
        Setting("24k", 24_576, 900, 6, 512, 8, origin="98k", upward=False),
        Setting("124M", 98_304, 160, 12, 768, 12, tied=True, origin=None, starts=_GPU_3_STARTS),
    )
}
# The settings that decide. Those of the CPU study differ only in the tokens a step.
BATCH_SIZES = ("512", "2k", "4k", "8k")
GPU_SETTINGS = ("98k", "24k")
GPU_3_SETTINGS = ("124M",)

ADAMW = Variant("AdamW", "adamw", (rate(4), rate(6)))
ADAMW_99 = Variant("AdamW beta2 0.99", "adamw", (rate(4), rate(6)), beta2=0.99)
ADAMS = Variant("AdamS", "adams", (rate(2), rate(4)))
CAUTIOUS = Variant(
    "AdamS cautious", "adams", (rate(3), rate(5)), cautious=True, cautious_kinds=_ALL_KINDS
)
NESTEROV = Variant("AdamS Nesterov", "adams", (rate(2), rate(4)), nesterov=True)
ADAMS_99 = Variant("AdamS beta2 0.99", "adams", (rate(2), rate(4)), beta2=0.99)
ADAMW_CAUTIOUS = Variant(
    "AdamW cautious", "adamw", (rate(5), rate(7)), cautious=True, cautious_kinds=_ALL_KINDS
)
ADAMW_NESTEROV = Variant("AdamW Nesterov", "adamw", (rate(4), rate(6)), nesterov=True)
ADAMS_BETA1 = (
    Variant("AdamS beta1 0.8", "adams", (rate(2), rate(4)), beta1=0.8),
    Variant("AdamS beta1 0.95", "adams", (rate(2), rate(4)), beta1=0.95),
)
ADAMW_BETA1 = (
    Variant("AdamW beta1 0.8", "adamw", (rate(4), rate(6)), beta1=0.8),
    Variant("AdamW beta1 0.95", "adamw", (rate(4), rate(6)), beta1=0.95),
)
ADAMS_RMS = (
    Variant("AdamS capped", "adams", (rate(3), rate(5)), max_update_rms=0.5),
    Variant("AdamS matched", "adams", (rate(6), rate(8)), match_update_rms=0.2),
)
ADAMW_MATCHED = Variant("AdamW matched", "adamw", (rate(4), rate(6)), match_update_rms=0.2)
CANDIDATES = (CAUTIOUS, NESTEROV)
CORE = (ADAMW, ADAMS, *CANDIDATES)
CHANGED_ADAMW = (ADAMW_CAUTIOUS, ADAMW_NESTEROV)
AXES = (*ADAMS_BETA1, *ADAMW_BETA1, *ADAMS_RMS, ADAMW_MATCHED)
VARIANTS = {each.name: each for each in (*CORE, ADAMW_99, *CHANGED_ADAMW, ADAMS_99, *AXES)}


@dataclass(frozen=True)
class Part:
    """A part of the plan: rates are searched with seed 0, then the best ones get more seeds.

    Attributes:
        fine: whether the best rate needs neighbors at a factor of sqrt(2), not only of 2.
    """

    setting: str
    variants: tuple[Variant, ...]
    fine: bool = True
    seeds: tuple[int, ...] = (1, 2, 3)


PARTS = (
    Part("2k", CORE),
    Part("512", CORE),
    Part("512", (ADAMW_99,)),
    Part("tied", (ADAMW, ADAMS), fine=False, seeds=()),
    Part("512", (*CORE, ADAMW_99), seeds=(4, 5, 6, 7, 8)),
    Part("wide", (ADAMW, ADAMS), fine=False, seeds=()),
    Part("4k", (ADAMW, ADAMS), fine=False, seeds=()),
    Part("2k", CORE, seeds=(4, 5, 6, 7)),
    Part("512", CHANGED_ADAMW, seeds=(1, 2, 3, 4, 5, 6, 7, 8)),
    Part("2k", CORE, seeds=(8,)),
    Part("long", (ADAMW, ADAMS), fine=False, seeds=()),
    Part("long", CORE, fine=False),
    Part("4k", CORE, fine=False),
    Part("2k", (ADAMW_99,)),
    Part("2k", CHANGED_ADAMW, seeds=(1, 2, 3, 4, 5, 6, 7, 8)),
    Part("8k", CORE, fine=False),
    Part("tied", CORE),
    Part("2k", (ADAMS_99,)),
    Part("4k", (ADAMW_99, *CHANGED_ADAMW), fine=False),
    Part("ramp", (ADAMW, ADAMS, CAUTIOUS), fine=False),
    Part("2k", (*ADAMS_BETA1, *ADAMW_BETA1)),
    Part("2k", (*ADAMS_RMS, ADAMW_MATCHED)),
    Part("16k", (ADAMW, ADAMS, CAUTIOUS), fine=False),
    Part("64k", (ADAMW, ADAMS, CAUTIOUS), fine=False),
)

# PLAN-GPU-2.md's.
GPU_PARTS = (
    Part("98k", CORE, fine=False, seeds=(1, 2)),
    Part("24k", CORE, fine=False, seeds=(1, 2)),
    Part("98k", CHANGED_ADAMW, fine=False, seeds=(1, 2)),
    Part("24k", CHANGED_ADAMW, fine=False, seeds=(1, 2)),
    Part("24k", CORE, fine=False, seeds=(3, 4)),
    Part("98k", CORE, fine=False, seeds=(3, 4)),
)
# PLAN-GPU-3.md's.
GPU_3_PARTS = (
    Part("124M", (ADAMW, ADAMS, CAUTIOUS), fine=False, seeds=(1,)),
    Part("124M", (NESTEROV,), fine=False, seeds=(1,)),
    Part("124M", (ADAMW, ADAMS, CAUTIOUS), fine=False, seeds=(2, 3)),
    Part("124M", (ADAMW_CAUTIOUS,), fine=False, seeds=(1, 2, 3)),
)


def next_rate(losses: Losses, part: Part, variant: Variant) -> float | None:
    """Return the rate to try next; None if the best rate has a worse one near it on both sides."""
    setting = SETTINGS[part.setting]
    tried = {index_of(lr) for lr in rates_of(losses, variant, setting.name)}
    if not tried:
        first = best_rate(losses, variant, setting.origin) if setting.origin else None
        if first is not None:
            return first
        place = setting.starts.get(variant.name)
        return variant.rates[0] if place is None else rate(place)
    lr = best_rate(losses, variant, setting.name)
    assert lr is not None
    best = index_of(lr)
    side = 1 if setting.upward else -1
    for step in (side, -side):
        if not tried & {best + step, best + 2 * step}:
            return rate(best + 2 * step)
    for step in (side, -side) if part.fine else ():
        if best + step not in tried:
            return rate(best + step)
    return None


def reference(losses: Losses, setting: str) -> Variant:
    """Return the AdamW that others are compared with: the better one of two beta2, by seed 0."""

    def best_loss(variant: Variant) -> float:
        return min(rates_of(losses, variant, setting).values(), default=math.inf)

    return ADAMW_99 if best_loss(ADAMW_99) < best_loss(ADAMW) else ADAMW


def _wishes(losses: Losses, parts: Sequence[Part]) -> Iterator[Run]:
    """Yield the study's runs in order, as far as the finished runs decide it, these included."""
    for part in parts:
        for variant in part.variants:
            lr = next_rate(losses, part, variant)
            if lr is not None:
                yield Run(part.setting, variant.name, lr, 0)
        for seed in part.seeds:
            for variant in part.variants:
                # This one stands in for AdamW only where it is better.
                if variant is ADAMW_99 and reference(losses, part.setting) is ADAMW:
                    continue
                lr = best_rate(losses, variant, part.setting)
                assert lr is not None
                yield Run(part.setting, variant.name, lr, seed)


def next_run(
    losses: Losses, num_parts: int | None = None, parts: Sequence[Part] | None = None
) -> Run | None:
    """Return the next run of the first `num_parts` parts (all); None if they are complete.

    Args:
        parts: the plan's; None: PARTS.
    """
    parts = (PARTS if parts is None else parts)[:num_parts]
    return next((run for run in _wishes(losses, parts) if run not in losses), None)


def compare(losses: Losses, setting: str, variant: Variant, other: Variant) -> Paired | None:
    """Return the differences of a variant to another, by the seeds from 1 on; None without them."""
    rates = [best_rate(losses, each, setting) for each in (variant, other)]
    if rates[0] is None or rates[1] is None:
        return None
    differences = {}
    for seed in sorted({run.seed for run in losses} - {0}):
        ours = losses.get(Run(setting, variant.name, rates[0], seed))
        theirs = losses.get(Run(setting, other.name, rates[1], seed))
        if ours is not None and theirs is not None:
            differences[seed] = ours - theirs
    return Paired(setting, differences) if differences else None


@dataclass(frozen=True)
class Verdict:
    """What the rule says about a candidate.

    Attributes:
        settings: the batch sizes with two seeds or more, which it was decided by.
        improves: whether it is better than the paper's form at each of them.
        level: whether it is level with AdamW, or better, at each: True, False or None, undecided.
        mean: the mean over the settings of its difference to AdamW.
    """

    settings: tuple[str, ...]
    improves: bool
    level: bool | None
    mean: float


def judge(
    losses: Losses, candidate: Variant, settings: Sequence[str] = BATCH_SIZES
) -> Verdict | None:
    """Apply the rule of the plan to a candidate; None if fewer than two settings are done.

    Args:
        settings: those that decide.
    """
    to_adams, to_adamw = {}, {}
    for setting in settings:
        pairs = (
            compare(losses, setting, candidate, ADAMS),
            compare(losses, setting, candidate, reference(losses, setting)),
        )
        if all(each is not None and len(each.differences) > 1 for each in pairs):
            to_adams[setting], to_adamw[setting] = pairs
    if len(to_adams) < 2:
        return None
    improves = all(each.mean + each.half_width < 0 for each in to_adams.values())
    level: bool | None = None
    if all(each.mean + each.half_width <= MARGIN for each in to_adamw.values()):
        level = True
    elif any(each.mean - each.half_width > MARGIN for each in to_adamw.values()):
        level = False
    mean = statistics.fmean(each.mean for each in to_adamw.values())
    return Verdict(tuple(to_adams), improves, level, mean)


def recommended(losses: Losses, settings: Sequence[str] = BATCH_SIZES) -> Variant | None:
    """Return the candidate that improves on the paper's form everywhere, the better one of two."""
    verdicts = {candidate: judge(losses, candidate, settings) for candidate in CANDIDATES}
    better = {each: found for each, found in verdicts.items() if found and found.improves}
    return min(better, key=lambda each: better[each].mean) if better else None


def compared_at(losses: Losses, setting: str) -> str:
    """Return a sentence for each variant that was run in a setting: how far it is from AdamW."""
    adamw = best_rate(losses, ADAMW, setting)
    if adamw is None:
        return "Nothing is compared yet: AdamW has not been run."
    sentences = []
    for variant in VARIANTS.values():
        lr = best_rate(losses, variant, setting)
        if lr is None or variant is ADAMW:
            continue
        chosen = losses[Run(setting, variant.name, lr, 0)]
        difference = chosen - losses[Run(setting, ADAMW.name, adamw, 0)]
        found = compare(losses, setting, variant, ADAMW)
        if found is None:
            others = "no other seed was run"
        elif len(found.differences) == 1:
            others = f"{found.mean:+.4f} with one other seed, whose noise is not known"
        else:
            others = f"{found.mean:+.4f} ± {found.half_width:.4f} with other seeds"
        sentences.append(
            f"{variant.name} to AdamW, nats a byte: {difference:+.4f} with seed 0, which chose the "
            f"rates; {others}."
        )
    return "\n".join(sentences) or "Nothing is compared yet: AdamW alone has been run."


def decide(losses: Losses, settings: Sequence[str] = BATCH_SIZES) -> str:
    """Return in sentences what the rule of the plan decides from the finished runs."""
    if len(settings) == 1:  # too few for the rule
        return compared_at(losses, *settings)
    verdicts = {candidate: judge(losses, candidate, settings) for candidate in CANDIDATES}
    if not any(verdicts.values()):
        return "Nothing is decided yet: it takes two batch sizes with two seeds from 1 on."
    sentences = []
    for candidate, found in verdicts.items():
        if found is None:
            sentences.append(f"{candidate.name}: not decided yet.")
            continue
        better = "is better than" if found.improves else "is not shown to be better than"
        to_adamw = {True: "level with", False: "behind", None: "undecided against"}[found.level]
        sentences.append(
            f"{candidate.name} {better} AdamS, and {to_adamw} AdamW, at "
            f"{', '.join(found.settings)} tokens a step; its mean difference to "
            f"AdamW is {found.mean:+.4f} nats a byte."
        )
    chosen = recommended(losses, settings)
    sentences.append(f"Recommended: {chosen.name if chosen else 'AdamS in the form of the paper'}.")
    return "\n".join(sentences)
