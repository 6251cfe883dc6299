"""Checks of a checkpoint before Megatron loads it: torch_dist and the legacy torch format.

Megatron (0.19) reports a truncated file as whatever error its reader stumbles over, and exits
with status 0 where a legacy file or the tracker file is damaged. Runs only for adams.
"""

import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_adams.megatron.config import ADAMS

logger = logging.getLogger(__name__)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint lacks a file or a part of one."""


def wrap_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check a checkpoint of this run's before loading it."""

    def load_checkpoint(
        ddp_model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        load_arg: str = "load",
        **kwargs: Any,
    ) -> Any:
        from megatron.training import get_args

        args = get_args()
        load_dir = getattr(args, load_arg)
        # Non-persistent checkpoints have a manager of their own, which checks them.
        if args.optimizer == ADAMS and load_dir is not None:
            _on_rank_0(lambda: check_checkpoint(Path(load_dir), args))
        return original(ddp_model, optimizer, opt_param_scheduler, load_arg=load_arg, **kwargs)

    return load_checkpoint


def _on_rank_0(check: Callable[[], None]) -> None:
    """Run a check on rank 0 and raise its error on every rank: none is left waiting."""
    error: list[Exception | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            check()
        except (DamagedCheckpointError, ValueError) as exc:
            error[0] = exc
    torch.distributed.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]


def check_checkpoint(load_dir: Path, args: Any) -> None:
    """Raise unless the checkpoint that Megatron is about to load is whole.

    Args:
        load_dir: the folder given by --load.
        args: Megatron's arguments.
    Raises:
        DamagedCheckpointError: a file is missing, truncated or unreadable.
        ValueError: the checkpoint cannot be loaded at the run's expert parallel size.
    """
    tracker = load_dir / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return  # A new run, or --exit-on-missing-checkpoint: Megatron's own affair.
    _mend_tracker(tracker)
    text = tracker.read_text().strip()
    if args.ckpt_step:
        text = str(args.ckpt_step)
    folder = load_dir / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise DamagedCheckpointError(
            f"{folder}: not found, although {tracker} names it; restore it, or choose another "
            f"checkpoint with --ckpt-step ({_known_steps(load_dir)})"
        )
    legacy = any(folder.glob("mp_rank_*"))
    damage = _damage_of_legacy(folder) if legacy else _damage_of_torch_dist(folder)
    if damage:
        raise DamagedCheckpointError(
            f"{folder}: {damage}; the checkpoint is incomplete. Restore it, or resume from "
            f"another one with --ckpt-step ({_known_steps(load_dir)})"
        )
    if not legacy:
        _check_expert_parallel_size(folder, args)


def _mend_tracker(tracker: Path) -> None:
    # Megatron truncates the tracker and then writes it, after the save that it names is
    # complete: a run killed in between leaves it empty, and its newest checkpoint is whole.
    if tracker.read_text().strip():
        return
    complete = [
        step
        for step in _steps(tracker.parent)
        if _damage_of_torch_dist(tracker.parent / f"iter_{step:07d}") is None
    ]
    if not complete:
        raise DamagedCheckpointError(
            f"{tracker}: empty, and no complete torch_dist checkpoint beside it; write the "
            f"iteration to resume from into it ({_known_steps(tracker.parent)})"
        )
    logger.warning("%s was empty; resuming from iteration %d", tracker, max(complete))
    written = tracker.with_suffix(".tmp")
    written.write_text(str(max(complete)))
    os.replace(written, tracker)


def _steps(load_dir: Path) -> list[int]:
    return sorted(int(folder.name[len("iter_") :]) for folder in load_dir.glob("iter_[0-9]*"))


def _known_steps(load_dir: Path) -> str:
    steps = ", ".join(str(step) for step in _steps(load_dir))
    return f"iterations there: {steps}" if steps else "there is none"


def _damage_of_torch_dist(folder: Path) -> str | None:
    """What is missing of a torch_dist checkpoint, from its metadata and its files' sizes."""
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except (EOFError, pickle.UnpicklingError, ValueError) as exc:
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
    """What is missing of a legacy checkpoint: its files are zip archives, indexed at the end."""
    for path in sorted(folder.glob("mp_rank_*/*.pt")):
        if not zipfile.is_zipfile(path):
            return f"{path.relative_to(folder)} is truncated"
    return None


def _check_expert_parallel_size(folder: Path, args: Any) -> None:
    state = dist_checkpointing.load_common_state_dict(str(folder))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=state) or {}
    kind = metadata.get("distrib_optim_sharding_type")
    saved, current = state["args"].expert_model_parallel_size, args.expert_model_parallel_size
    if kind == "dp_reshardable" and saved != current and not args.no_load_optim:
        raise ValueError(
            f"--expert-model-parallel-size {current}: the checkpoint {folder} was saved at "
            f"{saved}, in a format that keeps it; resume at {saved}, or save with "
            f"--dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
