"""Read CoNLL files of named entities into the labelled utterances of the teacher recipe.

    python conll.py --train eng.train --validation eng.testa --test eng.testb --out labelled

Inputs: text files with a word a line, its columns separated by spaces or tabs, the word first and
its tag last; an empty line ends a sentence. Tags are O, B-name and I-name. An I- that continues no
entity begins one, so that the older IOB1 is read as well. Lines of -DOCSTART- are left out, and so
are comments: lines that begin with "# " and do not end with a tag. Outputs, in --out: train.jsonl,
validation.jsonl, test.jsonl and split.json, as labelled.py writes them.

A sentence has no intent, so all get the intent "sentence": train with --task ner. Its few-shot
subsets have as many sentences as shots. Sentences of which nothing is spoken are left out and
counted.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from labelled import SPLITS, Malformed, Utterance, from_chunks, write_splits
from labels import spans_of, spoken_words

INTENT = "sentence"
_TAG = re.compile(r"O|[BI]-\S+")
_DOCUMENT = "-DOCSTART-"

Row = tuple[str, str]  # a word and its tag


def _rows(path: Path) -> Iterator[tuple[str, Row | None]]:
    """Yield a file's words with their tags and places, and None where a sentence ends."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        remedy = "give a file in UTF-8 with a word and its tag a line"
        raise ValueError(f"{path}: cannot be read ({exc}); {remedy}") from exc
    for number, line in enumerate(lines, 1):
        place, columns = f"{path}:{number}", line.split()
        if not columns or columns[0] == _DOCUMENT:
            yield place, None
            continue
        is_tag = _TAG.fullmatch(columns[-1])
        if line.startswith("# ") and not is_tag:
            continue
        if len(columns) < 2 or not is_tag:
            rule = "must be a word and, last, its tag: O, B-name or I-name"
            remedy = "correct the line; tags of BIOES or BILOU must be turned into BIO first"
            raise Malformed(place, line[:60], rule, remedy)
        yield place, (columns[0], columns[-1])
    yield f"{path}:{len(lines)}", None


def _sentence(rows: Sequence[Row], place: str) -> Utterance:
    words, tags = zip(*rows, strict=True)
    chunks: list[tuple[str, str | None]] = []
    spans = {start: (name, end) for name, start, end in spans_of(tags)}
    index = 0
    while index < len(words):
        name, end = spans.get(index, (None, index + 1))
        if chunks:
            chunks.append((" ", None))
        chunks.append((" ".join(words[index:end]), name))
        index = end
    return from_chunks(chunks, INTENT, place)


def read_conll(path: Path) -> tuple[list[Utterance], int]:
    """Read a file's sentences; return also how many were left out, as nothing of them is spoken.

    Raises:
        ValueError: it cannot be read, or a line is malformed.
    """
    sentences, num_silent = [], 0
    rows: list[Row] = []
    first = ""
    for place, row in _rows(path):
        if row is not None:
            first = first if rows else place
            rows.append(row)
        elif rows:
            sentence = _sentence(rows, first)
            if spoken_words(sentence.text):
                sentences.append(sentence)
            else:
                num_silent += 1
            rows = []
    return sentences, num_silent


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SPLITS:
        parser.add_argument(f"--{name}", type=Path, required=True, help="a CoNLL file")
    parser.add_argument("--out", type=Path, required=True, help="results")
    args = parser.parse_args(argv)
    try:
        splits, silent = {}, {}
        for name in SPLITS:
            splits[name], silent[name] = read_conll(getattr(args, name))
        summary = write_splits(splits, args.out)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    for name, counts in summary.items():
        figures = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        print(f"{name}: {figures}, {silent[name]:,} left out as nothing of them is spoken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
