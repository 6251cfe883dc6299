"""Pools of unlabelled text: how they are read, cleaned of repetitions, and kept apart from tests.

A pool's file is JSON lines with a "text" in each object, which is a document; or plain text, where
an empty line ends a document. Either may be a .gz. Nothing here imports Megatron."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from spoken import spoken_form

_JSON_LINES = {".jsonl", ".json", ".ndjson"}
# A sentence ends where one of these is followed by a space and by what a sentence begins with.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")

LINES_FILE = "lines.npy"
"""In a dataset's folder: `fingerprint` of each of its lines, sorted."""


@dataclass(frozen=True)
class Line:
    """A sentence or an utterance, and where it comes from.

    Attributes:
        number: of the line in the file, from 1 on.
    """

    text: str
    file: Path
    number: int

    @property
    def place(self) -> str:
        """The file and the line, for messages."""
        return f"{self.file}, line {self.number}"


Document = list[Line]


def _open_lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode()
    except OSError as exc:
        raise ValueError(f"{path}: cannot be read ({exc}); give JSON lines or text") from exc
    except UnicodeDecodeError as exc:
        raise ValueError(
            f"{path}: is not UTF-8 (byte 0x{exc.object[exc.start]:02x}); convert it, with "
            "iconv -f LATIN1 -t UTF-8 for one"
        ) from exc


def _json_object(place: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as exc:
        raise ValueError(f"{place}: is no JSON ({exc.msg}); give one object a line") from exc
    return entry if isinstance(entry, dict) else {}


def _text_of(place: str, entry: dict[str, Any], key: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: has no string {key!r}: each object must have one; correct the line, or name "
            "another key where the command has --key"
        )
    return text


def read_objects(path: Path, key: str = "text") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line of a file of JSON lines that is not empty.

    Raises:
        ValueError: it cannot be read, is no UTF-8, or a line has no text.
    """
    for number, line in _open_lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            entry = _json_object(place, line)
            _text_of(place, entry, key)
            yield place, entry


def _is_json_lines(path: Path) -> bool:
    return Path(str(path).removesuffix(".gz")).suffix in _JSON_LINES


def read_documents(path: Path, key: str = "text") -> Iterator[Document]:
    """Read a file's documents: each is the lines of its text that are not empty.

    Raises:
        ValueError: it cannot be read, is no UTF-8, or a line has no text.
    """
    document: Document = []
    for number, raw in _open_lines(path):
        if _is_json_lines(path):
            place = f"{path}, line {number}"
            text = _text_of(place, _json_object(place, raw), key) if raw.strip() else ""
            lines = text.splitlines()
            document = [Line(line.strip(), path, number) for line in lines if line.strip()]
        elif raw.strip():
            document.append(Line(raw.strip(), path, number))
            continue
        if document:
            yield document
        document = []
    if document:
        yield document


def split_sentences(document: Document) -> Document:
    """Divide a document's lines into sentences: at a full stop before a capital or a digit."""
    return [
        Line(sentence, line.file, line.number)
        for line in document
        for sentence in _SENTENCE_END.split(line.text)
    ]


def fingerprint(text: str) -> int:
    """Return 64 bits of a line's spoken form, by which repetitions are found."""
    return fingerprint_of_spoken(spoken_form(text))


def fingerprint_of_spoken(form: str) -> int:
    """Return the fingerprint of the texts that have this spoken form."""
    return _hash(form)


def _hash(text: str, salt: str = "") -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}{text}".encode()).digest()[:8], "big")


def chosen(text: str, share: float, salt: str) -> bool:
    """Choose a share of all texts, each always in the same way.

    Args:
        salt: choices of different salts do not depend on each other.
    """
    return _hash(text, salt) < share * 2**64


class Repetitions:
    """Leaves out lines that were there before in the same spoken form, and counts them."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.num_dropped = 0

    def without(self, document: Document) -> Document:
        """Return the lines of a document that are new."""
        new: Document = []
        for line in document:
            mark = fingerprint(line.text)
            if mark in self._seen:
                self.num_dropped += 1
            else:
                self._seen.add(mark)
                new.append(line)
        return new

    def fingerprints(self) -> np.ndarray:
        """Return all lines' fingerprints, sorted, as (n,) uint64."""
        return np.sort(np.fromiter(self._seen, np.uint64, len(self._seen)))


@dataclass(frozen=True)
class Forbidden:
    """The utterances of validation and test sets, which no pool may hold.

    Attributes:
        places: the fingerprint of each, and where it is.
    """

    places: dict[int, str]

    @classmethod
    def read(cls, files: Sequence[Path], key: str = "text") -> "Forbidden":
        """Read the utterances of files like a pool's."""
        lines = (
            line for path in files for document in read_documents(path, key) for line in document
        )
        return cls({fingerprint(line.text): line.place for line in lines})

    def without(self, document: Document) -> Document:
        """Return the lines of a document that are not forbidden."""
        return [line for line in document if fingerprint(line.text) not in self.places]

    def check(self, document: Document) -> None:
        """Raise ValueError if a line is an utterance of a test set, as written or as spoken."""
        for line in document:
            if place := self.places.get(fingerprint(line.text)):
                raise ValueError(
                    f"{line.place}: {line.text!r} is in a validation or test set ({place}), as "
                    "written or as spoken; no such utterance may be in an unlabelled pool: take it "
                    "out, or let --drop-forbidden leave it out"
                )


def check_no_leak(folders: Iterable[Path], files: Sequence[Path], key: str = "text") -> int:
    """Check finished datasets against validation and test sets.

    Args:
        folders: datasets of prepare_text.py.
        files: JSON lines or text with the utterances.

    Returns:
        How many utterances were looked for.

    Raises:
        ValueError: a dataset holds one of them, or has no list of its lines.
    """
    forbidden = Forbidden.read(files, key)
    marks = np.fromiter(forbidden.places, np.uint64, len(forbidden.places))
    for folder in folders:
        path = folder / LINES_FILE
        if not path.is_file():
            raise ValueError(f"{path}: is missing; prepare the dataset with prepare_text.py")
        found = marks[np.isin(marks, np.load(path))]
        if len(found):
            raise ValueError(
                f"{folder}: holds {len(found)} utterances of validation or test sets, as written "
                f"or as spoken; the first is at {forbidden.places[int(found[0])]}; prepare it "
                "again with --forbid, and with --drop-forbidden to leave them out"
            )
    return len(marks)
