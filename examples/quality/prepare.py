"""Turn Python sources into tokens for a study: train.bin, heldout.bin and meta.json.

    python prepare.py --out FOLDER [--megabytes 36] [--vocab-size 4096] [--text FOLDER ...]
    python prepare.py --out FOLDER --packages packages.txt --vocab-size 50304 --megabytes 34

Without --text and --packages, the sources are the running Python's standard library and installed
packages. --packages downloads the wheels of the packages that a file names, and so gives everyone
the same text. This script needs the package `tokenizers`; the study itself does not.
"""

import argparse
import hashlib
import json
import re
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import wheels
from shared.command import RunError

END_OF_FILE = "<|endoffile|>"
VOCAB_SIZE = 4096
MIN_BYTES, MAX_BYTES = 512, 200_000  # of a file; larger files are mostly tables
MAX_BYTES_PER_LINE = 120  # on average; more is data, not code
HELD_OUT_SHARE = 0.05
# The tokenizer sees this much of the training text. More text would change few merges.
TOKENIZER_BYTES = 16_000_000
# "encodings" has 120 code pages, which are nearly the same file.
SKIPPED_FOLDERS = {"encodings", "__pycache__", "site-packages", "dist-packages"}
# A held-out file is dropped if a larger share of its lines is in the training text.
MAX_SHARE_OF_KNOWN_LINES = 0.5
# Shorter lines ("return None", "else:") are in every file, and show no copy.
MIN_LINE_CHARACTERS = 24


@dataclass(frozen=True)
class Source:
    """A file: its path within the folder that it was found in, and its text."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The digest of the text without white space, so that a reformatted copy has the same."""
        return hashlib.sha256("".join(self.text.split()).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """The training files and the held-out files. No text is in both."""

    train: list[Source]
    held_out: list[Source]


def default_folders() -> list[Path]:
    """Return the folders of the running Python's standard library and packages."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def read_sources(folders: Iterable[Path]) -> list[Source]:
    """Read all Python files in some folders, in the order of their names, each text once.

    Raises:
        ValueError: a folder does not exist.
    """
    sources: dict[str, Source] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: must be a folder with Python files; give one that exists")
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if SKIPPED_FOLDERS.intersection(relative.parts) or not path.is_file():
                continue
            data = path.read_bytes()
            if not MIN_BYTES <= len(data) <= MAX_BYTES:
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if len(data) > MAX_BYTES_PER_LINE * (data.count(b"\n") + 1):
                continue
            source = Source(relative.as_posix(), text)
            sources.setdefault(source.digest, source)
    return list(sources.values())


def read_names(packages: Path) -> list[str]:
    """Return the lines of a file that names packages, without comments.

    Raises:
        ValueError: there is none, or a line is not NAME==VERSION.
    """
    if not packages.is_file():
        raise ValueError(f"{packages}: must be a file with a line NAME==VERSION for each package")
    lines = packages.read_text().splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for name in names:
        if not re.fullmatch(r"[\w.-]+==[\w.]+", name):
            raise ValueError(
                f"{packages}: {name!r}: must be NAME==VERSION, so that all get one text"
            )
    if not names:
        raise ValueError(f"{packages}: must name a package; a line is NAME==VERSION")
    return names


def unpack(wheels: Iterable[Path], out: Path) -> None:
    """Write the Python files of wheels to `out`, each wheel's in a folder."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py"):
                    archive.extract(name, out / wheel.name.partition("-")[0])


def download(packages: Path, out: Path) -> None:
    """Write the Python files of the packages that a file names to the folder `out`.

    Raises:
        ValueError: the file's form is wrong, or pip cannot download a package.
    """
    names = read_names(packages)
    print(f"downloads {len(names)} packages", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = wheels.download(names, Path(folder))
        except RunError as exc:
            what = f"{packages}: must name what pip can download"
            raise ValueError(
                f"{what}; give --text with folders of Python files instead: {exc}"
            ) from exc
        unpack(found, out)


def _lines(source: Source) -> set[str]:
    """Return the lines that are long enough to show where they come from."""
    stripped = (line.strip() for line in source.text.splitlines())
    return {line for line in stripped if len(line) >= MIN_LINE_CHARACTERS}


def split_sources(sources: Sequence[Source], max_bytes: int) -> Split:
    """Divide files into training and held-out ones, in the order of their digests.

    A held-out file is dropped if most of its lines are in the training text: it is an edited copy.

    Args:
        sources: the files, each text once.
        max_bytes: files are taken up to this many bytes.
    """
    train, held_out, size = [], [], 0
    for source in sorted(sources, key=lambda source: source.digest):
        if size >= max_bytes:
            break
        size += len(source.text.encode())
        # The digest's end, because the files are sorted by its beginning.
        is_held_out = int(source.digest[-8:], 16) < HELD_OUT_SHARE * 2**32
        (held_out if is_held_out else train).append(source)
    known: set[str] = set()
    for source in train:
        known |= _lines(source)
    kept = []
    for source in held_out:
        lines = _lines(source)
        if len(lines & known) <= MAX_SHARE_OF_KNOWN_LINES * len(lines):
            kept.append(source)
    return Split(train, kept)


def train_tokenizer(sources: Sequence[Source], vocab_size: int = VOCAB_SIZE):
    """Train a byte-level BPE with `vocab_size` tokens; END_OF_FILE is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts, size = [], 0
    for source in sources:
        if size >= TOKENIZER_BYTES:
            break
        texts.append(source.text)
        size += len(source.text)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, sources: Sequence[Source], max_tokens: int) -> tuple[np.ndarray, int, int]:
    """Encode files until max_tokens are reached. The last file is left out if it does not fit.

    Returns:
    (tokens,) uint16 with an end-of-file token after each file, the number of bytes, and the number
    of files.
    """
    parts, num_tokens, num_bytes, num_files = [], 0, 0, 0
    for start in range(0, len(sources), 256):
        batch = sources[start : start + 256]
        for source, encoding in zip(
            batch, tokenizer.encode_batch_fast([source.text for source in batch]), strict=True
        ):
            if num_tokens + len(encoding.ids) + 1 > max_tokens:
                return np.concatenate(parts), num_bytes, num_files
            parts.append(np.array([*encoding.ids, 0], dtype=np.uint16))
            num_tokens += len(parts[-1])
            num_bytes += len(source.text.encode()) + 1
            num_files += 1
    return np.concatenate(parts), num_bytes, num_files


def prepare(
    folders: Sequence[Path], out: Path, max_bytes: int, vocab_size: int = VOCAB_SIZE
) -> dict[str, object]:
    """Write train.bin, heldout.bin (uint16) and meta.json, together at most `max_bytes`.

    Returns:
        The contents of meta.json. A loss in nats per token, divided by `held_out_bytes_per_token`,
        is one in nats per byte. An end of file counts as one byte.

    Raises:
        ValueError: a folder does not exist, or there is too little text.
    """
    max_tokens = (max_bytes - 4096) // 2
    # On Python sources, this tokenizer has fewer than four bytes per token.
    split = split_sources(read_sources(folders), max_bytes=4 * max_tokens)
    if not split.train or not split.held_out:
        raise ValueError(
            f"{len(split.train)} training and {len(split.held_out)} held-out files: must be at "
            "least one of each; give folders with more Python files"
        )
    tokenizer = train_tokenizer(split.train, vocab_size)
    held_out, held_out_bytes, held_out_files = encode(
        tokenizer, split.held_out, int(max_tokens * HELD_OUT_SHARE)
    )
    train, train_bytes, train_files = encode(tokenizer, split.train, max_tokens - len(held_out))
    out.mkdir(parents=True, exist_ok=True)
    train.tofile(out / "train.bin")
    held_out.tofile(out / "heldout.bin")
    meta = {
        "vocab_size": vocab_size,
        "train_tokens": len(train),
        "train_files": train_files,
        "train_bytes_per_token": round(train_bytes / len(train), 4),
        "held_out_tokens": len(held_out),
        "held_out_files": held_out_files,
        "held_out_bytes_per_token": round(held_out_bytes / len(held_out), 4),
        "sha256": hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest(),
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def main() -> int:
    """Prepare from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder that is written")
    parser.add_argument("--megabytes", type=float, default=36, help="at most (%(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, help="tokens to learn (%(default)s)"
    )
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--text", type=Path, nargs="+", help="folders with Python files (this Python's own)"
    )
    sources.add_argument(
        "--packages", type=Path, help="a file with a line NAME==VERSION for each package"
    )
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as unpacked:
            folders = args.text or default_folders()
            if args.packages is not None:
                folders = [Path(unpacked)]
                download(args.packages, *folders)
            meta = prepare(folders, args.out, int(args.megabytes * 1e6), args.vocab_size)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(json.dumps(meta, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
