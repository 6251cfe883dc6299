"""Read and write pools of unlabelled utterances, a batch at a time.

A pool is a file of JSON lines, {"text": ...} each (it may be a .gz), or an Arrow file or a folder
of Hugging Face's `datasets` with a column "text". A pool with labels is refused: it would be a
labelled set by mistake, whose labels nobody would see being ignored."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from pool import read_objects

BATCH = 10_000
LABELS = ("intent", "slots", "label", "labels", "tags", "ner_tags", "domain")
"""Names under which labels are kept."""


def _refuse_labels(place: str, names: Iterable[str]) -> None:
    if found := [name for name in names if name in LABELS]:
        raise ValueError(
            f"{place}: has {', '.join(map(repr, found))}: a pool with labels; a pool must have the "
            "text alone; remove them, or give the file with --labelled"
        )


def _arrow_batches(path: Path, size: int) -> Iterator[list[str]]:
    import datasets  # seconds, which JSON lines need not wait for

    try:
        read = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_file
        dataset = read(str(path))
    except Exception as exc:  # of pyarrow or datasets, whose errors have no base class in common
        what = f"cannot be read ({exc}): must be an Arrow file or a folder of datasets"
        raise ValueError(f"{path}: {what}; make it with pool_prepare.py") from exc
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or "text" not in names:
        raise ValueError(f"{path}: has the columns {names}: must have 'text'; give one split")
    _refuse_labels(str(path), names)
    for batch in dataset.select_columns(["text"]).iter(batch_size=size):
        yield batch["text"]


def _json_batches(path: Path, size: int) -> Iterator[list[str]]:
    texts: list[str] = []
    for place, entry in read_objects(path):
        _refuse_labels(place, entry)
        texts.append(entry["text"])
        if len(texts) == size:
            yield texts
            texts = []
    if texts:
        yield texts


def read_batches(path: Path, size: int = BATCH) -> Iterator[Sequence[str]]:
    """Yield the texts of a pool, `size` at a time; an Arrow file stays on the disk.

    Raises:
        ValueError: it cannot be read, or it has labels.
    """
    is_arrow = path.is_dir() or path.suffix == ".arrow"
    return _arrow_batches(path, size) if is_arrow else _json_batches(path, size)


def read_texts(path: Path) -> list[str]:
    """Read a pool that fits into memory.

    Raises:
        ValueError: see `read_batches`.
    """
    return [text for batch in read_batches(path) for text in batch]


def read_all(paths: Sequence[Path], size: int = BATCH) -> Iterator[Sequence[str]]:
    """Yield the texts of several pools."""
    for path in paths:
        yield from read_batches(path, size)


class ArrowWriter:
    """Writes an Arrow stream, which `datasets.Dataset.from_file` maps into memory.

    The file appears under its name when it is complete.

    Args:
        schema: of pyarrow.
    """

    def __init__(self, path: Path, schema: Any) -> None:
        import pyarrow

        self.path = path
        self.schema = schema
        self.num_rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished = path.with_name(f"{path.name}.unfinished")
        self.stack = ExitStack()
        sink = self.stack.enter_context(pyarrow.OSFile(str(self.unfinished), "wb"))
        self.stream = self.stack.enter_context(pyarrow.ipc.new_stream(sink, schema))

    def __enter__(self) -> "ArrowWriter":
        return self

    def write(self, columns: Sequence[Any]) -> None:
        """Write a batch: a list or an array for each column."""
        import pyarrow

        if len(columns[0]):
            self.stream.write_batch(pyarrow.record_batch(list(columns), schema=self.schema))
            self.num_rows += len(columns[0])

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        self.stack.close()
        if kind is None:
            self.unfinished.rename(self.path)
        else:
            self.unfinished.unlink()


def write_pool(path: Path, batches: Iterable[Sequence[str]]) -> int:
    """Write a pool as an Arrow file, and return how many utterances it has."""
    import pyarrow

    with ArrowWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
        for texts in batches:
            writer.write([list(texts)])
    return writer.num_rows
