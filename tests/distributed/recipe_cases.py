"""What the ranks of the recipes' tests run: a rehearsal's flags, and a full-size job's."""

import functools
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.distributed.cases import describe, run_script


def rehearse(
    words: list[str], kill_at: int | None = None, ranks_of_node: int = 8
) -> dict[str, Any]:
    """Train with a rehearsal's flags.

    Args:
        kill_at: the step that begins when the process kills itself.
        ranks_of_node: with more ranks, the job has several nodes.

    Returns:
        "losses": one a step, on the last pipeline stage; "sizes": of tensor, pipeline and data
        parallelism; "optimizer": the class of the inner one; "adam": its betas, eps and weight
        decay; "dtype": of the model; "digest": of every bit of this rank's model, main params and
        optimizer state at the end.
    """
    from megatron.core import mpu
    from megatron.training import get_args, training

    local_world_size = min(ranks_of_node, int(os.environ["WORLD_SIZE"]))
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % local_world_size)
    if kill_at is not None:
        training.train_step = _killed(training.train_step, kill_at)
    held = run_script(" ".join(words), base="")
    part = held["optimizer"].chained_optimizers[0]
    args = get_args()
    return {
        "losses": held["losses"],
        "sizes": (
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_pipeline_model_parallel_world_size(),
            mpu.get_data_parallel_world_size(),
        ),
        "optimizer": type(part.optimizer).__name__,
        "adam": (args.adam_beta1, args.adam_beta2, args.adam_eps, args.weight_decay),
        "dtype": str(next(held["model"][0].parameters()).dtype),
        "digest": _digest(held["model"], held["optimizer"]),
    }


def _digest(model: list[torch.nn.Module], optimizer: Any) -> str:
    params = [param.detach() for chunk in model for param in chunk.parameters()]
    # Not what the checkpoint holds: between params it has the gaps of Megatron's buffers, too.
    for part in optimizer.chained_optimizers:
        for shard in describe(part, {})["shards"]:
            params += [shard["param"], *shard["state"].values()]
    digest = hashlib.sha256()
    for tensor in params:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _killed(train_step: Callable[..., Any], kill_at: int) -> Callable[..., Any]:
    @functools.wraps(train_step)
    def killed_train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        if iteration + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*args, iteration=iteration, **kwargs)

    return killed_train_step


def validate(words: list[str], num_parallel: int) -> dict[str, Any]:
    """Have Megatron check the flags of a job of many ranks, in one process.

    Args:
        num_parallel: ranks of the job.

    Returns:
        Some of the arguments that come of it.
    """
    from megatron.training.arguments import parse_and_validate_args

    os.environ["WORLD_SIZE"] = str(num_parallel)
    sys.argv = ["pretrain_gpt.py", *words]
    args = parse_and_validate_args()
    return {
        name: getattr(args, name)
        for name in (
            *("optimizer", "bf16", "fp8", "fp8_recipe", "fp8_param_gather", "sequence_parallel"),
            *("data_parallel_size", "lr", "min_lr", "exit_signal_handler", "tensorboard_dir"),
        )
    }
