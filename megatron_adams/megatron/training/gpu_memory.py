"""--adams-log-gpu-memory: the memory of every rank's GPU in Megatron's log, TensorBoard and W&B.

What NVML says is in use on the GPU, by all processes, beside what torch's allocator has had at
most: the difference is what NCCL, CUDA contexts and other processes take. log.py calls
`prepare` before a step and `log` after Megatron's log.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.training.utils import print_rank_last

from megatron_adams.megatron.training.writers import head_of_line, write_scalars
from megatron_adams.nvml import Nvml, NvmlError, Unanswered, session

logger = logging.getLogger(__name__)

FLAG = "--adams-log-gpu-memory"
NAME = "adams_log_gpu_memory"
RANGE, RANKS = "range", "ranks"
_GIB = 2**30
# Scalar -> the words of the log line, in the order of `_own_bytes`.
_COLUMNS = {
    "gpu-memory-used-bytes": "in use (NVML)",
    "torch-max-allocated-bytes": "torch max allocated",
    "torch-max-reserved-bytes": "torch max reserved",
}
_NOT_KNOWN = -1


@dataclass
class _Source:
    """Where this rank's numbers come from.

    Attributes:
        is_prepared: `prepare` has been here.
        nvml: open until the process ends: to start it takes up to a second.
        uuid: of this rank's GPU; None: there is none.
    """

    is_prepared: bool = False
    nvml: Nvml | None = None
    uuid: str | None = None
    stack: ExitStack = field(default_factory=ExitStack)


_source = _Source()


def add_argument(group: Any) -> None:
    """Add the flag to a group of Megatron's parser."""
    group.add_argument(
        FLAG,
        nargs="?",
        choices=(RANGE, RANKS),
        const=RANGE,
        help="Log the memory of the GPUs at the log interval: what NVML says is in use, beside "
        "torch's max_memory_allocated and max_memory_reserved; the least and the most of all "
        "ranks, or with 'ranks' also each rank's. For every optimizer.",
    )


def own_gpu() -> str | None:
    """CUDA's UUID of this rank's GPU or MIG instance; None in a CPU rehearsal.

    Not an index: NVML counts all GPUs in another order, whatever CUDA_VISIBLE_DEVICES shows.
    """
    device = torch.cuda.current_device()
    if torch.empty(0, dtype=torch.uint8, device=device).device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def prepare(args: argparse.Namespace) -> None:
    """Before the first step: find this rank's GPU, or say that there is none.

    Raises:
        ValueError: NVML does not answer, or does not know the GPU.
    """
    if _source.is_prepared or _mode(args) is None:
        return
    _source.is_prepared = True
    uuid = own_gpu()
    if uuid is None:
        print_rank_last(f" {FLAG}: no GPU here (CPU rehearsal), no memory of one is logged")
        return
    try:
        nvml = _source.stack.enter_context(session())
    except NvmlError as exc:
        raise ValueError(f"{FLAG}: {exc.reason}; {exc.remedy}, or remove the flag") from exc
    memory = nvml.memory_of(uuid)
    if isinstance(memory, Unanswered):
        raise ValueError(
            f"{FLAG}: NVML does not say the memory of this rank's GPU {uuid}: {memory.reason}; "
            f"megatron-adams doctor says more; or remove the flag"
        )
    _source.nvml, _source.uuid = nvml, uuid


def log(args: argparse.Namespace, iteration: int, *, is_first: bool) -> None:
    """Write the memory of all ranks; to be called on all of them.

    Args:
        iteration: that Megatron has just logged, or not, as its interval says.
        is_first: of this run: Megatron logs it, too, on the screen alone.
    """
    is_due = iteration % args.log_interval == 0
    if _source.uuid is None or not (is_due or is_first):
        return
    device = torch.cuda.current_device()
    own = torch.tensor(_own_bytes(), dtype=torch.int64, device=device)
    # It has one dimension, as gloo demands where the ranks' tensors have one.
    num_values = torch.distributed.get_world_size() * len(_COLUMNS)
    gathered = torch.empty(num_values, dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(gathered, own)
    rows: list[list[int]] = gathered.view(-1, len(_COLUMNS)).tolist()
    for line in _lines(args, iteration, rows):
        print_rank_last(line)
    if not is_due:
        return
    write_scalars(_scalars(rows, each=_mode(args) == RANKS), iteration)


def _mode(args: argparse.Namespace) -> str | None:
    # A namespace that Megatron's parser has not made may lack it.
    mode: str | None = getattr(args, NAME, None)
    return mode


def _own_bytes() -> list[int]:
    assert _source.nvml is not None and _source.uuid is not None
    memory = _source.nvml.memory_of(_source.uuid)
    if isinstance(memory, Unanswered):
        # A GPU that does not tell its memory is no reason to end a job that trains.
        logger.warning("%s: this rank's GPU: %s", FLAG, memory.reason)
    used = _NOT_KNOWN if isinstance(memory, Unanswered) else memory.used
    return [used, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]


def _lines(
    args: argparse.Namespace, iteration: int, rows: Sequence[Sequence[int]]
) -> Iterator[str]:
    head = f"{head_of_line(args, iteration)} GPU memory, GiB |"
    columns = zip(_COLUMNS.values(), zip(*rows, strict=True), strict=True)
    yield head + "".join(f" {name}: {_range(column)} |" for name, column in columns)
    if _mode(args) == RANKS:
        for rank, row in enumerate(rows):
            cells = zip(_COLUMNS.values(), row, strict=True)
            yield f"   rank {rank:5d} |" + "".join(f" {name}: {_gib(x)} |" for name, x in cells)


def _range(column: Sequence[int]) -> str:
    """ "1.50 to 2.25 on rank 3", of the ranks whose number is known."""
    known = [value for value in column if value != _NOT_KNOWN]
    if not known:
        return _gib(_NOT_KNOWN)
    words = f"{_gib(min(known))} to {_gib(max(known))} on rank {column.index(max(known))}"
    num_unknown = len(column) - len(known)
    return words + (f", not known on {num_unknown} of {len(column)} ranks" if num_unknown else "")


def _gib(num_bytes: int) -> str:
    return "not known" if num_bytes == _NOT_KNOWN else f"{num_bytes / _GIB:.3f}"


def _scalars(rows: Sequence[Sequence[int]], *, each: bool) -> dict[str, int]:
    """The names and values for TensorBoard and W&B, in bytes."""
    scalars = {}
    for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=True):
        known = {rank: value for rank, value in enumerate(column) if value != _NOT_KNOWN}
        if known:
            scalars[f"adams/{name}/min"] = min(known.values())
            scalars[f"adams/{name}/max"] = max(known.values())
        if each:
            scalars |= {f"adams/{name}/rank-{rank}": value for rank, value in known.items()}
    return scalars
