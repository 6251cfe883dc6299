"""Select utterances by a submodular function of their features: greedy, lazy, and in two rounds.

    f(S) = sum over features u of g(m_u(S)),   g(m) = log(1 + m) or sqrt(m)

m_u(S) is the mass of feature u: how often the labelled utterances and those of S have it. f is
monotone and submodular, so that the greedy choice of k utterances adds to f of the labelled ones at
least 1 - 1/e of what the best choice of k adds (Nemhauser, Wolsey, Fisher 1978).

`greedy` is lazy (Minoux 1978): what an utterance gains only becomes less while S grows, so that an
old gain is a bound. It chooses exactly what `naive_greedy` chooses. For this, the increments of g
are integers, in units of 2^-44: sums of them do not depend on their order, and never grow by
rounding. Of equal gains, the utterance with the lower index is chosen.

Source of f: Kirchhoff and Bilmes 2014, Submodularity for data selection in machine translation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

CONCAVE: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "log": np.log1p,
    "sqrt": np.sqrt,
}
UNIT_BITS = 44
MAX_ROW_MASS = 1 << 18
"""n-grams of one utterance: above it, the integers of a gain could overflow."""

_CHUNK = 1 << 16  # rows that are evaluated at a time
_BLOCK = 4096  # candidates that are looked at more closely
_FIRST_EVALUATED = 32  # of these, before the number is doubled
_CHOSEN = -1  # in place of a gain


@dataclass(frozen=True)
class Selection:
    """Chosen utterances, in the order in which they were chosen.

    Attributes:
        indices: (chosen,) int64, rows of the features.
        gains: (chosen,) float64, what each added to f when it was chosen.
        num_evaluations: how many gains were computed.
    """

    indices: NDArray[np.int64]
    gains: NDArray[np.float64]
    num_evaluations: int


def value(mass: NDArray[np.int64], concave: str) -> float:
    """Return f of the features' masses, (features,)."""
    return float(CONCAVE[concave](mass.astype(np.float64)).sum())


def mass_of(features: sparse.csr_matrix, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the masses of the features in some utterances, (features,)."""
    rows = features[indices]
    mass = np.zeros(features.shape[1], np.int64)
    np.add.at(mass, rows.indices, rows.data)
    return mass


def _increments(concave: str, length: int) -> NDArray[np.int64]:
    """Return g(m) for m from 0 to length - 1, in units of 2^-44, as int64."""
    m = np.arange(length - 1, dtype=np.float64)
    # g(m + 1) - g(m) without the difference of two large numbers.
    steps = np.log1p(1 / (m + 1)) if concave == "log" else 1 / (np.sqrt(m + 1) + np.sqrt(m))
    # log1p need not be monotone in its last bit; the lazy greedy needs steps that are.
    integers = np.minimum.accumulate(np.rint(steps * 2.0**UNIT_BITS).astype(np.int64))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(integers)])


class _Gains:
    """Computes what utterances gain over masses.

    Args:
        table: of `_increments`.
    """

    def __init__(self, features: sparse.csr_matrix, table: NDArray[np.int64]) -> None:
        self.starts = features.indptr.astype(np.int64)
        self.columns = features.indices
        self.counts = features.data
        self.table = table
        self.num_evaluated = 0

    def of(self, rows: NDArray[np.int64], mass: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the gains of some rows, in the table's unit."""
        starts = self.starts[rows]
        lengths = self.starts[rows + 1] - starts
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(rows) else 0)
        places += np.repeat(starts - (ends - lengths), lengths)
        old = mass[self.columns[places]]
        steps = self.table[old + self.counts[places]] - self.table[old]
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(steps)])
        self.num_evaluated += len(rows)
        return sums[ends] - sums[ends - lengths]

    def of_all(self, mass: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the gains of all rows."""
        num = len(self.starts) - 1
        chunks = [np.arange(at, min(at + _CHUNK, num)) for at in range(0, num, _CHUNK)]
        return np.concatenate([self.of(rows, mass) for rows in chunks])

    def add(self, row: int, mass: NDArray[np.int64]) -> None:
        """Add a row to the masses, in place."""
        part = slice(self.starts[row], self.starts[row + 1])
        mass[self.columns[part]] += self.counts[part]


def _check(features: sparse.csr_matrix, budget: int, concave: str) -> None:
    if concave not in CONCAVE:
        raise ValueError(f"concave={concave!r}: must be one of {', '.join(CONCAVE)}")
    if not 1 <= budget <= features.shape[0]:
        raise ValueError(
            f"budget {budget:,}: must be from 1 to the pool's {features.shape[0]:,} utterances; "
            "lower --budget, or give a larger pool"
        )
    row_mass = np.asarray(features.sum(axis=1)).ravel()
    if row_mass.max(initial=0) >= MAX_ROW_MASS:
        what = f"utterance {int(row_mass.argmax())} has {int(row_mass.max()):,} n-grams"
        raise ValueError(f"{what}: must be below {MAX_ROW_MASS:,}; divide it into sentences")


def _prepare(
    features: sparse.csr_matrix, start: NDArray[np.int64], budget: int, concave: str
) -> _Gains:
    _check(features, budget, concave)
    whole = np.asarray(features.sum(axis=0)).ravel()
    largest = int(features.data.max(initial=0))
    # What is chosen, and one utterance more, as gains are computed of chosen utterances, too.
    most = int((start + np.minimum(whole, budget * largest)).max(initial=0)) + largest
    return _Gains(features, _increments(concave, most + 1))


def naive_greedy(
    features: sparse.csr_matrix, start: NDArray[np.int64], budget: int, concave: str = "log"
) -> Selection:
    """Choose as `greedy` does, with all gains computed for each choice; to compare with."""
    gains_of = _prepare(features, start, budget, concave)
    mass = start.astype(np.int64)
    indices, gains = [], []
    for _ in range(budget):
        current = gains_of.of_all(mass)
        current[indices] = _CHOSEN
        indices.append(int(np.argmax(current)))  # the first one of equal ones
        gains.append(int(current[indices[-1]]))
        gains_of.add(indices[-1], mass)
    return _selection(indices, gains, gains_of.num_evaluated)


def _selection(indices: list[int], gains: list[int], num_evaluations: int) -> Selection:
    in_units = np.array(gains, np.float64) / 2.0**UNIT_BITS
    return Selection(np.array(indices, np.int64), in_units, num_evaluations)


def _largest(bounds: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Return the rows of the largest bounds, ascending, and the best of the others.

    Rows with equal bounds are taken by their index. The best of the others is its bound and its
    index, negative so that a lower index is larger.
    """
    if size >= len(bounds):
        return np.flatnonzero(bounds != _CHOSEN), (_CHOSEN, 0)
    least = np.partition(bounds, len(bounds) - size)[len(bounds) - size]
    above = np.flatnonzero(bounds > least)
    equal = np.flatnonzero(bounds == least)
    taken = np.sort(np.concatenate([above, equal[: size - len(above)]]))
    others = bounds.copy()
    others[taken] = _CHOSEN
    best = int(np.argmax(others))
    return taken[bounds[taken] != _CHOSEN], (int(others[best]), -best)


class _Block:
    """The candidates with the largest bounds, among which several choices are made.

    Attributes:
        rows: (size,) ascending.
        bounds: (size,) their gains, or bounds of them.
    """

    def __init__(self, rows: NDArray[np.int64], gains_of: _Gains, mass: NDArray[np.int64]) -> None:
        self.rows = rows
        self.gains_of = gains_of
        self.mass = mass
        self.bounds = gains_of.of(rows, mass)
        self.is_fresh = np.ones(len(rows), bool)

    def choose(self, limit: tuple[int, int]) -> tuple[int, int] | None:
        """Choose the best row and add it to the masses.

        Args:
            limit: the bound and the negative index of the best candidate elsewhere.
        Returns:
            The row and its gain; None if the best may be elsewhere.
        """
        num = _FIRST_EVALUATED
        while len(self.rows):
            best = int(np.argmax(self.bounds))  # the lowest index of equal ones
            if (int(self.bounds[best]), -int(self.rows[best])) <= limit:
                return None
            if self.is_fresh[best]:
                return self._take(best)
            self._refresh(best, num)
            num *= 2
        return None

    def _take(self, best: int) -> tuple[int, int]:
        row, gain = int(self.rows[best]), int(self.bounds[best])
        assert gain != _CHOSEN, row
        self.gains_of.add(row, self.mass)
        self.bounds[best] = _CHOSEN
        self.is_fresh[:] = False
        return row, gain

    def _refresh(self, best: int, num: int) -> None:
        """Compute the gains of `best` and of the num candidates with the largest bounds."""
        if num < len(self.bounds):
            places = np.argpartition(self.bounds, -num)[-num:]
            places = np.append(places, best)
        else:
            places = np.arange(len(self.bounds))
        places = places[(self.bounds[places] != _CHOSEN) & ~self.is_fresh[places]]
        self.bounds[places] = self.gains_of.of(self.rows[places], self.mass)
        self.is_fresh[places] = True


def greedy(
    features: sparse.csr_matrix,
    start: NDArray[np.int64],
    budget: int,
    concave: str = "log",
    *,
    progress: bool = False,
) -> Selection:
    """Choose `budget` utterances, each the one that then gains most.

    It works on the candidates with the largest bounds, a block at a time, until one outside may be
    better. In a block, the gains of those with the largest bounds are computed together, until the
    largest bound is one of them.

    Args:
        features: (utterances, features) int32, in CSR: how often each has each.
        start: (features,) int64, the masses of the labelled utterances.
        concave: "log" or "sqrt".
        progress: whether to show a bar.
    Raises:
        ValueError: the budget is below 1 or above the number of utterances.
    """
    gains_of = _prepare(features, start, budget, concave)
    mass = start.astype(np.int64)
    bounds = gains_of.of_all(mass)
    indices: list[int] = []
    gains: list[int] = []
    with tqdm(total=budget, desc="choosing", unit="utt", disable=not progress) as bar:
        while len(indices) < budget:
            rows, limit = _largest(bounds, _BLOCK)
            block = _Block(rows, gains_of, mass)
            while len(indices) < budget and (pair := block.choose(limit)) is not None:
                indices.append(pair[0])
                gains.append(pair[1])
                bar.update()
            bounds[rows] = block.bounds
    return _selection(indices, gains, gains_of.num_evaluated)


def upper_bound(
    features: sparse.csr_matrix,
    start: NDArray[np.int64],
    chosen: NDArray[np.int64],
    budget: int,
    concave: str = "log",
) -> float:
    """Return what no choice of `budget` utterances can gain more than, seen from a choice.

    Each other utterance adds to the chosen ones at most its gain over them, so that the best choice
    gains at most what the chosen ones gain and the `budget` largest of these gains (Minoux 1978).
    """
    gains_of = _prepare(features, start, budget, concave)
    mass = start + mass_of(features, chosen)
    gains = gains_of.of_all(mass)
    gains[chosen] = 0
    largest = np.partition(gains, len(gains) - budget)[len(gains) - budget :]
    gained = value(mass, concave) - value(start, concave)
    return gained + float(largest.astype(np.float64).sum()) / 2.0**UNIT_BITS


# --- two rounds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoRounds:
    """What GreeDi chose, and what it could choose from.

    Attributes:
        selection: the better one of the second round's choice and of the shards' own.
        shard_gains: what each shard's own choice gains over the labelled utterances.
        union_gain: what the second round's choice gains.
        num_candidates: of the second round.
    """

    selection: Selection
    shard_gains: tuple[float, ...]
    union_gain: float
    num_candidates: int


def certain_share(shards: int, budget: int) -> float:
    """Return the share of the best choice's gain that GreeDi has on any division into shards.

    The best choice's part in some shard gains 1 / shards of it or more, as f is submodular, and the
    greedy choice in this shard gains 1 - 1/e of that. No more than `budget` shards have a part.
    With one shard this is the greedy choice's own bound.
    """
    return (1 - math.exp(-1)) / min(shards, budget)


def expected_share(shards: int) -> float:
    """Return the share on average over random divisions, which is independent of their number.

    Source: Barbosa, Ene, Nguyen, Ward 2015, The Power of Randomization, arXiv:1502.02606.
    """
    return (1 - math.exp(-1)) / (1 if shards == 1 else 2)


def _choose_in(
    features: sparse.csr_matrix,
    start: NDArray[np.int64],
    rows: NDArray[np.int64],
    budget: int,
    concave: str,
) -> Selection:
    """Choose among some rows, which are ascending."""
    found = greedy(features[rows], start, min(budget, len(rows)), concave)
    return Selection(rows[found.indices], found.gains, found.num_evaluations)


def _filled(
    features: sparse.csr_matrix,
    start: NDArray[np.int64],
    first: Selection,
    union: NDArray[np.int64],
    budget: int,
    concave: str,
) -> Selection:
    """Add to a shard's choice, if the shard has fewer utterances than the budget."""
    missing = budget - len(first.indices)
    if not missing:
        return first
    start = start + mass_of(features, first.indices)
    rows = np.setdiff1d(union, first.indices)
    more = _choose_in(features, start, rows, missing, concave)
    return Selection(
        np.concatenate([first.indices, more.indices]),
        np.concatenate([first.gains, more.gains]),
        first.num_evaluations + more.num_evaluations,
    )


def greedi(
    features: sparse.csr_matrix,
    start: NDArray[np.int64],
    budget: int,
    concave: str = "log",
    *,
    shards: int,
    seed: int = 0,
    workers: int = 1,
    progress: bool = False,
) -> TwoRounds:
    """Choose in random shards, and then among what was chosen there.

    One shard gives the choice of `greedy`.
    Source: Mirzasoleiman, Karbasi, Sarkar, Krause 2013, Distributed submodular maximization.

    Args:
        workers: processes that work on shards at the same time; each has its shard's features.
    Raises:
        ValueError: there are more shards than utterances, or see `greedy`.
    """
    num = features.shape[0]
    if not 1 <= shards <= num:
        raise ValueError(f"shards={shards}: must be from 1 to the pool's {num:,} utterances")
    _check(features, budget, concave)
    order = np.random.default_rng(seed).permutation(num)
    parts = [np.sort(part) for part in np.array_split(order, shards)]
    running = Parallel(n_jobs=workers, return_as="generator")(
        delayed(_choose_in)(features, start, part, budget, concave) for part in parts
    )
    found = list(tqdm(running, "shards", total=shards, unit="shard", disable=not progress))
    union = np.sort(np.concatenate([each.indices for each in found]))
    second = _choose_in(features, start, union, budget, concave)
    gains = [float(each.gains.sum()) for each in found]
    best = found[int(np.argmax(gains))]
    union_gain = float(second.gains.sum())
    chosen = second
    if best.gains.sum() > union_gain:
        chosen = _filled(features, start, best, union, budget, concave)
    evaluations = sum(each.num_evaluations for each in found) + second.num_evaluations
    selection = Selection(chosen.indices, chosen.gains, evaluations)
    return TwoRounds(selection, tuple(gains), union_gain, len(union))
