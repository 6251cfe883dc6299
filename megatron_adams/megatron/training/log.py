"""The update RMS in Megatron's log, TensorBoard and W&B, at the steps that Megatron logs.

Wraps megatron.training.training's train_step, which has the step count it, and training_log, which
comes after it. Used through `register()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.training.utils import print_rank_last

from megatron_adams.megatron.callers import bound, global_arguments, is_adams
from megatron_adams.megatron.fsdp import AdamSFsdpOptimizer
from megatron_adams.megatron.fused_step import FusedStepChain
from megatron_adams.megatron.training import gpu_memory
from megatron_adams.megatron.training.writers import head_of_line, write_scalars
from megatron_adams.megatron.update_rms import UpdateStats, inner_optimizers


@dataclass
class _Log:
    """What goes from a step to the log that follows it.

    Attributes:
        chain: the optimizer of the last step; Megatron logs its first step, too.
        iteration: the step that was counted.
        stats: of it.
    """

    chain: Any = None
    iteration: int | None = None
    stats: UpdateStats | None = None


_log = _Log()


def wrap_train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Have the steps that are logged counted."""

    def train_step(*args: Any, **kwargs: Any) -> Any:
        optimizer = bound(original, args, kwargs).get("optimizer")
        is_first = _log.chain is not optimizer
        _log.chain, _log.iteration = optimizer, None
        settings = _settings()
        if settings is not None:
            gpu_memory.prepare(settings)
        if not is_adams(optimizer) or settings is None:
            return original(*args, **kwargs)
        # Megatron counts from 0 before a step, and from 1 after it.
        iteration = settings.curr_iteration + 1
        is_logged = is_first or iteration % settings.log_interval == 0
        with counted(optimizer, is_counted=is_logged):
            outcome = original(*args, **kwargs)
        if is_logged:
            _log.iteration, _log.stats = iteration, UpdateStats.of(optimizer)
        return outcome

    return train_step


def _settings() -> Any:
    """Megatron's global arguments, None where they do not say what is logged when."""
    from megatron.training import training

    args = global_arguments(training.get_args)
    is_told = all(hasattr(args, name) for name in ("curr_iteration", "log_interval"))
    return args if is_told else None


@contextmanager
def counted(optimizer: FusedStepChain | AdamSFsdpOptimizer, *, is_counted: bool) -> Iterator[None]:
    """Have the step inside count its updates, or not."""
    # A CUDA graph repeats the step that it captured: there every one counts.
    is_captured = isinstance(optimizer, FusedStepChain) and optimizer.is_captured
    for adams in inner_optimizers(optimizer):
        adams.wants_update_rms = is_counted or is_captured
        if not is_captured:
            # A step that Megatron skips, for an inf in a gradient, would leave the last one's.
            adams.forget_update_rms()
    try:
        yield
    finally:
        for adams in inner_optimizers(optimizer):
            adams.wants_update_rms = False


def wrap_training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    """Write the update RMS of the step that has just been logged."""

    def training_log(*args: Any, **kwargs: Any) -> Any:
        outcome = original(*args, **kwargs)
        call = bound(original, args, kwargs)
        iteration = call.get("iteration")
        settings = _settings()
        if settings is not None and iteration is not None:
            gpu_memory.log(settings, iteration, is_first=call.get("is_first_iteration", False))
        if _log.iteration is not None and _log.iteration == iteration and settings is not None:
            assert _log.stats is not None
            _write(settings, iteration, _log.stats)
        return outcome

    return training_log


def _write(args: Any, iteration: int, stats: UpdateStats) -> None:
    line = head_of_line(args, iteration)
    if stats.rms is None:
        print_rank_last(f"{line} update RMS: none, the step was skipped |")
        return
    line += f" update RMS: {stats.rms:.6E} |"
    scalars = {"adams/update-rms": stats.rms}
    if stats.adamw_rms is not None:
        line += f" AdamW's would be: {stats.adamw_rms:.6E} |"
        scalars["adams/adamw-update-rms"] = stats.adamw_rms
    # Megatron's chain has no configuration on a rank without params.
    config = getattr(_log.chain, "config", None)
    match_rms = getattr(config, "adams_match_rms", None)
    target = match_rms or getattr(config, "adams_max_update_rms", None)
    if target is not None:
        verb = "capped at" if match_rms is None else "matched to"
        line += f" tensors {verb} {target}: {stats.num_scaled:d} of {stats.num_tensors:d} |"
        scalars["adams/tensors-scaled"] = float(stats.num_scaled)
    print_rank_last(line)
    # As Megatron, whose first log beside the interval is for the screen alone.
    if iteration % args.log_interval != 0:
        return
    write_scalars(scalars, iteration)
