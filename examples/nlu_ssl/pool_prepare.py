"""Clean a pool of unlabelled utterances: repetitions, near-duplicates, other domains, test sets.

    pool_prepare.py --pool traffic.jsonl --labelled train.jsonl --other-domains others.jsonl \\
        --forbid validation.jsonl test.jsonl --out pool

Outputs, in --out: pool.arrow (a column "text", in the order of the input) and pool.json (what was
left out and why). The pool is read twice and never held: besides its words on the disk, which are
removed at the end, an utterance takes about 100 bytes of memory."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from domain_filter import CONFIDENCE, DomainFilter, check_confidences
from ngrams import spoken_words
from numpy.typing import NDArray
from pool_files import BATCH, read_all, write_pool
from pool_near import SIMILARITY, NearDuplicates
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from labelled import read_jsonl
from pool import Forbidden, Line, fingerprint, fingerprint_of_spoken, read_documents
from shared.command import exit_code_of

REASONS = ("kept", "silent", "forbidden", "labelled", "repeated", "other_domain", "near_duplicate")
"""What becomes of an utterance; the first reason of this order counts."""

_KEPT, _SILENT, _FORBIDDEN, _LABELLED, _REPEATED, _OTHER_DOMAIN, _NEAR = range(len(REASONS))


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        forbid: validation and test sets, whose utterances no pool may hold.
        drop_forbidden: whether to leave them out, rather than stop at the first one.
        other_domains: text to train the domain filter with; without it there is no filter.
        similarity: of near-duplicates; None keeps them.
    """

    pool: list[Path]
    labelled: Path
    forbid: list[Path] = field(default_factory=list)
    drop_forbidden: bool = False
    other_domains: list[Path] = field(default_factory=list)
    confidence: float = CONFIDENCE
    similarity: float | None = SIMILARITY
    seed: int = 0
    batch: int = BATCH
    progress: bool = False


class _Reader:
    """Decides on each utterance what can be decided without the others."""

    def __init__(self, settings: Settings, labelled: Sequence[str]) -> None:
        self.settings = settings
        self.forbidden = Forbidden.read(settings.forbid)
        self.labelled = {fingerprint(text) for text in labelled}
        self.filter = _domain_filter(settings, labelled, self.forbidden)
        self.num_read = 0

    def reasons(
        self, texts: Sequence[str], words: Sequence[list[str]], marks: NDArray[np.uint64]
    ) -> NDArray[np.uint8]:
        """Return a place in REASONS for each text, and stop at a forbidden one if that is asked."""
        reasons = np.zeros(len(texts), np.uint8)
        if self.filter is not None:
            confidences = self.filter.confidences(texts)
            check_confidences(confidences, "the domain filter")
            reasons[confidences < self.filter.confidence] = _OTHER_DOMAIN
        for place, mark in enumerate(marks.tolist()):
            if not words[place]:
                reasons[place] = _SILENT
            elif mark in self.forbidden.places:
                self._forbid(texts[place], self.num_read + place + 1)
                reasons[place] = _FORBIDDEN
            elif mark in self.labelled:
                reasons[place] = _LABELLED
        self.num_read += len(texts)
        return reasons

    def _forbid(self, text: str, number: int) -> None:
        if not self.settings.drop_forbidden:
            names = Path(", ".join(path.name for path in self.settings.pool))
            self.forbidden.check([Line(text, names, number)])


def _domain_filter(
    settings: Settings, labelled: Sequence[str], forbidden: Forbidden
) -> DomainFilter | None:
    if not settings.other_domains:
        return None
    others = [
        line.text
        for path in settings.other_domains
        for document in read_documents(path)
        for line in forbidden.without(document)
    ]
    return DomainFilter(labelled, others, confidence=settings.confidence, seed=settings.seed)


def decide(
    settings: Settings, labelled: Sequence[str], folder: Path
) -> tuple[NDArray[np.uint8], DomainFilter | None]:
    """Read the pool once, and return a place in REASONS for each utterance.

    Args:
        folder: for files that are as long as the pool.
    Raises:
        ValueError: an utterance is forbidden, and may not be left out.
    """
    reader = _Reader(settings, labelled)
    near = NearDuplicates(folder, settings.similarity) if settings.similarity else None
    all_marks, all_reasons = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint8)]
    with tqdm(desc="reading", unit="utt", disable=not settings.progress) as bar:
        for texts in read_all(settings.pool, settings.batch):
            words = [spoken_words(text) for text in texts]
            forms = (" ".join(each) for each in words)
            marks = np.array([fingerprint_of_spoken(form) for form in forms], np.uint64)
            all_reasons.append(reader.reasons(texts, words, marks))
            all_marks.append(marks)
            if near is not None:
                near.add(words)
            bar.update(len(texts))
    reasons = np.concatenate(all_reasons)
    repeated = _repeated(np.concatenate(all_marks))
    reasons[repeated & np.isin(reasons, (_KEPT, _OTHER_DOMAIN))] = _REPEATED
    if near is not None:
        found = near.find(reasons == _KEPT, progress=settings.progress)
        reasons[found & (reasons == _KEPT)] = _NEAR
    return reasons, reader.filter


def _repeated(marks: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which fingerprints were there before."""
    repeated = np.ones(len(marks), bool)
    repeated[np.unique(marks, return_index=True)[1]] = False
    return repeated


def _kept_texts(settings: Settings, reasons: NDArray[np.uint8]) -> Iterator[list[str]]:
    """Read the pool again, and yield what stays."""
    place = 0
    for texts in read_all(settings.pool, settings.batch):
        stays = reasons[place : place + len(texts)] == _KEPT
        yield [text for text, is_kept in zip(texts, stays, strict=True) if is_kept]
        place += len(texts)


def prepare(settings: Settings, out: Path) -> dict[str, Any]:
    """Clean a pool, write it, and return what pool.json says.

    Raises:
        ValueError: nothing is left, or see `decide`.
    """
    labelled = [each.text for each in read_jsonl(settings.labelled)]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        reasons, domain_filter = decide(settings, labelled, Path(folder))
    counts = dict(zip(REASONS, np.bincount(reasons, minlength=len(REASONS)).tolist(), strict=True))
    if not counts["kept"]:
        said = ", ".join(f"{number:,} {name}" for name, number in counts.items())
        raise ValueError(
            f"--pool: of {len(reasons):,} utterances none is left ({said}): the pool is empty "
            "after filtering; lower --confidence, or give a pool that is nearer to the domain"
        )
    write_pool(out / "pool.arrow", _kept_texts(settings, reasons))
    record = {
        "pool": [path.name for path in settings.pool],
        "read": len(reasons),
        **counts,
        "forbidden_sets": [path.name for path in settings.forbid],
        "confidence": domain_filter.confidence if domain_filter else None,
        "domain_filter": asdict(domain_filter.held_out) if domain_filter else None,
        "similarity": settings.similarity,
    }
    (out / "pool.json").write_text(json.dumps(record, indent=2) + "\n")
    if domain_filter:
        print(f"domain filter on held-out text: {domain_filter.held_out}")
    return record


def main() -> int:
    """Clean a pool from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pool", type=Path, nargs="+", required=True, help="JSON lines or Arrow")
    parser.add_argument("--labelled", type=Path, required=True, help="jsonl of labelled.py")
    parser.add_argument(
        "--forbid",
        type=Path,
        nargs="+",
        required=True,
        help="all validation and test sets: none of their utterances may be in the pool",
    )
    parser.add_argument(
        "--drop-forbidden", action="store_true", help="leave them out, rather than stop"
    )
    parser.add_argument(
        "--other-domains",
        type=Path,
        nargs="+",
        default=[],
        help="text that is not of the domain; without it, the pool is not filtered",
    )
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="(%(default)s)")
    parser.add_argument(
        "--similarity", type=float, default=SIMILARITY, help="of near-duplicates (%(default)s)"
    )
    parser.add_argument("--keep-near-duplicates", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the filter's folds (%(default)s)")
    parser.add_argument("--out", type=Path, required=True)

    def program() -> None:
        args = parser.parse_args()
        settings = Settings(
            pool=args.pool,
            labelled=args.labelled,
            forbid=args.forbid,
            drop_forbidden=args.drop_forbidden,
            other_domains=args.other_domains,
            confidence=args.confidence,
            similarity=None if args.keep_near_duplicates else args.similarity,
            seed=args.seed,
            progress=True,
        )
        record = prepare(settings, args.out)
        print(", ".join(f"{record[name]:,} {name}" for name in ("read", *REASONS)))

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
