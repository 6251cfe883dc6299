"""Find utterances that are nearly the same as earlier ones.

Two utterances are near-duplicates if their sets of spoken words have a Jaccard similarity, shared
words over all words, of at least a threshold. At 0.9 these are the same words in another order, one
word more beside nine or more, or one exchanged among nineteen or more; a shorter utterance with
another slot value stays.

MinHash proposes pairs (Broder 1997), in BANDS groups of ROWS hashes each: an utterance is compared
with the first one that has the same hashes in a band. Each pair is then compared by its words, so
that none is taken wrongly. A pair with a similarity of 0.9 shares no band in 1 of 7,500 cases.
Utterances that near-duplicates connect are a group, and the group's first one stays.

datasketch, a library for MinHash, was measured instead: 3.4 KB of memory an utterance for its
index, which is 3.4 GB for a million. Here the hashes lie on the disk, and one band is in memory."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph
from tqdm import tqdm

BANDS = 10
ROWS = 5
SIMILARITY = 0.9

_PAIRS = 1 << 16  # that are compared at a time
_CACHED_WORDS = 1 << 18

Marks = NDArray[np.uint64]


@lru_cache(maxsize=_CACHED_WORDS)
def _word_mark(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _mix(marks: Marks) -> Marks:
    """Scramble 64 bits (splitmix64, by Sebastiano Vigna)."""
    marks = (marks ^ (marks >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    marks = (marks ^ (marks >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return marks ^ (marks >> np.uint64(31))


_SALTS = _mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def word_sets(utterances: Iterable[list[str]]) -> tuple[Marks, NDArray[np.int64]]:
    """Return 64 bits of the different words of each utterance, and how many each has."""
    sets = [sorted({_word_mark(word) for word in words}) for words in utterances]
    lengths = np.array([len(each) for each in sets], np.int64)
    flat = [mark for each in sets for mark in each]
    return np.array(flat, np.uint64), lengths


def bands_of(words: Marks, lengths: NDArray[np.int64]) -> Marks:
    """Return the bands' hashes of sets of words, (utterances, BANDS).

    An utterance without a word has 0 in all of them.
    """
    bands = np.zeros((len(lengths), BANDS), np.uint64)
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return bands
    starts = (np.cumsum(lengths) - lengths)[filled]
    for band in range(BANDS):
        mixed = np.zeros(len(filled), np.uint64)
        for salt in _SALTS[band * ROWS : (band + 1) * ROWS]:
            mixed = _mix(mixed + np.minimum.reduceat(_mix(words ^ salt), starts))
        bands[filled, band] = mixed
    return bands


class NearDuplicates:
    """Collects what the comparison needs on the disk, and then finds the groups.

    Args:
        folder: for files that are as long as the pool; the caller removes it.
    """

    def __init__(self, folder: Path, similarity: float = SIMILARITY) -> None:
        if not 0.5 <= similarity <= 1:
            raise ValueError(f"similarity={similarity}: must be from 0.5 to 1")
        self.similarity = similarity
        self.lengths: list[NDArray[np.int64]] = []
        self.paths = [folder / f"band{band}.u64" for band in range(BANDS)]
        self.words_path = folder / "words.u64"
        self.files: list[BinaryIO] = [path.open("wb") for path in (*self.paths, self.words_path)]

    def add(self, utterances: Iterable[list[str]]) -> None:
        """Take the spoken words of the next utterances."""
        words, lengths = word_sets(utterances)
        bands = bands_of(words, lengths)
        for file, values in zip(self.files, (*bands.T, words), strict=True):
            file.write(np.ascontiguousarray(values).tobytes())
        self.lengths.append(lengths)

    def find(self, is_kept: NDArray[np.bool_], *, progress: bool = False) -> NDArray[np.bool_]:
        """Return which of the kept utterances are near-duplicates of earlier kept ones.

        Args:
            is_kept: (utterances,) those that are compared.
        """
        for file in self.files:
            file.close()
        lengths = np.concatenate([*self.lengths, np.zeros(0, np.int64)])
        ends = np.cumsum(lengths)
        words = _mapped(self.words_path)
        kept = np.flatnonzero(is_kept & (lengths > 0))
        linked: list[NDArray[np.int64]] = []
        for path in tqdm(self.paths, "near-duplicates", unit="band", disable=not progress):
            pairs = _first_and_others(_mapped(path)[kept], kept)
            for at in range(0, len(pairs), _PAIRS):
                part = pairs[at : at + _PAIRS]
                similar = similarities(words, ends - lengths, lengths, part) >= self.similarity
                linked.append(part[similar])
        return _later_ones(np.concatenate([*linked, np.zeros((0, 2), np.int64)]), len(lengths))


def _mapped(path: Path) -> Marks:
    if not path.stat().st_size:
        return np.zeros(0, np.uint64)
    return np.memmap(path, np.uint64, "r")


def _first_and_others(hashes: Marks, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pair the first row of each hash with the other rows that have it, (pairs, 2)."""
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], rows[order]
    begins = np.ones(len(rows), bool)
    begins[1:] = hashes[1:] != hashes[:-1]
    firsts = rows[begins][np.cumsum(begins) - 1]
    return np.stack([firsts[~begins], rows[~begins]], axis=1)


def similarities(
    words: Marks,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    pairs: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the Jaccard similarities of pairs of sets of words.

    Args:
        words: the sets one after the other.
        starts, lengths: (sets,) where each begins, and how many words it has.
        pairs: (pairs, 2) numbers of sets.
    """
    sides = pairs.ravel()
    sizes = lengths[sides]
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1] if len(sides) else 0)
    places += np.repeat(starts[sides] - (ends - sizes), sizes)
    of_pair = np.repeat(np.arange(len(sides)) // 2, sizes)
    marks = words[places]
    order = np.lexsort((marks, of_pair))
    marks, of_pair = marks[order], of_pair[order]
    # A set has each word once: equal neighbours are one of either set.
    shared = (marks[1:] == marks[:-1]) & (of_pair[1:] == of_pair[:-1])
    num_shared = np.bincount(of_pair[1:][shared], minlength=len(pairs))
    num_all = lengths[pairs].sum(axis=1) - num_shared
    return num_shared / np.maximum(num_all, 1)


def _later_ones(pairs: NDArray[np.int64], num: int) -> NDArray[np.bool_]:
    """Return which rows are connected to an earlier one by pairs."""
    later = np.zeros(num, bool)
    if len(pairs):
        ones = np.ones(len(pairs), bool)
        graph = sparse.coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(num, num))
        _, groups = csgraph.connected_components(graph, directed=False)
        _, firsts = np.unique(groups, return_index=True)
        later[:] = True
        later[firsts] = False
    return later
