"""Count the n-grams of utterances: what the submodular selection calls features.

An n-gram is n spoken words that follow each other in one utterance. `count_ngrams` keeps those that
occur often enough in the labelled utterances and the pool together, and returns how often each
utterance has each of them. Nothing here imports Megatron or torch."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from spoken import spoken_form

MAX_ORDER = 4
MIN_COUNT = 30
"""Both are the paper's, arXiv:2103.15871."""

_CACHED_WORDS = 1 << 18


@lru_cache(maxsize=_CACHED_WORDS)
def _spoken_word(written: str) -> tuple[str, ...]:
    return tuple(spoken_form(written).split())


def spoken_words(text: str) -> list[str]:
    """Return the words of a text's spoken form.

    It is ten times as fast as `spoken_form(text).split()`, and equal to it: a word is spoken in the
    same way wherever it stands.
    """
    return [word for written in text.split() for word in _spoken_word(written)]


@dataclass(frozen=True)
class Features:
    """How often utterances have n-grams.

    Attributes:
        labelled: (labelled utterances, n-grams) int32, in CSR.
        pool: (utterances of the pool, n-grams) int32, in CSR.
        num_ngrams: how many n-grams of each order there are, from order 1 on.
        num_dropped: how many n-grams of each order occur too seldom. One with a part that occurs
            too seldom does so too; it is dropped with the part, and not counted.
    """

    labelled: sparse.csr_matrix
    pool: sparse.csr_matrix
    num_ngrams: tuple[int, ...]
    num_dropped: tuple[int, ...]


class _Words:
    """Numbers words, and holds utterances as such numbers."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.flat = array("i")
        self.ends = array("q", [0])

    def add(self, texts: Iterable[str]) -> None:
        numbers = self.numbers
        for text in texts:
            self.flat.extend(
                [numbers.setdefault(word, len(numbers)) for word in spoken_words(text)]
            )
            self.ends.append(len(self.flat))


def _of_order(
    before: NDArray[np.int32], words: NDArray[np.int32], has_room: NDArray[np.bool_], min_count: int
) -> tuple[NDArray[np.int32], int, int]:
    """Number the n-grams that begin at each word, from the numbers of those one word shorter.

    Args:
        before: (words,) the (n-1)-gram that begins at each word, -1 where it is dropped.
        has_room: (words,) whether n words of the utterance begin there.
    Returns:
        (words,) the n-gram of each word or -1; how many are kept; how many are dropped.
    """
    frequent = has_room & (before >= 0)
    frequent[:-1] &= before[1:] >= 0  # the part without the first word
    starts = np.flatnonzero(frequent)
    # The last word of an n-gram is n - 1 behind its first; `words` is shifted by the caller.
    keys = before[starts].astype(np.int64) * (int(words.max(initial=0)) + 1) + words[starts]
    unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    del keys
    kept = counts >= min_count
    numbers = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    found = np.full(len(before), -1, np.int32)
    found[starts] = numbers[inverse]
    return found, int(kept.sum()), len(unique) - int(kept.sum())


def count_ngrams(
    labelled: Sequence[str],
    pool: Iterable[Sequence[str]],
    *,
    max_order: int = MAX_ORDER,
    min_count: int = MIN_COUNT,
) -> Features:
    """Count the n-grams of the orders 1 to max_order that occur min_count times or more.

    An n-gram occurs no more often than its parts, so that those of frequent parts alone are looked
    at. It takes about 1 KB of memory an utterance of nine words.

    Args:
        labelled: the texts of the labelled utterances.
        pool: batches of the pool's texts; they are read once.
    Raises:
        ValueError: max_order or min_count is below 1.
    """
    for name, number in (("max_order", max_order), ("min_count", min_count)):
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1")
    held = _Words()
    held.add(labelled)
    for texts in pool:
        held.add(texts)
    words = np.frombuffer(held.flat, np.int32) if held.flat else np.zeros(0, np.int32)
    ends = np.frombuffer(held.ends, np.int64)
    lengths = np.diff(ends)
    room = np.repeat(ends[1:], lengths) - np.arange(len(words))  # words from here to the end
    rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    num_ngrams, num_dropped, found_rows, found_columns = [], [], [], []
    current = np.zeros(len(words), np.int32)  # every word continues the same 0-gram
    for order in range(1, max_order + 1):
        last = np.zeros_like(words)
        last[: len(words) - order + 1] = words[order - 1 :]
        current, kept, dropped = _of_order(current, last, room >= order, min_count)
        begins = np.flatnonzero(current >= 0)
        found_rows.append(rows[begins])
        found_columns.append(current[begins] + np.int32(sum(num_ngrams)))
        num_ngrams.append(kept)
        num_dropped.append(dropped)
    shape = (len(lengths), sum(num_ngrams))
    whole = _matrix(found_rows, found_columns, shape)
    first = len(labelled)
    return Features(whole[:first], whole[first:], tuple(num_ngrams), tuple(num_dropped))


def _matrix(
    rows: list[NDArray[np.int32]], columns: list[NDArray[np.int32]], shape: tuple[int, int]
) -> sparse.csr_matrix:
    """Return how often each pair of a row and a column occurs."""
    places = (np.concatenate(rows), np.concatenate(columns))
    ones = np.ones(len(places[0]), np.int32)
    matrix = sparse.coo_matrix((ones, places), shape=shape).tocsr()
    matrix.sum_duplicates()
    return matrix


def batches_of(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Divide texts into batches, as a pool's file is read."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
