"""From Adam to AdamS: optimizer state, and whole checkpoints of Megatron, without Megatron.

Both optimizers keep the same exp_avg, beta1 * exp_avg + (1 - beta1) * grad, so that AdamS goes on
from Adam's; exp_avg_sq is dropped. Called by megatron/ while a checkpoint is loaded, and by cli.py,
which converts one on disk. Imports torch; unpickling a checkpoint imports what its arguments are
made of.
"""

import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

TRACKER = "latest_checkpointed_iteration.txt"
METADATA_WRITTEN_LAST = "metadata.json"
_DROPPED_STATE = ("exp_avg_sq", "max_exp_avg_sq")
# What torch's, TransformerEngine's and Apex's Adam have in a param group, and Megatron has not. The
# run that loads it has hyperparameters of its own.
_OF_ADAM = (
    "amsgrad",
    "betas",
    "bias_correction",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "eps",
    "foreach",
    "fused",
    "maximize",
    "weight_decay",
)
# The mark of AdamS's groups: no Adam has it there.
_OF_ADAMS = "adam_w_mode"
_COPIED_AT_ONCE = 2**24

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


def is_adam_group(group: Mapping[str, Any]) -> bool:
    """Whether an Adam has written this param group of a checkpoint."""
    return _OF_ADAMS not in group and {"betas", "eps"} <= group.keys()


def group_from_adam(group: Mapping[str, Any], *, adam_w_mode: bool | None = None) -> dict[str, Any]:
    """A param group for AdamS from Adam's.

    Kept are the params, the step, the learning rate, and what others have put there (Megatron's
    wd_mult, max_lr, ...). AdamS takes its betas, eps and weight decay from the run that loads it.

    Args:
        group: of a checkpoint; left as it is.
        adam_w_mode: whether weight decay is decoupled; None: as the group says, where it does
            (torch's do), else that it is, which Megatron's command line cannot change.
    """
    kept = {name: value for name, value in group.items() if name not in _OF_ADAM}
    if adam_w_mode is None:
        adam_w_mode = group.get("decoupled_weight_decay", True)
    return {**kept, _OF_ADAMS: adam_w_mode}


def state_dict_from_adam(
    state_dict: Mapping[str, Any], *, adam_w_mode: bool | None = None
) -> dict[str, Any]:
    """A state dict for `AdamS.load_state_dict` from that of an Adam.

    Args:
        state_dict: of torch's, TransformerEngine's or Apex's Adam, or AdamW; left as it is.
        adam_w_mode: as `group_from_adam`.
    Raises:
        ValueError: it is no Adam's, or a parameter with state has no exp_avg.
    """
    groups = state_dict["param_groups"]
    if not all(map(is_adam_group, groups)):
        raise ValueError(
            "this state dict was not written by Adam: each param group must have betas and eps, "
            f"and not {_OF_ADAMS}, which AdamS's have"
        )
    for index, state in state_dict["state"].items():
        if "exp_avg" not in state:
            raise ValueError(
                f"the state of parameter {index} has {sorted(state)}: must have exp_avg, Adam's "
                "momentum, which AdamS goes on from"
            )
    converted: dict[str, Any] = _without_adam(dict(state_dict), adam_w_mode=adam_w_mode)
    return converted


def _without_adam(tree: Any, *, adam_w_mode: bool | None = None) -> Any:
    """A copy of nested dicts and lists with AdamS's param groups, and without exp_avg_sq."""
    if isinstance(tree, dict):
        if is_adam_group(tree):
            return group_from_adam(tree, adam_w_mode=adam_w_mode)
        return {
            key: _without_adam(value, adam_w_mode=adam_w_mode)
            for key, value in tree.items()
            if key not in _DROPPED_STATE
        }
    if isinstance(tree, list):
        return [_without_adam(entry, adam_w_mode=adam_w_mode) for entry in tree]
    return tree


# Checkpoints on disk


class DamagedCheckpointError(RuntimeError):
    """A checkpoint lacks a file or a part of one."""


class Conversion(NamedTuple):
    """What `convert` has done.

    Attributes:
        folder: the checkpoint that was written.
        bytes_before, bytes_after: of all files of the source's checkpoint, and of the new one.
    """

    folder: Path
    bytes_before: int
    bytes_after: int


def is_legacy(folder: Path) -> bool:
    """Whether a checkpoint is of the format torch, and not torch_dist."""
    return any(folder.glob("mp_rank_*"))


def damage(folder: Path) -> str | None:
    """What is missing of a checkpoint, None if nothing is; from metadata and the files' sizes."""
    return _damage_of_legacy(folder) if is_legacy(folder) else _damage_of_torch_dist(folder)


def _damage_of_torch_dist(folder: Path) -> str | None:
    for name in (METADATA_WRITTEN_LAST, ".metadata"):
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


def convert(
    source: Path, destination: Path, *, report: Callable[[str], None] = lambda line: None
) -> Conversion:
    """Write an AdamW checkpoint of Megatron (0.19) as one of AdamS.

    Tensors are copied as they are, in the layout that they were saved in; exp_avg_sq stays behind.
    The new checkpoint appears under its name when it is whole.

    Args:
        source: a folder with the tracker file, whose checkpoint is taken, or an iter_ folder;
            in the formats torch_dist and torch. Only read.
        destination: a folder that does not exist or is empty; gets the checkpoint and a tracker.
        report: is told each file.
    Raises:
        ValueError: there is no checkpoint of Adam's at `source`, or something at `destination`.
        DamagedCheckpointError: the source is not whole.
        OSError: it cannot be read, or the new one cannot be written.
        ImportError: Megatron is not installed, of whose objects the source has some.
    """
    folder = _checkpoint_of(source)
    if (found := damage(folder)) is not None:
        raise DamagedCheckpointError(f"{folder}: {found}; the checkpoint is incomplete")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: must be a new or an empty folder; name another")
    optimizer = _arguments(folder).optimizer
    if optimizer != "adam":
        raise ValueError(
            f"{folder}: was saved with --optimizer {optimizer}; must be adam's"
            + (", and this one needs no conversion" if optimizer == "adams" else "")
        )
    destination.mkdir(parents=True, exist_ok=True)
    written = destination / f".{folder.name}.incomplete"
    try:
        written.mkdir()
        (_convert_legacy if is_legacy(folder) else _convert_torch_dist)(folder, written, report)
        target = written.rename(destination / folder.name)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    step = folder.name.removeprefix("iter_")
    (destination / TRACKER).write_text(str(int(step)) if step.isdecimal() else step)
    return Conversion(target, _size(folder), _size(target))


def saved_optimizer(folder: Path) -> str:
    """The --optimizer that a checkpoint was saved with."""
    return str(_arguments(folder).optimizer)


def _checkpoint_of(source: Path) -> Path:
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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _arguments(folder: Path) -> Any:
    """Megatron's arguments of the run that saved a checkpoint."""
    if is_legacy(folder):
        path = min(folder.glob("mp_rank_*/model_optim_rng.pt"))
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True)["args"]
    metadata = FileSystemReader(folder).read_metadata()
    for index, stored in metadata.storage_data.items():
        if _is_common_state(index.fqn):
            with open(folder / stored.relative_path, "rb") as file:
                file.seek(stored.offset)
                (state,) = _unpickle(file.read(stored.length))
                return state["args"]
    raise DamagedCheckpointError(f"{folder}: has no common state")


def _is_common_state(fqn: str) -> bool:
    return fqn.startswith("common_state/")


def _unpickle(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _convert_torch_dist(source: Path, target: Path, report: Callable[[str], None]) -> None:
    """Copy the stored items of each file, but Adam's own; all else is metadata about them."""
    metadata = FileSystemReader(source).read_metadata()
    by_file: dict[str, list[Any]] = {}
    for index, stored in metadata.storage_data.items():
        by_file.setdefault(stored.relative_path, []).append((index, stored))
    storage_data = {}
    for number, (name, items) in enumerate(sorted(by_file.items()), 1):
        with open(source / name, "rb") as old, open(target / name, "wb") as new:
            for index, stored in sorted(items, key=lambda item: item[1].offset):
                if not set(index.fqn.split(".")).isdisjoint(_DROPPED_STATE):
                    continue
                offset = new.tell()
                old.seek(stored.offset)
                if _is_common_state(index.fqn) or ".optimizer/" in index.fqn:
                    # Megatron stores an object as a list of it.
                    values = _unpickle(old.read(stored.length))
                    new.write(_pickle([_of_adams(value) for value in values]))
                else:
                    _copy(old, new, stored.length)
                stored.offset, stored.length = offset, new.tell() - offset
                storage_data[index] = stored
            _sync(new)
        report(f"[{number}/{len(by_file)}] {name}")
    metadata.storage_data = storage_data
    kept = {index.fqn for index in storage_data}
    metadata.state_dict_metadata = {
        fqn: value for fqn, value in metadata.state_dict_metadata.items() if fqn in kept
    }
    with open(target / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
        _sync(file)
    # What the checkpoint has beside these, and last what says that it is whole.
    for path in sorted(source.iterdir(), key=lambda path: path.name == METADATA_WRITTEN_LAST):
        if path.is_file() and not (target / path.name).exists() and path.name not in by_file:
            shutil.copyfile(path, target / path.name)


def _of_adams(value: Any) -> Any:
    """The common state, or the param groups of a distributed optimizer, as AdamS has them."""
    if "args" not in value:
        return _without_adam(value)
    value["args"].optimizer = "adams"
    return {**value, "optimizer": _without_adam(value["optimizer"])}


def _copy(old: io.BufferedReader, new: io.BufferedWriter, length: int) -> None:
    while length:
        data = old.read(min(length, _COPIED_AT_ONCE))
        new.write(data)
        length -= len(data)


def _sync(file: io.BufferedWriter) -> None:
    # A full disk shows here at the latest.
    file.flush()
    os.fsync(file.fileno())


def _convert_legacy(source: Path, target: Path, report: Callable[[str], None]) -> None:
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    for number, path in enumerate(paths, 1):
        new = target / path.relative_to(source)
        new.parent.mkdir(exist_ok=True)
        value = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        torch.save(_of_adams(value), new)
        report(f"[{number}/{len(paths)}] {path.relative_to(source)}")
