"""What the ranks of the checkpoint tests run, see cases.py."""

import builtins
import errno
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.distributed import cases


def capture_setup() -> list[Any]:
    """Have Megatron's (model, optimizer, scheduler) put into the returned list once built."""
    from megatron.training import training

    captured: list[Any] = []
    setup = training.setup_model_and_optimizer

    def capturing_setup(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        captured.extend(built)
        return built

    training.setup_model_and_optimizer = capturing_setup
    return captured


def train_and_place(argv: str) -> list[dict[str, Any]]:
    """Train, then say where each main-parameter shard of this rank belongs in the whole model.

    Independent of the optimizer's checkpoint code: the place of a parameter in the model comes
    from the model's own sharded_state_dict, the place of a shard in the parameter from the range
    that Megatron copies main params to model params by.

    Returns:
        For each shard "key", "global_shape", "global_offset" (with leading axes for stacked
        layers), "local_shape", "start" (in the flattened local parameter), and the tensors
        "param" and "exp_avg".
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    placements: dict[int, Any] = {}
    captured = capture_setup()
    step = training.train_step

    def step_after_placing(*args: Any, **kwargs: Any) -> Any:
        if not placements:
            for chunk in unwrap_model(captured[0]):
                for sharded in nested_values(chunk.sharded_state_dict()):
                    placements[id(getattr(sharded, "data", None))] = sharded
        return step(*args, **kwargs)

    training.train_step = step_after_placing
    cases.train(argv)
    chain = captured[1]
    shards = []
    for part in chain.chained_optimizers:
        for param, (group, order) in part.model_param_group_index_map.items():
            main_param = part.optimizer.param_groups[group]["params"][order]
            sharded = placements[id(param)]
            shards.append(
                {
                    "key": sharded.key,
                    "global_shape": sharded.global_shape,
                    "global_offset": sharded.global_offset,
                    "local_shape": sharded.local_shape,
                    "start": part._get_model_param_range_map(param)["param"].start,
                    "param": main_param.detach().clone(),
                    "exp_avg": part.optimizer.state[main_param]["exp_avg"].clone(),
                }
            )
    return shards


def read_common(checkpoint: str) -> dict[str, Any]:
    """The part of a torch_dist checkpoint that is not tensors, and all its keys; on one rank."""
    from megatron.core import dist_checkpointing

    torch.distributed.init_process_group("gloo")
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    common["keys"] = sorted(dist_checkpointing.load_tensors_metadata(checkpoint))
    return common


def save_before_first_step(argv: str) -> None:
    """Build everything, save as iteration 0, and leave."""
    from megatron.training import checkpointing, training

    captured = capture_setup()

    def save_and_leave(*args: Any, **kwargs: Any) -> Any:
        checkpointing.save_checkpoint(0, *captured, 0)
        sys.exit(0)

    training.train_step = save_and_leave
    cases.train(argv)


def train_with_steps(
    argv: str, steps: list[int], ranks: list[int], as_they_are: bool = False
) -> None:
    """Train; param groups of the given ranks say after each iteration that they are at `steps`.

    Args:
        argv: of a run that saves.
        steps: one for each group of each part of the chain, again and again.
        ranks: the others keep what they have counted.
        as_they_are: save them so, as a program without the plugin would.
    """
    from megatron.training import training

    from megatron_adams.megatron import distributed, fused_step

    if as_they_are:
        fused_step.synchronize_steps = lambda groups: None
        distributed.synchronize_steps = lambda groups: None
    train_step = training.train_step

    @functools.wraps(train_step)
    def step_and_set(*args: Any, **kwargs: Any) -> Any:
        outcome = train_step(*args, **kwargs)
        if int(os.environ["RANK"]) in ranks:
            groups = [group for part in args[3].chained_optimizers for group in _groups(part)]
            for group, step in zip(groups, itertools.cycle(steps), strict=False):
                group["step"] = step
        return outcome

    training.train_step = step_and_set
    cases.train(argv)


def _groups(part: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = part.optimizer.param_groups
    return groups


def train_killed(argv: str, at: str, ranks: list[int]) -> None:
    """Train; the given ranks end by SIGKILL at a point of POINTS, around the second save."""
    if int(os.environ["RANK"]) in ranks:
        POINTS[at]()
    cases.train(argv)


def train_failing(argv: str, at: str, ranks: list[int]) -> None:
    """Train; on the given ranks the disk is full at a point of FAILURES, from the start."""
    if int(os.environ["RANK"]) in ranks:
        FAILURES[at]()
    cases.train(argv)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_call(number: int, original: Callable[..., Any], then: Callable[..., Any]) -> Any:
    """A function that calls `original`, and `then` in its place the number-th time."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (then if calls == number else original)(*args, **kwargs)

    return counted


def die_between_saves() -> None:
    from megatron.training import training

    training.train_step = on_call(5, training.train_step, die)


def die_with_half_a_file() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    def write_half(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        path = kwargs["write_bucket"][0]
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    FileSystemWriterAsync.write_preloaded_data = staticmethod(on_call(2, write, write_half))


def die_while_overwriting() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # The other rank's file is the new one then, and this rank's the old one, whole.
    FileSystemWriterAsync.write_preloaded_data = die


def die_before_metadata_json() -> None:
    from megatron.core.dist_checkpointing import serialization

    serialization.save_config = on_call(2, serialization.save_config, die)


def die_before_tracker() -> None:
    from megatron.training import checkpointing

    original = checkpointing.get_checkpoint_tracker_filename
    checkpointing.get_checkpoint_tracker_filename = on_call(2, original, die)


def die_with_empty_tracker() -> None:
    original = builtins.open

    def open_tracker(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = original(file, mode, *args, **kwargs)
        if mode == "w" and str(file).endswith("latest_checkpointed_iteration.txt"):
            written.append(file)
            if len(written) == 2:
                die()
        return opened

    written: list[Any] = []
    builtins.open = open_tracker


def die_with_half_a_legacy_file() -> None:
    save = torch.save

    def save_half(state: Any, path: str) -> None:
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    # Of each checkpoint rank 0 writes two: the distributed optimizer's and the model's.
    torch.save = on_call(4, save, save_half)


POINTS = {
    "between_saves": die_between_saves,
    "with_half_a_file": die_with_half_a_file,
    "overwriting": die_while_overwriting,
    "before_metadata_json": die_before_metadata_json,
    "before_tracker": die_before_tracker,
    "with_empty_tracker": die_with_empty_tracker,
    "with_half_a_legacy_file": die_with_half_a_legacy_file,
}


def fail_to_write_tensors() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._write_item = disk_full


def fail_to_write_metadata() -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.finish = disk_full


def fail_to_write_legacy_file() -> None:
    torch.save = disk_full


FAILURES = {
    "tensors": fail_to_write_tensors,
    "metadata": fail_to_write_metadata,
    "legacy_file": fail_to_write_legacy_file,
}
