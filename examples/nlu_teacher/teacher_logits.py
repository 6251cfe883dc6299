"""A teacher's logits on disk: distillation without the teacher in memory.

    torchrun ... -m megatron_adams.launch teacher_logits.py --teacher TEACHER --top-k 64 \\
        --out LOGITS [the flags of distil_encoder.py]
    torchrun ... -m megatron_adams.launch distil_encoder.py --teacher-logits LOGITS [the same flags]

The largest K logits of every position that is to be told are written once, in the order in which
training reads its samples. Training gives no probability to the other tokens. With all tokens kept,
it computes the same bits as with the teacher beside the student."""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encoder
import encoder_training
import numpy as np
import torch
from encoder_training import Batch
from masked_dataset import NO_LABEL
from megatron.core import mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import print_rank_0
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_train_valid_test_num_samples
from teacher import Teacher, check_teacher
from torch import Tensor

RECORD = "teacher_logits.json"
_FORMAT_VERSION = 1


def _data_paths(args: argparse.Namespace) -> list[str]:
    return [str(word) for word in args.train_data_path or args.data_path or []]


def samples_record(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides which samples a training reads, and their order."""
    return {
        "format": _FORMAT_VERSION,
        "vocabulary": encoder_training.description_of(args).vocabulary,
        "data": _data_paths(args),
        "samples": get_train_valid_test_num_samples()[0],
        "seq_length": args.seq_length,
        "mask_prob": args.mask_prob,
        "seed": args.seed,
    }


@dataclasses.dataclass(frozen=True)
class Files:
    """The arrays of a folder.

    Attributes:
        starts: (samples + 1,) int64; the rows of sample i are starts[i] to starts[i + 1].
        ids: (rows, k) int32, of the largest logits.
        logits: (rows, k) fp32, or the bits of bf16 as int16.
    """

    starts: np.ndarray
    ids: np.ndarray
    logits: np.ndarray

    @classmethod
    def open(cls, folder: Path, starts: np.ndarray, k: int, is_bf16: bool, mode: str) -> "Files":
        """Map the arrays, with mode "r" or "r+" or "w+" of numpy.memmap."""
        shape = (int(starts[-1]), k)
        dtype = np.int16 if is_bf16 else np.float32
        return cls(
            starts,
            np.memmap(folder / "ids.bin", np.int32, mode, shape=shape),
            np.memmap(folder / "logits.bin", dtype, mode, shape=shape),
        )


def num_bytes(rows: int, k: int, is_bf16: bool) -> int:
    """Return what the logits take on disk."""
    return rows * k * (4 + (2 if is_bf16 else 4))


class StoredLogits:
    """A folder's logits, in the place of a `Teacher`.

    Raises:
        ValueError: there are none, or they are of other samples than training reads.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        try:
            record = json.loads((folder / RECORD).read_text())
        except (OSError, json.JSONDecodeError) as exc:
            raise ValueError(
                f"--teacher-logits {folder}: holds none ({exc}); write them with teacher_logits.py"
            ) from exc
        expected = samples_record(args)
        differing = [
            name for name in expected if record["samples_record"].get(name) != expected[name]
        ]
        if differing:
            difference = ", ".join(
                f"{name} {record['samples_record'].get(name)} and not {expected[name]}"
                for name in differing
            )
            raise ValueError(
                f"--teacher-logits {folder}: were written for {difference}; give the flags that "
                "they were written with, or write them again"
            )
        starts = np.load(folder / "starts.npy")
        self._is_bf16 = bool(record["is_bf16"])
        self._files = Files.open(folder, starts, record["k"], self._is_bf16, "r")
        self._columns = args.padded_vocab_size // mpu.get_tensor_model_parallel_world_size()
        self._first = self._columns * mpu.get_tensor_model_parallel_rank()

    def __call__(self, batch: Batch) -> tuple[None, Tensor]:
        """See `teacher.Targets`: -inf for tokens that were not kept."""
        starts = self._files.starts
        rows = np.concatenate(
            [np.arange(starts[n], starts[n + 1]) for n in batch.numbers.cpu().numpy()]
        )
        assert len(rows) == len(batch.positions)
        device = batch.tokens.device
        ids = torch.from_numpy(self._files.ids[rows]).to(device).long() - self._first
        kept = torch.from_numpy(self._files.logits[rows]).to(device)
        logits = kept.view(torch.bfloat16).float() if self._is_bf16 else kept
        # One column more takes what belongs to other ranks' columns.
        ids = torch.where((ids >= 0) & (ids < self._columns), ids, self._columns)
        dense = torch.full(
            (len(rows), self._columns + 1), -torch.inf, dtype=torch.float32, device=device
        )
        return None, dense.scatter_(1, ids, logits)[:, :-1]


def _count_rows(dataset: encoder_training.Numbered, num_samples: int) -> np.ndarray:
    counts = [int((dataset[i]["labels"] != NO_LABEL).sum()) for i in range(num_samples)]
    return np.concatenate([[0], np.cumsum(counts)])


def _micro_batches(
    dataset: encoder_training.Numbered, num_samples: int, size: int
) -> Iterator[Batch]:
    """The micro-batches of this data-parallel rank, as training divides them."""
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    for start in range(rank * size, num_samples, ranks * size):
        samples = [dataset[i] for i in range(start, min(start + size, num_samples))]
        stacked = torch.utils.data.default_collate(samples)
        moved = {name: value.cuda() for name, value in stacked.items()}
        yield encoder_training.make_batch(
            moved["tokens"], moved["labels"], moved["number"], trim=True
        )


def _write_batch(files: Files, batch: Batch, logits: Tensor, k: int) -> None:
    largest = torch.topk(logits, k, dim=1)
    rows = np.concatenate(
        [np.arange(files.starts[n], files.starts[n + 1]) for n in batch.numbers.cpu().numpy()]
    )
    values = largest.values
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    files.ids[rows] = largest.indices.cpu().numpy()
    files.logits[rows] = values.cpu().numpy()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--out {folder}: the logits take {needed:,} bytes and {free:,} are free; give a "
            "smaller --top-k, fewer --train-iters, or another disk"
        )


def write(args: argparse.Namespace) -> None:
    """Write a teacher's logits for all samples of a training.

    Raises:
        ValueError: the folder is there, or the disk is too small.
    """
    record = samples_record(args)
    # Every rank counts: the masks are the same everywhere.
    dataset = _build_everywhere(record["samples"])
    starts = _count_rows(dataset, record["samples"])
    is_bf16 = args.params_dtype == torch.bfloat16
    needed = num_bytes(int(starts[-1]), args.top_k, is_bf16)
    print_rank_0(
        f"> {record['samples']:,} samples have {starts[-1]:,} positions; their {args.top_k} "
        f"largest logits take {needed:,} bytes"
    )
    unfinished = args.out.with_name(f"{args.out.name}.unfinished")
    if args.rank == 0:
        unfinished.mkdir(parents=True, exist_ok=True)
        _check_room(unfinished, needed)
        np.save(unfinished / "starts.npy", starts)
        Files.open(unfinished, starts, args.top_k, is_bf16, "w+")
    torch.distributed.barrier()
    files = Files.open(unfinished, starts, args.top_k, is_bf16, "r+")
    teacher = Teacher(args.teacher)
    for batch in _micro_batches(dataset, record["samples"], args.micro_batch_size):
        _, shard = teacher(batch)
        logits = gather_from_tensor_model_parallel_region(shard)[:, : args.vocab_size]
        if mpu.get_tensor_model_parallel_rank() == 0:
            _write_batch(files, batch, logits, args.top_k)
    files.ids.flush()
    files.logits.flush()
    torch.distributed.barrier()
    if args.rank == 0:
        contents = {"samples_record": record, "k": args.top_k, "is_bf16": is_bf16}
        contents["teacher"] = str(encoder.checkpoint_folder(args.teacher))
        (unfinished / RECORD).write_text(json.dumps(contents, indent=2) + "\n")
        os.rename(unfinished, args.out)
    torch.distributed.barrier()


def _build_everywhere(num_samples: int) -> encoder_training.Numbered:
    sizes = get_train_valid_test_num_samples()
    dataset = encoder_training.build_datasets([num_samples, *sizes[1:]], on_every_rank=True)[0]
    assert dataset is not None
    return dataset


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of writing."""
    parser.add_argument("--teacher", type=Path, required=True, help="a model's folder")
    parser.add_argument("--top-k", type=int, required=True, help="logits of a position")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what the logits cannot be written with."""
    check_teacher(args.teacher, args)
    if not 1 <= args.top_k <= args.vocab_size:
        raise ValueError(f"--top-k {args.top_k}: must be from 1 to {args.vocab_size}, all tokens")
    if args.pipeline_model_parallel_size > 1:
        raise ValueError("--pipeline-model-parallel-size: must be 1 to write a teacher's logits")
    if args.out.exists():
        raise ValueError(f"--out {args.out}: exists already; give a new folder, or remove it")


if __name__ == "__main__":
    args = encoder_training.parse_args(add_arguments)
    check(args)
    initialize_megatron()
    write(args)
