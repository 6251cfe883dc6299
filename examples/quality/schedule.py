"""The rules of PLAN.md: which run the GPU study does next, and what the runs decide.

The order depends only on the finished runs, so a study that was stopped goes on where it was.
cpu_schedule.py has the rules of the CPU study, and uses what is general here. This module does not
import torch.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BETA1, EPS, WEIGHT_DECAY = 0.9, 1e-8, 0.1
# Neighboring rates differ by this factor. At most MAX_RATES are tried for a variant.
RATE_FACTOR = 2.0
MAX_RATES = 5
# How much a recommended variant's loss may exceed AdamW's, in nats per token.
MARGIN = 0.01
# The 97.5% quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Variant:
    """An optimizer of the study.

    Attributes:
        family: "adamw" or "adams".
        rates: the two peak learning rates that are tried first, in this order.
        cautious: whether elements stay if they would move against their gradient.
        cautious_kinds: the kinds of tensors (gpt.KINDS) that the mask acts on.
        nesterov: whether the numerator looks a step ahead.
        max_update_rms: what the RMS of a tensor's update is cut to, before the learning rate.
        match_update_rms: what it is scaled to.
    """

    name: str
    family: str
    rates: tuple[float, float]
    beta2: float = 0.95
    cautious: bool = False
    nesterov: bool = False
    cautious_kinds: tuple[str, ...] = ("matrices",)
    beta1: float = BETA1
    max_update_rms: float | None = None
    match_update_rms: float | None = None


ADAMW = Variant("AdamW", "adamw", (4e-3, 2e-3))
ADAMS = Variant("AdamS", "adams", (1e-3, 2e-3))
CANDIDATES = (
    Variant("AdamS cautious", "adams", (2e-3, 4e-3), cautious=True),
    Variant("AdamS Nesterov", "adams", (1e-3, 2e-3), nesterov=True),
    Variant("AdamS beta2 0.99", "adams", (1e-3, 2e-3), beta2=0.99),
)
# AdamW with each candidate's change, in the same order.
CHANGED_ADAMW = (
    Variant("AdamW cautious", "adamw", (4e-3, 2e-3), cautious=True),
    Variant("AdamW Nesterov", "adamw", (4e-3, 2e-3), nesterov=True),
    Variant("AdamW beta2 0.99", "adamw", (4e-3, 2e-3), beta2=0.99),
)
VARIANTS = {variant.name: variant for variant in (ADAMW, ADAMS, *CANDIDATES, *CHANGED_ADAMW)}


@dataclass(frozen=True)
class Run:
    """One run of the study. Runs with one seed have the same start values and batches.

    Attributes:
        axis: "A", or "B" with four times the tokens per step, at A's best rates. In the CPU study,
            the name of a setting.
        lr: the peak learning rate.
    """

    axis: str
    variant: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.axis} {self.variant} lr {self.lr:g} seed {self.seed}"


type Losses = dict[Run, float]
"""The held-out loss of each finished run in nats per token; infinite if it diverged."""


def rates_of(losses: Losses, variant: Variant, axis: str = "A") -> dict[float, float]:
    """Return peak learning rate -> held-out loss for the runs that choose a rate: seed 0."""
    return {
        run.lr: loss
        for run, loss in losses.items()
        if (run.axis, run.variant, run.seed) == (axis, variant.name, 0)
    }


def best_rate(losses: Losses, variant: Variant, axis: str = "A") -> float | None:
    """Return the best rate that was tried, or None before the first run."""
    rates = rates_of(losses, variant, axis)
    return min(rates, key=lambda lr: (rates[lr], lr)) if rates else None


def is_at_edge(losses: Losses, variant: Variant, axis: str = "A") -> bool:
    """Whether a better rate may lie outside the range that was tried."""
    rates, best = rates_of(losses, variant, axis), best_rate(losses, variant, axis)
    return best is None or best in (min(rates), max(rates))


def next_rate(losses: Losses, variant: Variant) -> float | None:
    """Return the rate to try next: the first two, then outward until the best has neighbors.

    Return None if the best rate has neighbors on both sides, or MAX_RATES were tried.
    """
    rates = rates_of(losses, variant)
    for lr in variant.rates:
        if lr not in rates:
            return lr
    if len(rates) >= MAX_RATES or not is_at_edge(losses, variant):
        return None
    best = best_rate(losses, variant)
    assert best is not None
    return best * RATE_FACTOR if best == max(rates) else best / RATE_FACTOR


def leader(losses: Losses) -> Variant | None:
    """Return the candidate with the lowest loss at its best rate, once each has two rates."""
    rates = {variant: rates_of(losses, variant) for variant in CANDIDATES}
    if any(len(tried) < 2 for tried in rates.values()):
        return None
    return min(CANDIDATES, key=lambda variant: min(rates[variant].values()))


def _wishes(losses: Losses) -> Iterator[Run | None]:
    """Yield the study's runs in order, as far as the finished runs decide it, these included."""

    def search(variant: Variant) -> Iterator[Run]:
        lr = next_rate(losses, variant)
        if lr is not None:
            yield Run("A", variant.name, lr, 0)

    def repeat(axis: str, variants: Sequence[Variant], seed: int) -> Iterator[Run]:
        for variant in variants:
            lr = best_rate(losses, variant)
            assert lr is not None
            yield Run(axis, variant.name, lr, seed)

    for variant in (ADAMW, ADAMS, *CANDIDATES):
        yield Run("A", variant.name, variant.rates[0], 0)
    yield from search(ADAMW)
    yield from search(ADAMS)
    for variant in CANDIDATES:
        yield Run("A", variant.name, variant.rates[1], 0)
    ahead = leader(losses)
    if ahead is None:  # a run above is not done yet
        return
    yield from search(ahead)
    compared = (ADAMW, ahead, ADAMS)
    yield from repeat("A", compared, seed=1)
    yield from repeat("B", compared, seed=0)
    yield from repeat("A", compared, seed=2)
    yield from repeat("B", compared, seed=1)
    same_change = CHANGED_ADAMW[CANDIDATES.index(ahead)]
    for variant in (same_change, *CANDIDATES, *CHANGED_ADAMW):
        yield from search(variant)
    for seed in (1, 2):
        yield from repeat("A", (same_change,), seed)
    for seed in (3, 4):
        yield from repeat("A", compared, seed)
        yield from repeat("B", compared, seed - 1)


def next_run(losses: Losses) -> Run | None:
    """Return the next run of the plan, or None if the study is complete."""
    return next((run for run in _wishes(losses) if run not in losses), None)


@dataclass(frozen=True)
class Paired:
    """A variant's differences to another by seed, each at its best rate for seed 0.

    Only runs count that did not choose a rate or variant: seeds from 1 on, and all of the GPU
    study's B.
    """

    axis: str
    differences: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences.values())

    @property
    def spread(self) -> float:
        """The standard deviation over seeds; NaN for one seed."""
        values = self.differences.values()
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def half_width(self) -> float:
        """Half of the 95% confidence interval of the mean (Student's t); infinite for one seed."""
        num_seeds = len(self.differences)
        if num_seeds < 2:
            return math.inf
        return T_QUANTILES[num_seeds - 2] * self.spread / math.sqrt(num_seeds)


def paired(losses: Losses, variant: Variant, axis: str) -> Paired | None:
    """Compare a variant with AdamW by seeds that chose nothing; None if there are none."""
    rate, adamw_rate = best_rate(losses, variant), best_rate(losses, ADAMW)
    if rate is None or adamw_rate is None:
        return None
    differences = {}
    for seed in sorted({run.seed for run in losses}):
        if axis == "A" and seed == 0:
            continue
        ours = losses.get(Run(axis, variant.name, rate, seed))
        theirs = losses.get(Run(axis, ADAMW.name, adamw_rate, seed))
        if ours is not None and theirs is not None:
            differences[seed] = ours - theirs
    return Paired(axis, differences) if differences else None


def decide(losses: Losses) -> str:
    """Return, in a sentence, what the rule of PLAN.md decides from the finished runs."""
    ahead = leader(losses)
    if ahead is None:
        return "Not decided: the candidates have not been run at two rates each."
    found = [paired(losses, ahead, axis) for axis in ("A", "B")]
    known = [comparison for comparison in found if comparison is not None]
    means = ", ".join(f"{each.axis} {each.mean:+.4f}" for each in known) or "not compared yet"
    if len(known) < len(found):
        return (
            f"Not decided: {ahead.name} leads; to AdamW {means}, nats a token. It takes paired "
            "runs in A with a seed from 1 on, and in B."
        )
    is_within = all(each.mean <= MARGIN for each in known)
    verdict = "is recommended" if is_within else "is not recommended"
    return f"{ahead.name} {verdict}: to AdamW {means}, nats a token; margin {MARGIN:+.2f}."
