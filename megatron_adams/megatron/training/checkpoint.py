"""Checkpoints that are whole: checked before Megatron loads one, marked while it overwrites one.

Megatron (0.19) reports a truncated file as whatever error its reader stumbles over, and exits
with status 0 where a legacy file or the tracker file is damaged. All formats: torch_dist,
Megatron-FSDP's fsdp_dtensor and the legacy torch. Another optimizer is told that it cannot load
what adams saved.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_adams.checkpoint import (
    METADATA_WRITTEN_LAST,
    TRACKER,
    DamagedCheckpointError,
    damage,
    is_fsdp_dtensor,
    is_legacy,
    saved_arguments,
    unfit_for_adams,
)
from megatron_adams.megatron.callers import bound, global_arguments, is_adams, saves_as_adams
from megatron_adams.megatron.fsdp import AdamSFsdpOptimizer
from megatron_adams.megatron.names import ADAMS, FSDP_FORMAT, rates_of

logger = logging.getLogger(__name__)


def wrap_save_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take a checkpoint that is about to be overwritten out of use."""

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import checkpointing

        given = bound(original, args, kwargs)
        save_dir = getattr(global_arguments(checkpointing.get_args), "save", None)
        # Non-persistent checkpoints lie elsewhere and are not overwritten.
        if (
            save_dir is not None
            and saves_as_adams(given.get("optimizer"))
            and not given.get("non_persistent_ckpt", False)
            and torch.distributed.get_rank() == 0
        ):
            withdraw(Path(save_dir), given["iteration"])
        return original(*args, **kwargs)

    return save_checkpoint


def withdraw(save_dir: Path, step: int) -> None:
    """Mark the checkpoint of an iteration as incomplete before it is written again.

    A run that went back to an earlier iteration overwrites the later ones, file by file: killed
    meanwhile, it would leave one that looks whole and mixes two. What Megatron writes last,
    metadata.json or with Megatron-FSDP .metadata, goes first; the tracker file goes back to the
    newest complete earlier checkpoint.
    """
    folder = _folder(save_dir, step)
    tracker = _tracker(save_dir)
    if not folder.is_dir():
        return
    if tracker.is_file() and tracker.read_text().strip() == str(step):
        earlier = [known for known in _complete_steps(save_dir) if known < step]
        if earlier:
            _write_tracker(tracker, max(earlier))
    written_last = ".metadata" if is_fsdp_dtensor(folder) else METADATA_WRITTEN_LAST
    (folder / written_last).unlink(missing_ok=True)


def wrap_load_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check a checkpoint of this run's before loading it; one of adams's, before another does."""

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import checkpointing

        given = bound(original, args, kwargs)
        optimizer = given.get("optimizer")
        settings = global_arguments(checkpointing.get_args)
        is_overridden = getattr(settings, "override_opt_param_scheduler", False)
        load_dir = getattr(settings, given.get("load_arg", "load"), None)
        # Non-persistent checkpoints have a manager of their own, which checks them.
        if load_dir is not None and saves_as_adams(optimizer):
            settings = _loading(settings, optimizer)
            folder = _on_rank_0(lambda: check_checkpoint(Path(load_dir), settings))
            if isinstance(optimizer, AdamSFsdpOptimizer) and folder is not None:
                is_from_adam = settings.adams_from_adam
                step_key = _on_rank_0(lambda: adam_step_key(folder) if is_from_adam else None)
                optimizer.take_from_adam(step_key)
        elif load_dir is not None and optimizer is not None and torch.distributed.is_initialized():
            settings = _loading(settings)
            _on_rank_0(lambda: refuse_adams_checkpoint(Path(load_dir), settings))
        if not (is_overridden and is_adams(optimizer)):
            return original(*args, **kwargs)
        with own_rates_kept(optimizer, given.get("opt_param_scheduler")):
            return original(*args, **kwargs)

    return load_checkpoint


@contextmanager
def own_rates_kept(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Let every param group have the learning rates that it was built with after a load.

    With --override-opt_param-scheduler, Megatron's main gives --lr to the groups of --decoupled-lr,
    too: it asks for a mark of these groups that it never sets (load_checkpoint, d98e8a64dd).
    """
    own = [rates_of(group) for group in optimizer.param_groups]
    yield
    groups = optimizer.param_groups
    if [rates_of(group) for group in groups] == own:
        return
    for group, rates in zip(groups, own, strict=True):
        group.update({key: rate for key, rate in rates.items() if rate is not None})
    if scheduler is not None:
        scheduler.step(increment=0)


# Megatron's arguments that say what is loaded, and what they are where a caller has left them out.
_LOADING = {
    "ckpt_step": None,
    "finetune": False,
    "no_load_optim": False,
    "use_distributed_optimizer": False,
    "expert_model_parallel_size": None,
    "optimizer": None,
}


def _loading(args: Any, optimizer: Any = None) -> Namespace:
    """What the checks below need of Megatron's arguments, and of adams's optimizer.

    Args:
        args: the namespace; it may have only some of them.
        optimizer: adams's; None: another.
    """
    settings = Namespace(**{name: getattr(args, name, value) for name, value in _LOADING.items()})
    settings.use_megatron_fsdp = isinstance(optimizer, AdamSFsdpOptimizer)
    # Megatron's chain has none on a rank without params.
    config = getattr(optimizer, "config", None)
    settings.adams_from_adam = getattr(config, "adams_from_adam", False)
    return settings


T = TypeVar("T")


def _on_rank_0(check: Callable[[], T]) -> T:
    """Run a check on rank 0 and return or raise what it does on all ranks: none is left waiting."""
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = check()
        except Exception as exc:  # Whatever it is: the other ranks are told below.
            outcome[1] = exc
    torch.distributed.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def check_checkpoint(load_dir: Path, args: Any) -> Path | None:
    """Raise unless the checkpoint that Megatron is about to load is whole.

    Args:
        load_dir: the folder given by --load.
        args: see `_loading`.
    Returns:
        The checkpoint's folder, None if there is none.
    Raises:
        DamagedCheckpointError: a file is missing, truncated or unreadable.
        ValueError: the checkpoint cannot be loaded at the run's expert parallel size, or with or
            without Megatron-FSDP; or --adams-from-adam is given and there is no state of Adam's or
            adams's in it.
    """
    tracker = _tracker(load_dir)
    if args.ckpt_step:
        text = str(args.ckpt_step)
    elif tracker.exists():
        text = _read_tracker(tracker)
    elif args.adams_from_adam:
        raise ValueError(
            f"--adams-from-adam: {tracker} not found, the run would start from random weights; "
            f"give --load the folder with Adam's checkpoint, or remove the flag"
        )
    else:
        return None  # A new run, or --exit-on-missing-checkpoint: Megatron's own affair.
    folder = load_dir / text if text == "release" else _folder(load_dir, int(text))
    if not folder.is_dir():
        raise DamagedCheckpointError(
            f"{folder}: not found, although {'--ckpt-step' if args.ckpt_step else tracker} names "
            f"it; restore it, or {_choose_another(load_dir)}"
        )
    if (found := damage(folder)) is not None:
        raise DamagedCheckpointError(
            f"{folder}: {found}; the checkpoint is incomplete. Restore it, or "
            f"{_choose_another(load_dir)}"
        )
    is_fsdp = is_fsdp_dtensor(folder)
    if is_fsdp != args.use_megatron_fsdp:
        saved, wanted = ("with", "without") if is_fsdp else ("without", "with")
        change = "add" if is_fsdp else "remove"
        raise ValueError(
            f"the checkpoint {folder} was saved {saved} Megatron-FSDP, and cannot be loaded "
            f"{wanted} it; {change} --use-megatron-fsdp and --ckpt-format {FSDP_FORMAT}"
        )
    if is_legacy(folder):
        _check_legacy_step(tracker, args)
    elif not is_fsdp:
        _check_expert_parallel_size(folder, args)
    if args.adams_from_adam:
        _check_has_momentum(folder)
    elif is_fsdp and _loads_optimizer(args):
        _check_is_adams(folder)
    return folder


def _check_is_adams(folder: Path) -> None:
    """Raise where Megatron-FSDP would look for adams's param groups in another's checkpoint."""
    saved = getattr(saved_arguments(folder), "optimizer", None)
    if saved != ADAMS:
        raise ValueError(
            f"the checkpoint {folder} was saved with --optimizer {saved}, and {ADAMS} keeps "
            f"exp_avg alone; go on from Adam's momentum with --adams-from-adam, or load the "
            f"weights alone with --no-load-optim or --finetune"
        )


def adam_step_key(folder: Path) -> str | None:
    """Where a checkpoint of Megatron-FSDP has the step of Adam's params, None if it is no Adam's.

    Returns:
        "param_to_group_meta" (TransformerEngine's and Apex's), "state" (torch's) or None.
    Raises:
        ValueError: it has none.
    """
    if getattr(saved_arguments(folder), "optimizer", None) == ADAMS:
        return None
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    for key in ("param_to_group_meta", "state"):
        if any(name.startswith(f"optimizer.{key}.") and name.endswith(".step") for name in names):
            return key
    raise ValueError(
        f"--adams-from-adam: the checkpoint {folder} has no step of Adam's; load the weights alone "
        f"with --no-load-optim in place of the flag"
    )


def _check_has_momentum(folder: Path) -> None:
    """Raise where --adams-from-adam would find none; say where it has nothing to do."""
    saved = saved_arguments(folder)
    if getattr(saved, "optimizer", None) == ADAMS:
        logger.info(
            "%s: the checkpoint is %s's own, --adams-from-adam has nothing to do", ADAMS, ADAMS
        )
    elif (unfit := unfit_for_adams(saved)) is not None:
        raise ValueError(
            f"--adams-from-adam: the checkpoint {folder} {unfit}; name one of --optimizer adam, or "
            f"load the weights alone with --no-load-optim in place of the flag"
        )
    if folder.name == "release":
        raise ValueError(
            f"--adams-from-adam: Megatron loads the weights alone of {folder}, a release; remove "
            f"the flag, or name a checkpoint of an iteration"
        )


def refuse_adams_checkpoint(load_dir: Path, args: Any) -> None:
    """Raise where another optimizer than adams is about to load adams's state.

    Args:
        load_dir: the folder given by --load.
        args: see `_loading`.
    Raises:
        ValueError: it is.
    """
    tracker = _tracker(load_dir)
    if not _loads_optimizer(args) or not (args.ckpt_step or tracker.is_file()):
        return
    text = str(args.ckpt_step) if args.ckpt_step else tracker.read_text().strip()
    folder = _folder(load_dir, int(text)) if text.isdecimal() else load_dir / text
    # Whatever else there is about it is Megatron's own affair.
    if not folder.is_dir() or damage(folder) is not None:
        return
    try:
        saved = saved_arguments(folder)
    except Exception:
        return
    if getattr(saved, "optimizer", None) == ADAMS:
        given = f"--optimizer {args.optimizer}: " if args.optimizer is not None else ""
        other = args.optimizer or "another optimizer"
        raise ValueError(
            f"{given}the checkpoint {folder} was saved by {ADAMS}, which keeps exp_avg and no "
            f"exp_avg_sq, so that {other} cannot go on from it; resume with --optimizer {ADAMS}, "
            f"or load the weights alone with --no-load-optim or --finetune"
        )


def _tracker(load_dir: Path) -> Path:
    return load_dir / TRACKER


def _folder(load_dir: Path, step: int) -> Path:
    return load_dir / f"iter_{step:07d}"


def _read_tracker(tracker: Path) -> str:
    """The tracker's text: digits or "release"; one that a killed run left empty is mended."""
    text = tracker.read_text(errors="replace").strip()
    if not text:
        # Megatron truncates the tracker and then writes it, after the save that it names is
        # complete: a run killed in between leaves it empty, and its newest checkpoint is whole.
        complete = _complete_steps(tracker.parent)
        if complete:
            logger.warning("%s was empty; resuming from iteration %d", tracker, complete[-1])
            _write_tracker(tracker, complete[-1])
            return str(complete[-1])
    if text != "release" and not text.isdecimal():
        raise DamagedCheckpointError(
            f"{tracker}: contains {text!r}, must be an iteration or 'release'; "
            f"{_choose_another(tracker.parent)}"
        )
    return text


def _write_tracker(tracker: Path, step: int) -> None:
    written = tracker.with_suffix(".tmp")
    written.write_text(str(step))
    os.replace(written, tracker)


def _steps(load_dir: Path) -> list[int]:
    return sorted(int(folder.name[len("iter_") :]) for folder in load_dir.glob("iter_[0-9]*"))


def _complete_steps(load_dir: Path) -> list[int]:
    return [step for step in _steps(load_dir) if damage(_folder(load_dir, step)) is None]


def _choose_another(load_dir: Path) -> str:
    steps = ", ".join(str(step) for step in _complete_steps(load_dir))
    return (
        f"write the iteration to resume from into {_tracker(load_dir)} (complete ones there: "
        f"{steps or 'none'})"
    )


def _check_legacy_step(tracker: Path, args: Any) -> None:
    # megatron.training.checkpointing.load_checkpoint (0.19) takes the model of --ckpt-step, and
    # the distributed optimizer's part, and with it the iteration, of the tracker file.
    if not (args.ckpt_step and args.use_distributed_optimizer and _loads_optimizer(args)):
        return
    text = _read_tracker(tracker) if tracker.exists() else "nothing"
    if text != str(args.ckpt_step):
        raise ValueError(
            f"--ckpt-step {args.ckpt_step} with --ckpt-format torch: Megatron would load the "
            f"distributed optimizer's part of the iteration in {tracker} ({text}); write "
            f"{args.ckpt_step} into that file"
        )


def _loads_optimizer(args: Any) -> bool:
    return not (args.finetune or args.no_load_optim)


def _check_expert_parallel_size(folder: Path, args: Any) -> None:
    if not _loads_optimizer(args):
        return
    state = dist_checkpointing.load_common_state_dict(str(folder))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=state) or {}
    kind = metadata.get("distrib_optim_sharding_type")
    saved, current = state["args"].expert_model_parallel_size, args.expert_model_parallel_size
    if kind == "dp_reshardable" and current not in (None, saved):
        raise ValueError(
            f"--expert-model-parallel-size {current}: the checkpoint {folder} was saved at "
            f"{saved}, in a format that keeps it; resume at {saved}, or save with "
            f"--dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
