"""Megatron's checkpoints on disk: their formats, what is missing of one, who has saved it.

Imports torch; unpickling a checkpoint imports what its arguments are made of.
"""

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

TRACKER = "latest_checkpointed_iteration.txt"
METADATA_WRITTEN_LAST = "metadata.json"
# Where Megatron before 0.19 has what is in common_state since, in the format torch_dist.
COMMON_FILE = "common.pt"
# The key of Megatron's arguments, in every format.
_ARGUMENTS = "args"
# What unpickling raises on bytes that are no pickle, or half of one (Python's documentation).
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint lacks a file or a part of one."""


def is_legacy(folder: Path) -> bool:
    """Whether a checkpoint is of the format torch, and not torch_dist."""
    return any(folder.glob("mp_rank_*"))


def is_fsdp_dtensor(folder: Path) -> bool:
    """Whether a checkpoint is of Megatron-FSDP's format, whose .metadata is written last."""
    if is_legacy(folder) or (folder / METADATA_WRITTEN_LAST).exists():
        return False
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except (FileNotFoundError, *_UNREADABLE):
        return False
    # The format torch_dist has them inside an object; it may have lost METADATA_WRITTEN_LAST.
    return _ARGUMENTS in metadata.state_dict_metadata


def damage(folder: Path) -> str | None:
    """What is missing of a checkpoint, None if nothing is; from metadata and the files' sizes."""
    if is_legacy(folder):
        return _damage_of_legacy(folder)
    written_last = () if is_fsdp_dtensor(folder) else (METADATA_WRITTEN_LAST,)
    for name in (*written_last, ".metadata"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except _UNREADABLE as exc:
        return f".metadata is unreadable ({exc})"
    sizes: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        end = stored.offset + stored.length
        sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    for name, size in sorted(sizes.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def _damage_of_legacy(folder: Path) -> str | None:
    # Zip archives, whose index comes last.
    for model_parallel_rank in sorted(folder.glob("mp_rank_*")):
        model = model_parallel_rank / "model_optim_rng.pt"
        for path in sorted({model, *model_parallel_rank.glob("*.pt")}):
            if not path.is_file():
                return f"{path.relative_to(folder)} is missing"
            if not zipfile.is_zipfile(path):
                return f"{path.relative_to(folder)} is truncated"
    return None


def checkpoint_in(source: Path) -> Path:
    """The folder of a checkpoint, from that itself or from the one with the tracker file.

    Raises:
        ValueError: there is none.
    """
    tracker = source / TRACKER
    if tracker.is_file():
        text = tracker.read_text().strip()
        source = source / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not source.is_dir() or not (
        is_legacy(source) or any(source.glob("*.distcp")) or (source / ".metadata").exists()
    ):
        raise ValueError(
            f"{source}: must be a checkpoint folder of Megatron (iter_0001000, in the format "
            f"torch_dist or torch), or the folder with {TRACKER} beside it"
        )
    return source


def saved_arguments(folder: Path, *, weights_only: bool = True) -> Any:
    """Megatron's arguments of the run that saved a checkpoint, None where it has none.

    Args, Raises: as `common_state`.
    """
    return common_state(folder, weights_only=weights_only).get(_ARGUMENTS)


def common_state(folder: Path, *, weights_only: bool = True) -> Mapping[str, Any]:
    """What all ranks have saved alike: "args", "iteration" and others, empty where there is none.

    Args:
        folder: of a checkpoint that is whole.
        weights_only: as of torch.load, which then unpickles only what Megatron has registered;
            False: anything, so that Megatron need not have been started.
    Returns:
        Of the format fsdp_dtensor "args" alone.
    Raises:
        ImportError, AttributeError: they are made of objects of a Megatron that is not installed.
        pickle.UnpicklingError: of objects that are not registered.
    """
    if is_legacy(folder):
        path = min(folder.glob("mp_rank_*/model_optim_rng.pt"))
        return dict(load(path, weights_only=weights_only))
    if (folder / COMMON_FILE).is_file():
        return dict(load(folder / COMMON_FILE, weights_only=weights_only))
    metadata = FileSystemReader(folder).read_metadata()
    for index, stored in metadata.storage_data.items():
        if index.fqn == _ARGUMENTS:
            return {_ARGUMENTS: read(folder, stored, weights_only=weights_only)}
        if is_common_state(index.fqn):
            (state,) = read(folder, stored, weights_only=weights_only)
            return dict(state)
    return {}


def load(path: Path, *, weights_only: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


def read(folder: Path, stored: Any, *, weights_only: bool = False) -> Any:
    """An object or a tensor of a torch_dist checkpoint, from where its metadata say it is."""
    with open(folder / stored.relative_path, "rb") as file:
        file.seek(stored.offset)
        return unpickle(file.read(stored.length), weights_only=weights_only)


def is_common_state(fqn: str) -> bool:
    return fqn.startswith("common_state/")


def unpickle(data: bytes, *, weights_only: bool = False) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=weights_only)
