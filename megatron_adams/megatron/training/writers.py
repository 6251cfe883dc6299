"""Where adams's own numbers are written: beside Megatron's in TensorBoard and W&B.

Used by log.py and gpu_memory.py.
"""

import argparse
from collections.abc import Mapping

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer


def head_of_line(args: argparse.Namespace, iteration: int) -> str:
    """Return how a line of Megatron's log begins."""
    return f" iteration {iteration:8d}/{args.train_iters:8d} |"


def write_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    """Write numbers to TensorBoard and W&B, where Megatron has opened them on this rank.

    Args:
        scalars: the numbers by their names.
        iteration: the step that they belong to.
    """
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    for name, value in scalars.items():
        if writer:
            writer.add_scalar(name, value, iteration)
        if wandb_writer:
            wandb_writer.log({name: value}, iteration)
