"""A whole checkpoint of Adam's on disk, written as one of AdamS.

Called by the command `megatron-adams convert`. Imports torch and the modules of this folder.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_adams.checkpoint.files import (
    COMMON_FILE,
    METADATA_WRITTEN_LAST,
    TRACKER,
    DamagedCheckpointError,
    checkpoint_in,
    damage,
    is_common_state,
    is_fsdp_dtensor,
    is_legacy,
    load,
    read,
    saved_arguments,
    unpickle,
)
from megatron_adams.checkpoint.from_adam import (
    DROPPED_STATE,
    contradict,
    shifted_message,
    unfit_for_adams,
    without_adam,
)

_COPIED_AT_ONCE = 2**24
# Objects with an optimizer's param groups, or (dp_zero_gather_scatter) with all its tensors.
_OPTIMIZER_OBJECTS = (".optimizer/", ".param_state/")
# With the name of the param behind it: its main param, in the format fully_reshardable.
_MAIN_PARAM = "optimizer.state.param."


class Conversion(NamedTuple):
    """What `convert` has done.

    Attributes:
        folder: the checkpoint that was written.
        bytes_before, bytes_after: of all files of the source's checkpoint, and of the new one.
    """

    folder: Path
    bytes_before: int
    bytes_after: int


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
        ImportError: the source contains objects of Megatron, and Megatron is not installed.
    """
    folder = checkpoint_in(source)
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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
                if not set(index.fqn.split(".")).isdisjoint(DROPPED_STATE):
                    continue
                offset = new.tell()
                old.seek(stored.offset)
                if is_common_state(index.fqn) or any(k in index.fqn for k in _OPTIMIZER_OBJECTS):
                    # Megatron stores an object as a list of it.
                    values = unpickle(old.read(stored.length))
                    new.write(_pickle([_converted(value) for value in values]))
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
    # The other files of the checkpoint; the one that says that it is whole comes last.
    for path in sorted(source.iterdir(), key=lambda path: path.name == METADATA_WRITTEN_LAST):
        if not path.is_file() or (target / path.name).exists() or path.name in by_file:
            continue
        if path.name == COMMON_FILE:
            torch.save(_converted(load(path)), target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _check_main_params(folder: Path, storage_data: Any) -> None:
    """Raise if the main params in a checkpoint are not those of its weights."""
    places = {(index.fqn, index.offset): stored for index, stored in storage_data.items()}
    for (name, offset), stored in places.items():
        weights = places.get((name.removeprefix(_MAIN_PARAM), offset))
        if not name.startswith(_MAIN_PARAM) or weights is None:
            continue
        main_params, weights = read(folder, stored), read(folder, weights)
        # Parts can have been saved in other sizes.
        if weights.shape == main_params.shape and contradict(weights, main_params):
            message = shifted_message(name.removeprefix(_MAIN_PARAM))
            raise DamagedCheckpointError(f"{folder}: {message}")


def _converted(value: Any) -> Any:
    """The common state, or what a distributed optimizer has for itself, as AdamS has them."""
    if "args" not in value:
        return without_adam(value)
    value["args"].optimizer = "adams"
    # A rank without trainable parameters has none.
    own = {"optimizer": without_adam(value["optimizer"])} if "optimizer" in value else {}
    return {**value, **own}


def _copy(old: io.BufferedReader, new: io.BufferedWriter, length: int) -> None:
    while length:
        data = old.read(min(length, _COPIED_AT_ONCE))
        if not data:
            raise DamagedCheckpointError(f"{old.name}: became shorter while it was read")
        new.write(data)
        length -= len(data)


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _sync(file: io.BufferedWriter) -> None:
    # A full disk shows here at the latest.
    file.flush()
    os.fsync(file.fileno())


def _convert_legacy(source: Path, target: Path, report: Callable[[str], None]) -> None:
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    for number, path in enumerate(paths, 1):
        new = target / path.relative_to(source)
        new.parent.mkdir(exist_ok=True)
        torch.save(_converted(load(path)), new)
        report(f"[{number}/{len(paths)}] {path.relative_to(source)}")
