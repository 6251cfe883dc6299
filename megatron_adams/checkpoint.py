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
from torch import Tensor
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
# Where Megatron before 0.19 has what is in common_state since, in the format torch_dist.
_COMMON_FILE = "common.pt"
# The key of Megatron's arguments in the format fsdp_dtensor.
_FSDP_ARGUMENTS = "args"
# Objects with an optimizer's param groups, or (dp_zero_gather_scatter) with all its tensors.
_OPTIMIZER_OBJECTS = (".optimizer/", ".param_state/")
# With the name of the param behind it: its main param, in the format fully_reshardable.
_MAIN_PARAM = "optimizer.state.param."

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
        adam_w_mode: whether weight decay is decoupled. None: the group's own flag if it has one, as
            torch's Adam has; otherwise decoupled, which is Megatron's only mode.
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


def continued_from_adam(num_restored: int, num_params: int, step: int) -> str:
    """The line of the log that says what a run has taken from Adam."""
    return (
        f"adams: goes on from Adam's step {step}: momentum and main params of {num_restored} of "
        f"{num_params} parameters of this rank restored, exp_avg_sq dropped"
    )


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


def contradict(weights: Tensor, main_params: Tensor) -> bool:
    """Whether weights cannot be main params that were rounded, because most of them differ.

    Main params that stock Adam saved as fully_reshardable are shifted, and so belong to other
    weights, wherever a bucket is padded at its end and another follows (Megatron 0.19:
    DistributedOptimizer.get_parameter_state_dp_zero drops the padding that param_index_map counts).

    Args:
        weights: floating, what the model computes with.
        main_params: fp32, of the same shape.
    """
    main_params = main_params.to(weights.device)
    # Four times what rounding to fp8 (e4m3) changes, as --fp8-param-gather does, and fp16's
    # smallest number. Of values that have nothing to do with each other four in five differ so.
    differ = (weights.float() - main_params).abs() > main_params.abs() / 4 + 2.0**-24
    return 2 * int(differ.sum()) > differ.numel()


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


def is_fsdp_dtensor(folder: Path) -> bool:
    """Whether a checkpoint is of Megatron-FSDP's format, whose .metadata is written last."""
    if is_legacy(folder) or (folder / METADATA_WRITTEN_LAST).exists():
        return False
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except (FileNotFoundError, *_UNREADABLE):
        return False
    # The format torch_dist has them inside an object; it may have lost METADATA_WRITTEN_LAST.
    return _FSDP_ARGUMENTS in metadata.state_dict_metadata


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
        ValueError: there is no checkpoint of Adam's at `source`, or none that has its state, or
            something at `destination`.
        DamagedCheckpointError: the source is not whole, or its main params are not its weights'.
        OSError: it cannot be read, or the new one cannot be written.
        ImportError: Megatron is not installed, of whose objects the source has some.
    """
    folder = _checkpoint_of(source)
    if (found := damage(folder)) is not None:
        raise DamagedCheckpointError(f"{folder}: {found}; the checkpoint is incomplete")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: must be a new or an empty folder; name another")
    if destination.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{destination}: is inside the source, which is only read; name another")
    if is_fsdp_dtensor(folder):
        raise ValueError(
            f"{folder}: is of the format fsdp_dtensor; must be of torch_dist or torch; let the run "
            f"take it, with --adams-from-adam"
        )
    if (unfit := unfit_for_adams(saved_arguments(folder, weights_only=False))) is not None:
        raise ValueError(f"{folder}: {unfit}")
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


def unfit_for_adams(args: Any) -> str | None:
    """Why AdamS cannot go on from a checkpoint as from Adam's, None if it can.

    Args:
        args: see `saved_arguments`.
    """
    optimizer = getattr(args, "optimizer", None)
    if optimizer == "adams":
        return "was saved with --optimizer adams; must be adam's, and this one needs no conversion"
    if optimizer != "adam":
        return f"was saved with --optimizer {optimizer}; must be adam's"
    if getattr(args, "no_save_optim", False):
        return "was saved with --no-save-optim: there is no momentum to go on from"
    return None


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


def saved_arguments(folder: Path, *, weights_only: bool = True) -> Any:
    """Megatron's arguments of the run that saved a checkpoint, None where it has none.

    Args:
        folder: of a checkpoint that is whole.
        weights_only: as of torch.load, which then unpickles only what Megatron has registered;
            False: anything, so that Megatron need not have been started.
    Raises:
        ImportError, AttributeError: they are made of objects of a Megatron that is not installed.
        pickle.UnpicklingError: of objects that are not registered.
    """
    if is_legacy(folder):
        path = min(folder.glob("mp_rank_*/model_optim_rng.pt"))
        return _load(path, weights_only=weights_only).get("args")
    if (folder / _COMMON_FILE).is_file():
        return _load(folder / _COMMON_FILE, weights_only=weights_only).get("args")
    metadata = FileSystemReader(folder).read_metadata()
    for index, stored in metadata.storage_data.items():
        if index.fqn == _FSDP_ARGUMENTS:
            return _read(folder, stored, weights_only=weights_only)
        if _is_common_state(index.fqn):
            (state,) = _read(folder, stored, weights_only=weights_only)
            return state.get("args")
    return None


def _load(path: Path, *, weights_only: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


def _read(folder: Path, stored: Any, *, weights_only: bool = False) -> Any:
    """An object or a tensor of a torch_dist checkpoint, from where its metadata say it is."""
    with open(folder / stored.relative_path, "rb") as file:
        file.seek(stored.offset)
        return _unpickle(file.read(stored.length), weights_only=weights_only)


def _is_common_state(fqn: str) -> bool:
    return fqn.startswith("common_state/")


def _unpickle(data: bytes, *, weights_only: bool = False) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=weights_only)


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _convert_torch_dist(source: Path, target: Path, report: Callable[[str], None]) -> None:
    """Copy the stored items of each file, but Adam's own; all else is metadata about them."""
    metadata = FileSystemReader(source).read_metadata()
    _check_main_params(source, metadata.storage_data)
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
                if _is_common_state(index.fqn) or any(k in index.fqn for k in _OPTIMIZER_OBJECTS):
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
        if not path.is_file() or (target / path.name).exists() or path.name in by_file:
            continue
        if path.name == _COMMON_FILE:
            torch.save(_of_adams(_load(path)), target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _check_main_params(folder: Path, storage_data: Any) -> None:
    """Raise where main params were saved that are not those of the weights beside them."""
    places = {(index.fqn, index.offset): stored for index, stored in storage_data.items()}
    for (name, offset), stored in places.items():
        weights = places.get((name.removeprefix(_MAIN_PARAM), offset))
        if not name.startswith(_MAIN_PARAM) or weights is None:
            continue
        main_params, weights = _read(folder, stored), _read(folder, weights)
        # Parts can have been saved in other sizes.
        if weights.shape == main_params.shape and contradict(weights, main_params):
            raise DamagedCheckpointError(f"{folder}: {shifted(name.removeprefix(_MAIN_PARAM))}")


def shifted(name: str) -> str:
    """What to say of a param that `contradict`s its main params."""
    return (
        f"the main params of {name} are not those of its weights. Megatron saves them wrong with "
        "--dist-ckpt-optim-fully-reshardable where buckets are padded: save the AdamW run without "
        "that flag, or load the weights alone with --no-load-optim"
    )


def _of_adams(value: Any) -> Any:
    """The common state, or what a distributed optimizer has for itself, as AdamS has them."""
    if "args" not in value:
        return _without_adam(value)
    value["args"].optimizer = "adams"
    # A rank without trainable parameters has none.
    own = {"optimizer": _without_adam(value["optimizer"])} if "optimizer" in value else {}
    return {**value, **own}


def _copy(old: io.BufferedReader, new: io.BufferedWriter, length: int) -> None:
    while length:
        data = old.read(min(length, _COPIED_AT_ONCE))
        if not data:
            raise DamagedCheckpointError(f"{old.name}: became shorter while it was read")
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
        torch.save(_of_adams(_load(path)), new)
        report(f"[{number}/{len(paths)}] {path.relative_to(source)}")
