"""Turn text into Megatron's indexed dataset, one token per byte, and measure its bigram entropy.

train.py and sweep.py call `prepare`; run alone, it prints where the dataset is:

    python prepare_data.py [--text FILE_OR_FOLDER] [--out FOLDER]

Tokens are Megatron's NullTokenizer with 257 ids: 0 to 255 for the bytes, 256 for the end of a
document. Megatron's own ByteLevelTokenizer is not reachable from `--tokenizer-type` in 0.19, and
takes byte 0 for its end of document."""

import argparse
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.corpus import folder_files, is_binary
from shared.indexed import indexed_dataset_builder

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "runs" / "data"

MIN_BYTES = 64 * 1024
MAX_BYTES = 1024**3
# Part of the hash that names a dataset: raise it when the same text would give another dataset.
FORMAT_VERSION = 1

# Folders that the default corpus leaves out. Many Python packages lack "test", "tests" and
# "idle_test". The 120 code pages in "encodings" are nearly the same file, so a split by file would
# put the same text into the training and the held-out part.
SKIPPED_STDLIB_FOLDERS = {
    "site-packages",
    "dist-packages",
    "encodings",
    "test",
    "tests",
    "idle_test",
}
SKIPPED_STDLIB_PREFIX = "_sysconfigdata"  # settings of this machine's build, not text


@dataclass(frozen=True)
class Document:
    """A file or a part of one. It is never divided between training and held-out text."""

    name: str
    data: bytes


@dataclass(frozen=True)
class TextStatistics:
    """Sizes in tokens (bytes, and one end of document per file), and entropies in nats per token.

    `*_entropy` is the held-out text's own: no unigram or bigram table, not even one fitted to the
    held-out text, can have a lower loss on it. `*_cross_entropy` is the loss on the held-out text
    of a table fitted to the training text, with one added to every count."""

    train_tokens: int
    held_out_tokens: int
    unigram_entropy: float
    unigram_cross_entropy: float
    bigram_entropy: float
    bigram_cross_entropy: float


@dataclass(frozen=True)
class Dataset:
    """Paths of a prepared dataset (prefixes, without .bin and .idx) and what was measured on it."""

    train_prefix: Path
    held_out_prefix: Path
    statistics: TextStatistics


def read_file(path: Path) -> bytes:
    """Read a file; a user's unreadable file is a ValueError with its path."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ValueError(
            f"{path}: cannot be read ({exc.strerror}); give another --text, or its rights"
        ) from exc


def standard_library_files() -> list[Path]:
    """List the Python sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_STDLIB_FOLDERS.intersection(path.relative_to(root).parts[:-1])
        and not path.name.startswith(SKIPPED_STDLIB_PREFIX)
    ]


def read_documents(text: Path | None) -> list[Document]:
    """Read the corpus: a file, the text files of a folder, or (None) the Python standard library.

    Empty files, files that are not text and repeated files are left out. The order is the same on
    every machine.

    Raises:
        ValueError: the path is missing, unreadable or not text, or what it holds is too little or
            too much.
    """
    if text is None:
        root, paths = Path(sysconfig.get_path("stdlib")), standard_library_files()
    elif text.is_dir():
        root, paths = text, folder_files(text)
    elif text.is_file():
        root, paths = text.parent, [text]
    else:
        raise ValueError(
            f"--text {text}: no such file or folder; without --text, the Python standard library "
            "is used"
        )

    # The key is a hash of the contents, so a repeated file is not in both the training and the
    # held-out text.
    documents: dict[bytes, Document] = {}
    num_bytes = 0
    for path in paths:
        num_bytes += path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise ValueError(
                f"{text or root}: more than {MAX_BYTES:,} bytes; this example reads its text into "
                "memory, use tools/preprocess_data.py of Megatron-LM for a larger corpus"
            )
        data = read_file(path)
        if data and not is_binary(data):
            document = Document(path.relative_to(root).as_posix(), data)
            documents.setdefault(hashlib.sha256(data).digest(), document)
    num_bytes = sum(len(document.data) for document in documents.values())
    if num_bytes < MIN_BYTES:
        raise ValueError(
            f"{text or root}: {num_bytes:,} bytes of text in {len(documents)} files; at least "
            f"{MIN_BYTES:,} bytes are needed to train on and to hold out; give more --text"
        )
    return list(documents.values())


def split_documents(
    documents: list[Document], held_out_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Split documents into training and held-out text, whole files on one side each.

    Files go to the held-out text in the order of their hashes while they fit. If none fits (one
    file, or few large ones), the largest file is divided at the end of a line, and its last part is
    held out.

    Raises:
        ValueError: held_out_fraction is not in (0, 0.5].
    """
    if not 0 < held_out_fraction <= 0.5:
        raise ValueError(f"held_out_fraction={held_out_fraction}: must be in (0, 0.5]")
    budget = int(held_out_fraction * sum(len(document.data) for document in documents))
    held_out: list[Document] = []
    for document in sorted(documents, key=lambda item: hashlib.sha256(item.data).digest()):
        if len(document.data) <= budget:
            held_out.append(document)
            budget -= len(document.data)
    if held_out:
        return [document for document in documents if document not in held_out], held_out

    largest = max(documents, key=lambda item: len(item.data))
    cut = largest.data.find(b"\n", len(largest.data) - budget) + 1
    if cut in (0, len(largest.data)):  # no line ends there
        cut = len(largest.data) - budget
    train = [document for document in documents if document is not largest]
    train.append(Document(largest.name, largest.data[:cut]))
    return train, [Document(f"{largest.name} (end)", largest.data[cut:])]


def tokenize(data: bytes) -> np.ndarray:
    """Return (len(data) + 1,) uint16 tokens: the bytes and an end of document."""
    tokens = np.empty(len(data) + 1, dtype=np.uint16)
    tokens[:-1] = np.frombuffer(data, dtype=np.uint8)
    tokens[-1] = END_OF_DOCUMENT
    return tokens


def count_bigrams(documents: Iterable[Document]) -> np.ndarray:
    """Return (VOCAB_SIZE, VOCAB_SIZE) float64 counts of [token, next token].

    A document's first byte follows an end of document, so that every token is counted once as a
    next token."""
    counts = np.zeros(VOCAB_SIZE * VOCAB_SIZE, dtype=np.int64)
    for document in documents:
        tokens = tokenize(document.data).astype(np.int64)
        previous = np.concatenate(([END_OF_DOCUMENT], tokens[:-1]))
        counts += np.bincount(previous * VOCAB_SIZE + tokens, minlength=counts.size)
    return counts.reshape(VOCAB_SIZE, VOCAB_SIZE).astype(np.float64)


def cross_entropy(counts: np.ndarray, table: np.ndarray) -> float:
    """Return the loss, in nats per token, of predicting `counts` from a table of counts.

    Args:
        counts: (contexts, vocabulary); how often each token follows each context in the predicted
            text.
        table: the same shape; the counts that the predictions are made from. It is 0 only where
            `counts` is 0.
    """
    seen = counts > 0
    probability = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    return float(-(counts[seen] * np.log(probability[seen])).sum() / counts.sum())


def measure(train: list[Document], held_out: list[Document]) -> TextStatistics:
    """Measure sizes and entropies of a split."""
    train_bigrams, bigrams = count_bigrams(train), count_bigrams(held_out)
    train_unigrams = train_bigrams.sum(axis=0, keepdims=True)
    unigrams = bigrams.sum(axis=0, keepdims=True)
    return TextStatistics(
        train_tokens=int(train_bigrams.sum()),
        held_out_tokens=int(bigrams.sum()),
        unigram_entropy=cross_entropy(unigrams, unigrams),
        unigram_cross_entropy=cross_entropy(unigrams, train_unigrams + 1),
        bigram_entropy=cross_entropy(bigrams, bigrams),
        bigram_cross_entropy=cross_entropy(bigrams, train_bigrams + 1),
    )


def write_indexed_dataset(prefix: Path, documents: Iterable[Document]) -> None:
    """Write prefix.bin and prefix.idx, one document a file."""
    builder = indexed_dataset_builder(prefix, VOCAB_SIZE)
    for document in documents:
        tokens = tokenize(document.data)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def corpus_hash(documents: list[Document], held_out_fraction: float) -> str:
    """Return a hash of everything that the dataset depends on."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {held_out_fraction}\n".encode())
    for document in documents:
        digest.update(f"{hashlib.sha256(document.data).hexdigest()} {document.name}\n".encode())
    return digest.hexdigest()


def prepare(text: Path | None, out: Path = DEFAULT_OUT, held_out_fraction: float = 0.05) -> Dataset:
    """Build the dataset of a text in a folder in `out`, or find it there.

    A hash of the text names the folder, so changed text makes another folder. Otherwise an old
    dataset could be read, or an old index: Megatron stores indexes with the dataset and finds them
    by path, not by contents.

    Raises:
        ValueError: the text or held_out_fraction cannot be used.
    """
    documents = read_documents(text)
    train, held_out = split_documents(documents, held_out_fraction)
    folder = out.resolve() / corpus_hash(documents, held_out_fraction)[:16]
    description = folder / "dataset.json"
    if not description.exists():
        # Built under another name and then renamed, so that an existing folder is complete.
        building = folder.with_name(f"building-{os.getpid()}")
        building.mkdir(parents=True)
        try:
            write_indexed_dataset(building / "train", train)
            write_indexed_dataset(building / "held_out", held_out)
            record = {
                "text": "Python standard library" if text is None else str(text),
                "held_out_files": [document.name for document in held_out],
                "statistics": asdict(measure(train, held_out)),
            }
            (building / description.name).write_text(json.dumps(record, indent=2) + "\n")
            os.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    statistics = TextStatistics(**json.loads(description.read_text())["statistics"])
    return Dataset(folder / "train", folder / "held_out", statistics)


def describe(dataset: Dataset) -> str:
    """Return what was prepared in one line."""
    stats = dataset.statistics
    return (
        f"{stats.train_tokens:,} training and {stats.held_out_tokens:,} held-out tokens (bytes); "
        f"held-out entropy in nats a byte: unigram {stats.unigram_entropy:.3f}, "
        f"bigram {stats.bigram_entropy:.3f}"
    )


def main() -> int:
    """Prepare a dataset from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--text",
        type=Path,
        help="a text file, or a folder of them; default: this Python's standard library",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="where datasets are kept (%(default)s)"
    )
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.05,
        help="the part of the text that is not trained on (%(default)s)",
    )
    args = parser.parse_args()
    try:
        dataset = prepare(args.text, args.out, args.held_out_fraction)
    except ValueError as exc:
        print(f"prepare_data.py: {exc}", file=sys.stderr)
        return 2
    print(f"{dataset.train_prefix.parent}: {describe(dataset)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
