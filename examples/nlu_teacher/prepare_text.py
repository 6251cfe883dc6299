"""Turn unlabelled text into an encoder's dataset: sub-words, and Megatron's indexed datasets.

    prepare_text.py --text wiki.jsonl --out runs/stage1 --vocab-size 4096
    prepare_text.py --text pool.jsonl --utterances --out runs/stage2 --tokenizer runs/stage1 \\
        --forbid test.jsonl validation.jsonl

A dataset is a folder: train and held_out (.bin, .idx), tokenizer.json, lines.npy (what the leak
check reads) and dataset.json, which says what was made of what, and how well a table of the tokens'
frequencies tells the held-out text: unigram_loss. It appears when it is complete."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pool
import tokenizers
import vocabulary
from pool import Document, Line
from spoken import spoken_form

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import exit_code_of
from shared.indexed import indexed_dataset_builder

RECORD = "dataset.json"
SPLITS = ("train", "held_out")
SPECIAL_PER_SEQUENCE = 2
"""[CLS] and [SEP], which training puts around every sequence."""

_BATCH_DOCUMENTS = 1000


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        utterances: every line is a sequence of its own; otherwise a document's sentences are put
            together up to max_length.
        spoken_share: of the documents is turned into its spoken form.
        max_length: tokens of a sequence at most, with [CLS] and [SEP].
        tokenizer: one that is there, or None to train one on the training part.
        forbid: validation and test sets.
    """

    text: list[Path]
    key: str
    utterances: bool
    spoken_share: float
    held_out_fraction: float
    max_length: int
    tokenizer: Path | None
    vocabulary: str
    vocab_size: int
    forbid: list[Path]
    drop_forbidden: bool
    drop_long: bool

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if not 0 <= self.spoken_share <= 1:
            raise ValueError(f"--spoken-share {self.spoken_share}: must be from 0 to 1")
        if not 0 < self.held_out_fraction <= 0.5:
            raise ValueError(
                f"--held-out-fraction {self.held_out_fraction}: must be above 0 and at most 0.5"
            )
        if self.max_length < 8:
            raise ValueError(f"--max-length {self.max_length}: must be at least 8 tokens")

    def record(self) -> dict[str, Any]:
        """Return it as JSON's types, with the size of every file in place of its folder."""
        record = asdict(self)
        record["text"] = {path.name: path.stat().st_size for path in self.text}
        record["forbid"] = [path.name for path in self.forbid]
        del record["tokenizer"]
        return record


@dataclass
class Counts:
    """What became of the text.

    Attributes:
        unknown_tokens: [UNK] in the sequences.
        divided_sentences: were longer than max_length and became several sequences.
        dropped_long: utterances longer than max_length, with --drop-long.
        dropped_silent: lines of which nothing is spoken.
    """

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sequences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    lines: int = 0
    spoken_lines: int = 0
    dropped_repetitions: int = 0
    dropped_forbidden: int = 0
    dropped_silent: int = 0
    dropped_long: int = 0
    divided_sentences: int = 0
    unknown_tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """A document as it is tokenized."""

    split: str
    lines: Document


def _as_documents(settings: Settings) -> Iterator[Document]:
    """Documents of the files; with utterances, every line is one."""
    for path in settings.text:
        for document in pool.read_documents(path, settings.key):
            if settings.utterances:
                yield from ([line] for line in document)
            else:
                yield pool.split_sentences(document)


def _speak(document: Document) -> Document:
    return [Line(spoken_form(line.text), line.file, line.number) for line in document]


def clean(settings: Settings, counts: Counts, repetitions: pool.Repetitions) -> Iterator[Prepared]:
    """Give the documents of a pool, without repetitions, in written or in spoken form.

    Raises:
        ValueError: a file cannot be read, or holds an utterance of a test set.
    """
    forbidden = pool.Forbidden.read(settings.forbid, settings.key)
    for given in _as_documents(settings):
        document = [line for line in given if spoken_form(line.text)]
        counts.dropped_silent += len(given) - len(document)
        if settings.drop_forbidden:
            kept = forbidden.without(document)
            counts.dropped_forbidden += len(document) - len(kept)
            document = kept
        forbidden.check(document)
        document = repetitions.without(document)
        if not document:
            continue
        name = "\n".join(line.text for line in document)
        held_out = pool.chosen(name, settings.held_out_fraction, "held out")
        counts.lines += len(document)
        if pool.chosen(name, settings.spoken_share, "spoken"):
            counts.spoken_lines += len(document)
            document = _speak(document)
        yield Prepared("held_out" if held_out else "train", document)
    counts.dropped_repetitions = repetitions.num_dropped


def pack(
    document: list[list[int]], room: int, *, divide: bool, places: list[str]
) -> tuple[list[list[int]], int]:
    """Put the sentences of a document together into sequences.

    Args:
        document: ids of each sentence, without [CLS] and [SEP].
        room: ids of a sequence at most.
        divide: divide a longer sentence; otherwise it raises.
        places: file and line of each sentence.

    Returns:
        The ids of each sequence, and how many sentences were divided.

    Raises:
        ValueError: a sentence is longer, and must not be divided.
    """
    sequences: list[list[int]] = []
    num_divided = 0
    for ids, place in zip(document, places, strict=True):
        if len(ids) > room and not divide:
            raise ValueError(
                f"{place}: has {len(ids)} tokens; an utterance must have at most {room} and the 2 "
                f"around it: give a larger --max-length, or --drop-long to leave it out"
            )
        num_divided += len(ids) > room
        for part in (ids[i : i + room] for i in range(0, len(ids), room)):
            if sequences and len(sequences[-1]) + len(part) <= room:
                sequences[-1] = sequences[-1] + part
            else:
                sequences.append(part)
    return sequences, num_divided


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Return the cross-entropy, in nats a token, of a table of how frequent each token is.

    Each token counts once more than it occurs in training, so that none has a probability of zero.

    Args:
        train, held_out: (vocab_size,) int64; how often each token occurs.
    """
    probabilities = (train + 1) / (train.sum() + len(train))
    return float(-(held_out * np.log(probabilities)).sum() / held_out.sum())


class Writer:
    """Tokenizes documents and writes them to the two indexed datasets."""

    def __init__(
        self, folder: Path, tokenizer: tokenizers.Tokenizer, settings: Settings, counts: Counts
    ) -> None:
        self._tokenizer, self._settings, self._counts = tokenizer, settings, counts
        size = tokenizer.get_vocab_size()
        self._builders = {split: indexed_dataset_builder(folder / split, size) for split in SPLITS}
        self._occurrences = {split: np.zeros(size, dtype=np.int64) for split in SPLITS}
        self._folder = folder

    def add(self, documents: list[Prepared]) -> None:
        """Write documents.

        Raises:
            ValueError: an utterance is too long.
        """
        texts = [line.text for document in documents for line in document.lines]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for document in documents:
            self._add(document, [next(encoded).ids for _ in document.lines])

    def _add(self, document: Prepared, ids: list[list[int]]) -> None:
        settings, counts = self._settings, self._counts
        room = settings.max_length - SPECIAL_PER_SEQUENCE
        places = [line.place for line in document.lines]
        if settings.utterances and settings.drop_long and len(ids[0]) > room:
            counts.dropped_long += 1
            return
        sequences, divided = pack(ids, room, divide=not settings.utterances, places=places)
        counts.divided_sentences += divided
        counts.documents[document.split] += 1
        counts.sequences[document.split] += len(sequences)
        counts.tokens[document.split] += sum(map(len, sequences))
        counts.unknown_tokens += sum(part.count(vocabulary.UNKNOWN) for part in sequences)
        flat = np.array([i for part in sequences for i in part])
        occurrences = self._occurrences[document.split]
        occurrences += np.bincount(flat, minlength=len(occurrences))
        self._builders[document.split].add_document(flat, [len(part) for part in sequences])

    def unigram_loss(self) -> float:
        """Return `unigram_loss` of the held-out text."""
        return unigram_loss(*(self._occurrences[split] for split in SPLITS))

    def finish(self) -> None:
        """Write the indices.

        Raises:
            ValueError: a split is empty.
        """
        for split, builder in self._builders.items():
            if not self._counts.sequences[split]:
                raise ValueError(
                    f"there is no {split.replace('_', '-')} text: {self._counts.lines} lines are "
                    "too few, or --held-out-fraction too small; give more text"
                )
            builder.finalize(str(self._folder / f"{split}.idx"))


def _make_tokenizer(settings: Settings, documents: list[Prepared]) -> tokenizers.Tokenizer:
    if settings.tokenizer is not None:
        return vocabulary.load(settings.tokenizer)
    texts = (
        line.text for document in documents if document.split == "train" for line in document.lines
    )
    return vocabulary.train(texts, settings.vocab_size, settings.vocabulary)


def _write(folder: Path, settings: Settings) -> None:
    counts, repetitions = Counts(), pool.Repetitions()
    documents = list(clean(settings, counts, repetitions))
    _make_tokenizer(settings, documents).save(str(folder / vocabulary.FILE))
    tokenizer = vocabulary.load(folder)
    writer = Writer(folder, tokenizer, settings, counts)
    for start in range(0, len(documents), _BATCH_DOCUMENTS):
        writer.add(documents[start : start + _BATCH_DOCUMENTS])
    writer.finish()
    np.save(folder / pool.LINES_FILE, repetitions.fingerprints())
    record = {
        "settings": settings.record(),
        "vocab_size": tokenizer.get_vocab_size(),
        "vocabulary": vocabulary.digest(folder),
        "unigram_loss": writer.unigram_loss(),
        "counts": asdict(counts),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def prepare(settings: Settings, out: Path) -> dict[str, Any]:
    """Make a dataset.

    The text and its fingerprints are held in memory: some gigabytes of text need some more of it.

    Returns:
        Its dataset.json.

    Raises:
        ValueError: a setting or the text cannot be used, or `out` exists.
    """
    settings.check()
    if out.exists():
        raise ValueError(f"--out {out}: exists already; give a new folder, or remove it")
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, settings)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return read_record(out)


def read_record(folder: Path) -> dict[str, Any]:
    """Return a dataset's dataset.json.

    Raises:
        ValueError: it has none.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError) as exc:
        raise ValueError(
            f"{folder}: is no dataset of prepare_text.py ({RECORD}: {exc}); make one with it"
        ) from exc
    return record


def describe(record: dict[str, Any]) -> str:
    """Return what a dataset holds, and everything that was left out of it, in some lines."""
    counts = record["counts"]
    lines = [
        f"{counts['sequences'][split]:,} sequences, {counts['tokens'][split]:,} tokens {split}"
        for split in SPLITS
    ]
    share = counts["spoken_lines"] / max(1, counts["lines"])
    lines.append(f"{counts['lines']:,} lines, {share:.1%} in spoken form")
    lines.append(
        f"left out: {counts['dropped_repetitions']:,} repeated lines, "
        f"{counts['dropped_forbidden']:,} of validation and test sets, "
        f"{counts['dropped_silent']:,} without words, {counts['dropped_long']:,} too long"
    )
    lines.append(
        f"{counts['divided_sentences']:,} sentences divided, "
        f"{counts['unknown_tokens']:,} unknown tokens, vocabulary of {record['vocab_size']:,}"
    )
    lines.append(f"{record['unigram_loss']:.3f} nats by the tokens' frequencies (held-out)")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, help="JSON lines or text")
    add("--out", type=Path, required=True, help="a new folder")
    add("--key", default="text", help="the text of a JSON object (%(default)s)")
    add("--utterances", action="store_true", help="every line is a sequence of its own")
    add("--spoken-share", type=float, default=0.7, help="of the documents (%(default)s)")
    add("--held-out-fraction", type=float, default=0.05, help="of the documents (%(default)s)")
    add("--max-length", type=int, default=64, help="tokens with [CLS] and [SEP] (%(default)s)")
    add("--tokenizer", type=Path, help="tokenizer.json, or a folder with it, in place of training")
    add("--vocabulary", choices=vocabulary.KINDS, default="wordpiece", help="(%(default)s)")
    add("--vocab-size", type=int, default=4096, help="of a trained tokenizer (%(default)s)")
    add("--forbid", type=Path, nargs="+", default=[], help="validation and test sets")
    add("--drop-forbidden", action="store_true", help="leave their utterances out")
    add("--drop-long", action="store_true", help="leave out utterances above --max-length")
    return parser


def main() -> int:
    """Prepare a dataset from the command line."""

    def program() -> None:
        args = vars(_parser().parse_args())
        out = args.pop("out")
        print(describe(prepare(Settings(**args), out)))

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
