"""What a model gets wrong in intents and slots, and how sure the figures are.

All rates are of counts that are sums over utterances, so that an interval is a bootstrap of rows:

    intent error    utterances with another intent
    slot F1         2 * correct / (predicted + labelled) over the slots of all utterances, where a
                    correct one has its name and both its ends (seqeval's micro average)
    SemER           (substituted + deleted + inserted) / labelled; the intent counts as a slot
    frame error     utterances with another intent or with any other slot

SemER compares slots as pairs of a name and its words: an equal pair is correct. Of what is left, a
slot of the same name with other words is a substitution, a labelled slot without such a partner is
a deletion, and a predicted one is an insertion. It can exceed 1. The intent is substituted or
correct. Source: Makhoul et al. 1999, Performance measures for information extraction, whose slot
error rate has the same quotient.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from labels import Tagged
from numpy.typing import NDArray

Counts = NDArray[np.float64]  # (utterances, COLUMNS)
COLUMNS = (
    "wrong_intent",
    "wrong_frame",
    "slots_correct",
    "slots_predicted",
    "slots_labelled",
    "semantic_errors",  # substitutions, deletions, insertions
    "semantic_labelled",  # slots and the intent
    "utterances",  # 1
)
METRICS = ("intent_error", "slot_f1", "slot_error", "semer", "frame_error")


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def semantic_errors(
    labelled: Sequence[tuple[str, str]], predicted: Sequence[tuple[str, str]]
) -> int:
    """Count substitutions, deletions and insertions between pairs of (name, words)."""
    mine, theirs = Counter(labelled), Counter(predicted)
    names = Counter(name for name, _ in (mine - theirs).elements())
    others = Counter(name for name, _ in (theirs - mine).elements())
    # A name's surplus is substituted as far as both sides have one; the rest is on one side alone.
    return sum(max(names[name], others[name]) for name in names | others)


def _pairs(utterance: Tagged) -> list[tuple[str, str]]:
    return [(name, " ".join(utterance.words[a:b])) for name, a, b in utterance.spans]


def count(labelled: Tagged, predicted: Tagged) -> list[int]:
    """Return a row of COLUMNS for an utterance and the answer to it."""
    assert labelled.words == predicted.words, labelled.place
    mine, theirs = set(labelled.spans), set(predicted.spans)
    wrong_intent = labelled.intent != predicted.intent
    return [
        wrong_intent,
        wrong_intent or mine != theirs,
        len(mine & theirs),
        len(theirs),
        len(mine),
        semantic_errors(_pairs(labelled), _pairs(predicted)) + wrong_intent,
        len(mine) + 1,
        1,
    ]


def count_all(labelled: Sequence[Tagged], predicted: Sequence[Tagged]) -> Counts:
    """Return the rows of many utterances, (utterances, COLUMNS)."""
    return np.array(
        [count(*pair) for pair in zip(labelled, predicted, strict=True)], dtype=np.float64
    )


def rates(sums: Counts) -> dict[str, NDArray[np.float64]]:
    """Return METRICS of sums of rows: (..., COLUMNS) gives (...) each.

    Without any slot, labelled or predicted, slot F1 is 0, as seqeval has it.
    """
    column = dict(zip(COLUMNS, np.moveaxis(sums, -1, 0), strict=True))
    slots = column["slots_predicted"] + column["slots_labelled"]
    slot_f1 = 2 * column["slots_correct"] / np.maximum(slots, 1)
    return {
        "intent_error": column["wrong_intent"] / column["utterances"],
        "slot_f1": slot_f1,
        "slot_error": 1 - slot_f1,
        "semer": column["semantic_errors"] / column["semantic_labelled"],
        "frame_error": column["wrong_frame"] / column["utterances"],
    }


# --- intervals ----------------------------------------------------------------------------------

ROUNDS = 2000
LEVEL = 0.95


@lru_cache(maxsize=8)
def _draws(seed: int, nums: tuple[int, ...], rounds: int) -> list[Counts]:
    """Return how often each of `num` is drawn in `num` draws, (rounds, num), for each of `nums`.

    They take longer than the rest of `resample`, and a report has them for hundreds of estimates.
    """
    rng = np.random.default_rng(seed)
    return [rng.multinomial(num, np.full(num, 1 / num), rounds).astype(np.float64) for num in nums]


def resample(
    runs: Sequence[Sequence[Counts]],
    statistic: Callable[[Counts], NDArray[np.float64]],
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> NDArray[np.float64]:
    """Return the statistic in `rounds` bootstrap samples.

    Utterances are drawn with replacement, the same ones for all runs, as all answered the same
    ones. The groups (few-shot subsets) are drawn with replacement, too; the runs of a group (the
    fine-tuning seeds) stay together.

    Args:
        runs: groups of runs; a run's counts are (..., utterances, columns).
        statistic: takes the mean over runs of the sums, (rounds, ..., columns).
    """
    draws, groups = _draws(seed, (runs[0][0].shape[-2], len(runs)), rounds)
    # (rounds, utterances) @ (..., utterances, columns), with the rounds in front afterwards.
    sums = np.stack(
        [np.mean([np.moveaxis(draws @ run, -2, 0) for run in group], axis=0) for group in runs]
    )
    return statistic(np.einsum("rg,gr...c->r...c", groups / len(runs), sums))


def estimate(
    runs: Sequence[Sequence[Counts]],
    statistic: Callable[[Counts], NDArray[np.float64]],
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> Interval:
    """Return a statistic and its percentile interval of the bootstrap; see `resample`."""
    whole = np.mean(
        [np.mean([run.sum(axis=-2) for run in group], axis=0) for group in runs], axis=0
    )
    samples = resample(runs, statistic, seed=seed, rounds=rounds)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(whole)), float(low), float(high))


def metric(name: str) -> Callable[[Counts], NDArray[np.float64]]:
    """Return the statistic that is a metric's value."""
    assert name in METRICS, name
    return lambda sums: rates(sums)[name]


def relative_change(
    statistic: Callable[[Counts], NDArray[np.float64]],
) -> Callable[[Counts], NDArray[np.float64]]:
    """Return (first - second) / second of a statistic; its counts are (..., 2, columns)."""

    def change(sums: Counts) -> NDArray[np.float64]:
        first, second = np.moveaxis(statistic(sums), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return first / second - 1

    return change
