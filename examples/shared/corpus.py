"""Read a corpus: text files and JSON lines, in pieces that worker processes share.

Nothing here imports Megatron."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

UNIT_BYTES = 32 * 2**20
"""How much text a worker takes at once: its progress is kept in steps of this size."""

TEXT_DOCUMENT_BYTES = 256 * 1024
"""A text file is a document. A larger one is divided at line ends into documents of this size, so
that some of it can be held out."""

_JSON_LINES = {".jsonl", ".json", ".ndjson"}


@dataclass(frozen=True)
class Piece:
    """The lines of a file whose first byte is in [start, end); end is None for the whole file."""

    path: str
    start: int
    end: int | None


Unit = list[Piece]


@dataclass
class Corpus:
    """What is read.

    Attributes:
        files: path, size in bytes and modification time of each file, in their order.
        skipped: files of folders that are not text.
    """

    files: list[tuple[str, int, int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def _is_json_lines(path: str) -> bool:
    return Path(path.removesuffix(".gz")).suffix in _JSON_LINES


def _open(path: str) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.endswith(".gz") else open(path, "rb")
    except OSError as exc:
        raise ValueError(f"{path}: cannot be read ({exc.strerror})") from exc


def is_binary(data: bytes) -> bool:
    """Tell text from other files as git does: a NUL among the first 8,000 bytes."""
    return b"\0" in data[:8000]


def folder_files(folder: Path) -> list[Path]:
    """List the files below a folder, without hidden files and hidden folders."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _begins_as_binary(path: str) -> bool:
    with _open(path) as file:
        try:
            return is_binary(file.read(8000))
        except (OSError, EOFError) as exc:  # gzip's
            raise ValueError(f"{path}: cannot be read as gzip ({exc})") from exc


def list_files(paths: Sequence[Path]) -> Corpus:
    """List the files of a corpus: those given, and those below a folder that is given.

    Hidden and empty files of folders are left out, and so are files that are not text.

    Raises:
        ValueError: a path is missing or unreadable, a file that was named is not text, or there is
            nothing to read.
    """
    corpus = Corpus()
    for given in paths:
        if given.is_dir():
            found = folder_files(given)
        elif given.is_file():
            found = [given]
        else:
            raise ValueError(f"--text {given}: no such file or folder")
        for path in found:
            if _begins_as_binary(str(path)):
                if path == given:
                    raise ValueError(
                        f"--text {given}: is not text (a NUL is among its first 8,000 bytes); "
                        "give UTF-8 text or JSON lines, unpacked or as .gz; iconv converts UTF-16"
                    )
                corpus.skipped.append(str(path))
            elif (status := path.stat()).st_size:
                corpus.files.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
    if not corpus.files:
        given_paths = ", ".join(map(str, paths))
        raise ValueError(
            f"--text {given_paths}: holds no text; the files are empty or none is text"
        )
    return corpus


def make_units(corpus: Corpus) -> list[Unit]:
    """Divide a corpus into units of about UNIT_BYTES: parts of large files, several small files."""
    units: list[Unit] = []
    unit: Unit = []
    room = UNIT_BYTES
    for path, size, _ in corpus.files:
        whole = path.endswith(".gz")  # cannot be read from the middle
        for start in range(0, 1 if whole else size, UNIT_BYTES):
            piece = Piece(path, start, None if whole else min(start + UNIT_BYTES, size))
            num_bytes = size if piece.end is None else piece.end - start
            if unit and num_bytes > room:
                units.append(unit)
                unit, room = [], UNIT_BYTES
            unit.append(piece)
            room -= num_bytes
    return [*units, unit]


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Give each line of a piece with the place of its first byte in the file."""
    with _open(piece.path) as file:
        if piece.start:
            # A line that begins before the piece belongs to the one before.
            file.seek(piece.start - 1)
            file.readline()
        position = file.tell()
        while piece.end is None or position < piece.end:
            line = file.readline()
            if not line:
                return
            yield position, line
            position += len(line)


def _decode(path: str, position: int, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ValueError(
            f"{path}: is not UTF-8 at byte {position + exc.start} (0x{data[exc.start]:02x}); "
            f"convert it, with iconv -f LATIN1 -t UTF-8 for one, or leave the file out"
        ) from exc


def _json_document(path: str, position: int, line: bytes, key: str) -> str:
    text = _decode(path, position, line)
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ValueError(
            f"{path}: the line at byte {position} is no JSON ({exc.msg}); a .jsonl or .json "
            "file has an object a line"
        ) from exc
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: the line at byte {position} is no JSON object")
    if key not in entry:
        raise ValueError(
            f"{path}: the object at byte {position} has no {key!r}, but "
            f"{', '.join(map(repr, entry)) or 'nothing'}; name the text with --key"
        )
    if not isinstance(entry[key], str):
        raise ValueError(f"{path}: {key!r} of the object at byte {position} is no string")
    return str(entry[key])


def documents(piece: Piece, key: str) -> Iterator[str]:
    """Give the documents of a piece; those without text are left out.

    Args:
        key: the text of a JSON object.

    Raises:
        ValueError: a file is no UTF-8 or no JSON lines, or an object has no such text.
    """
    if _is_json_lines(piece.path):
        for position, line in _lines(piece):
            if line.strip():
                text = _json_document(piece.path, position, line, key)
                if text.strip():
                    yield text
        return
    first, lines, num_bytes = 0, [], 0
    for position, line in _lines(piece):
        if not lines:
            first = position
        lines.append(line)
        num_bytes += len(line)
        if num_bytes >= TEXT_DOCUMENT_BYTES:
            yield from _text_document(piece.path, first, lines)
            lines, num_bytes = [], 0
    yield from _text_document(piece.path, first, lines)


def _text_document(path: str, position: int, lines: list[bytes]) -> Iterator[str]:
    text = _decode(path, position, b"".join(lines))
    if text.strip():
        yield text


def is_held_out(document: str, fraction: float) -> bool:
    """Say on which side a document is, by a hash of its text: a repeated one is on one side."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
