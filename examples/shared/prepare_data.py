"""Turn text into a dataset of Megatron's: prepare_data.py of pretrain_gpt2 and pretrain_llama2.

A dataset is a folder: train and held_out, which are indexed datasets of Megatron's, the tokenizer,
and dataset.json, which says what was made of what. Several processes tokenize. A preparation that
was interrupted goes on where it was, and a folder that has its name is complete."""

import argparse
import fcntl
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared import tokenizer as tokenizers
from shared.command import Flags, exit_code_of
from shared.corpus import Unit, documents, is_held_out, list_files, make_units, num_cores
from shared.indexed import indexed_dataset_builder

RECORD = "dataset.json"
SPLITS = ("train", "held_out")

# Part of what an interrupted preparation compares: raise it when the same text would give another
# dataset.
_FORMAT_VERSION = 1
# A tokenizer is trained on at most this much text: more changes it little.
_TRAINING_SAMPLE_BYTES = 256 * 2**20
_BATCH_BYTES = 4 * 2**20
_MIN_VOCAB_SIZE = 257  # every byte, and the end of a document


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        text: files and folders.
        key: the text of a JSON object.
        tokenizer: the user's, or None to train one of `vocab_size`.
        held_out_fraction: of the documents.
    """

    text: list[Path]
    key: str
    tokenizer: Path | None
    vocab_size: int
    held_out_fraction: float

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if not 0 < self.held_out_fraction <= 0.5:
            raise ValueError(
                f"--held-out-fraction {self.held_out_fraction}: must be above 0 and at most 0.5"
            )
        if self.tokenizer is None and self.vocab_size < _MIN_VOCAB_SIZE:
            raise ValueError(
                f"--vocab-size {self.vocab_size}: must be at least {_MIN_VOCAB_SIZE}: a token for "
                "every byte and one for the end of a document"
            )


@dataclass
class Counts:
    """What a part of a dataset holds, by split."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def add(self, other: "Counts") -> None:
        """Add another part's."""
        for mine, theirs in zip(
            (self.documents, self.tokens, self.bytes),
            (other.documents, other.tokens, other.bytes),
            strict=True,
        ):
            for split in SPLITS:
                mine[split] += theirs[split]


def dataset_record(folder: Path) -> dict[str, Any]:
    """Return what dataset.json says.

    Raises:
        ValueError: the folder holds no dataset.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as exc:
        raise ValueError(
            f"--data {folder}: holds no {RECORD} that can be read ({exc}); give a folder that "
            "prepare_data.py has made"
        ) from exc
    return dict(record)


def dataset_flags(folder: Path) -> Flags:
    """Return Megatron's flags that train on a prepared dataset.

    Raises:
        ValueError: the folder holds no dataset.
    """
    record, folder = dataset_record(folder), folder.resolve()
    flags = {"train-data-path": folder / "train", "valid-data-path": folder / "held_out"}
    flags |= record["tokenizer"]["flags"]
    return flags | {"tokenizer-model": folder / flags["tokenizer-model"]}


@dataclass(frozen=True)
class _Worker:
    """What a process needs to turn units into parts."""

    folder: Path
    key: str
    held_out_fraction: float
    vocab_size: int
    end_of_document: int

    def part(self, index: int) -> Path:
        """Return where a part is described, once it is complete."""
        return self.folder / "parts" / f"{index:06d}.json"

    def write(self, index: int, unit: Unit, encoder: tokenizers.Encoder) -> None:
        """Tokenize a unit into a part: an indexed dataset for each split, and then its counts."""
        prefix = self.part(index).with_suffix("")
        builders = {
            split: indexed_dataset_builder(
                prefix.with_name(f"{prefix.name}-{split}"), self.vocab_size
            )
            for split in SPLITS
        }
        counts = Counts()
        for batch in _batches(text for piece in unit for text in documents(piece, self.key)):
            for text, ids in zip(batch, encoder.encode(batch), strict=True):
                split = SPLITS[is_held_out(text, self.held_out_fraction)]
                ids.append(self.end_of_document)
                builders[split].add_document(ids, [len(ids)])
                counts.documents[split] += 1
                counts.tokens[split] += len(ids)
                counts.bytes[split] += len(text.encode())
        for split, builder in builders.items():
            builder.finalize(str(prefix.with_name(f"{prefix.name}-{split}.idx")))
        writing = prefix.with_suffix(".writing")
        writing.write_text(json.dumps(asdict(counts)))
        os.rename(writing, self.part(index))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_in_process: list[tuple[_Worker, tokenizers.Encoder]] = []


def _start_process(worker: _Worker) -> None:
    # The processes are what runs in parallel.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _in_process.append((worker, tokenizers.Encoder(worker.folder)))


def _write_in_process(task: tuple[int, Unit]) -> int:
    worker, encoder = _in_process[0]
    worker.write(*task, encoder)
    return task[0]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Have one process at a time work on a folder.

    Raises:
        ValueError: another one does.
    """
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ValueError(f"{folder}: another process prepares this dataset now") from exc
        yield


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Write down what is prepared, or compare it with what an interrupted preparation wrote.

    Raises:
        ValueError: the text or the settings have changed since.
    """
    path = folder / "plan.json"
    plan = json.loads(json.dumps(plan))
    if path.exists():
        begun = json.loads(path.read_text())
        differing = [name for name in plan if begun.get(name) != plan[name]]
        if differing:
            raise ValueError(
                f"{folder}: was begun with other {', '.join(differing)}; remove it to start again"
            )
        return
    writing = folder / "plan.writing"
    writing.write_text(json.dumps(plan))
    os.rename(writing, path)


def _make_tokenizer(
    settings: Settings, units: list[Unit], folder: Path, report: Callable[[str], None]
) -> tokenizers.TokenizerRecord:
    """Train or take the tokenizer, or find the one that is there already."""
    description = folder / "tokenizer.json"
    if description.exists():
        return tokenizers.TokenizerRecord(**json.loads(description.read_text()))
    target = folder / tokenizers.FOLDER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if settings.tokenizer is not None:
        record = tokenizers.take(settings.tokenizer, target)
    else:
        report(f"training a tokenizer of {settings.vocab_size:,} tokens ...")
        record = tokenizers.train(_training_sample(settings, units), settings.vocab_size, target)
        if record.vocab_size < settings.vocab_size:
            report(
                f"the text has pairs for {record.vocab_size:,} tokens only; that is the vocabulary"
            )
    writing = folder / "tokenizer.writing"
    writing.write_text(json.dumps(asdict(record)))
    os.rename(writing, description)
    return record


def _training_sample(settings: Settings, units: list[Unit]) -> Iterator[str]:
    """Give training documents from all over the corpus, up to _TRAINING_SAMPLE_BYTES."""
    num_bytes = 0
    # Every n-th unit first, then those between.
    stride = max(1, len(units) // 8)
    order = [index for first in range(stride) for index in range(first, len(units), stride)]
    for index in order:
        for piece in units[index]:
            for text in documents(piece, settings.key):
                if is_held_out(text, settings.held_out_fraction):
                    continue
                yield text
                num_bytes += len(text.encode())
                if num_bytes >= _TRAINING_SAMPLE_BYTES:
                    return


def _tokenize(
    worker: _Worker, units: list[Unit], num_workers: int, report: Callable[[str], None]
) -> None:
    """Write the parts that are missing."""
    (worker.folder / "parts").mkdir(exist_ok=True)
    tasks = [(index, unit) for index, unit in enumerate(units) if not worker.part(index).exists()]
    there = len(units) - len(tasks)
    if there:
        report(f"going on: {there} of {len(units)} parts are there")
    start = time.monotonic()

    def done(count: int) -> None:
        left_s = (time.monotonic() - start) / count * (len(tasks) - count)
        report(f"tokenized {there + count} of {len(units)} parts, {left_s:.0f} s left")

    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        encoder = tokenizers.Encoder(worker.folder)
        for count, task in enumerate(tasks, 1):
            worker.write(*task, encoder)
            done(count)
        return
    # Spawned: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_workers, _start_process, (worker,)) as pool:
        for count, _ in enumerate(pool.imap_unordered(_write_in_process, tasks), 1):
            done(count)


def _merge(worker: _Worker, num_parts: int) -> Counts:
    """Put the parts together, in the order of the text, and return what they hold."""
    counts = Counts()
    parts = [Counts(**json.loads(worker.part(index).read_text())) for index in range(num_parts)]
    for part in parts:
        counts.add(part)
    for split in SPLITS:
        builder = indexed_dataset_builder(worker.folder / split, worker.vocab_size)
        # add_index collects garbage each time, which takes half a second in what torch and Megatron
        # have left in memory: more than the copying.
        gc.freeze()
        for index, part in enumerate(parts):
            if part.documents[split]:
                prefix = worker.part(index).with_suffix("")
                builder.add_index(str(prefix.with_name(f"{prefix.name}-{split}")))
        gc.unfreeze()
        builder.finalize(str(worker.folder / f"{split}.idx"))
    return counts


def prepare(
    settings: Settings, out: Path, num_workers: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Make a dataset.

    It is built in a folder beside `out`, which is renamed at the end.

    Args:
        report: gets lines of progress.

    Returns:
        What is in its dataset.json.

    Raises:
        ValueError: `out` exists, or the text or the settings cannot be used.
    """
    import megatron_adams  # torch comes with it: seconds, which reading a dataset need not wait for

    settings.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists already; give a new folder, or remove this one")
    corpus = list_files(settings.text)
    units = make_units(corpus)
    folder = out.with_name(f"{out.name}.building")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        plan = {
            "version": _FORMAT_VERSION,
            "text": corpus.files,
            "key": settings.key,
            "tokenizer": str(settings.tokenizer or settings.vocab_size),
            "held-out fraction": settings.held_out_fraction,
        }
        _begin(folder, plan)
        tokenizer = _make_tokenizer(settings, units, folder, report)
        worker = _Worker(
            folder=folder,
            key=settings.key,
            held_out_fraction=settings.held_out_fraction,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
        )
        _tokenize(worker, units, num_workers, report)
        report("putting the parts together ...")
        counts = _merge(worker, len(units))
        if empty := [split for split in SPLITS if not counts.documents[split]]:
            num_documents = sum(counts.documents.values())
            shutil.rmtree(folder)
            raise ValueError(
                f"--text {', '.join(map(str, settings.text))}: of its {num_documents} documents "
                f"none is {' and none is '.join(empty).replace('_', ' ')}; give more text, or "
                f"another --held-out-fraction than {settings.held_out_fraction}"
            )
        record = {
            "text": [str(path) for path in settings.text],
            "key": settings.key,
            "files": len(corpus.files),
            "skipped_files": corpus.skipped,
            "held_out_fraction": settings.held_out_fraction,
            **asdict(counts),
            "tokenizer": asdict(tokenizer),
            "made_by": f"megatron-adams {megatron_adams.__version__}",
        }
        shutil.rmtree(folder / "parts")
        for name in ("plan.json", "tokenizer.json", "lock", tokenizers.ENCODER):
            (folder / name).unlink(missing_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        os.rename(folder, out)
    return record


def describe(record: dict[str, Any]) -> str:
    """Return what was prepared in a few lines."""
    tokens, num_bytes = record["tokens"], record["bytes"]
    lines = [
        f"{tokens[split]:,} tokens in {record['documents'][split]:,} documents, "
        f"{num_bytes[split] / tokens[split]:.2f} bytes a token: {name}"
        for split, name in (("train", "to train on"), ("held_out", "held out"))
    ]
    lines.append(
        f"tokenizer: {record['tokenizer']['description']}, "
        f"{record['tokenizer']['vocab_size']:,} tokens"
    )
    if record["skipped_files"]:
        lines.append(f"left out, because they are not text: {len(record['skipped_files'])} files")
    return "\n".join(lines)


def main(default_vocab_size: int, argv: Sequence[str] | None = None) -> int:
    """Prepare a dataset from the command line; 2 for what the user has to change."""
    parser = argparse.ArgumentParser(
        description="Turn text into a dataset that train.py takes as --data. An interrupted "
        "preparation goes on when it is started again."
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        help="text files, JSON lines (.jsonl, .json: a document a line), both also as .gz, and "
        "folders of them",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the dataset")
    parser.add_argument(
        "--key", default="text", help="the text in a JSON object (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="a folder with tokenizer.json, with GPT-2's vocab.json and merges.txt or with "
        "Llama 2's tokenizer.model, or one of these files; default: a byte-level BPE is trained on "
        "the text",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"of the tokenizer that is trained (default: {default_vocab_size:,})",
    )
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.005,
        help="of the documents, which are not trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=num_cores(), help="processes (default: one a core)"
    )
    args = parser.parse_args(argv)

    def program() -> None:
        if args.tokenizer is not None and args.vocab_size is not None:
            raise ValueError("--vocab-size: --tokenizer has its own; leave one of them out")
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers}: must be at least 1")
        settings = Settings(
            text=args.text,
            key=args.key,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size or default_vocab_size,
            held_out_fraction=args.held_out_fraction,
        )
        record = prepare(
            settings,
            args.out.absolute(),
            args.workers,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(f"{args.out}:\n{describe(record)}")

    return exit_code_of(program)
