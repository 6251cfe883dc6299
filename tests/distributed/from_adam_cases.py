"""What the ranks of test_from_adam.py run, see cases.py."""

import sys
from typing import Any

from tests.distributed import cases


def state_after_load(argv: str) -> dict[str, Any]:
    """Load a checkpoint, and leave.

    Returns:
        "parts": see `cases.describe`; "lr": of each param group of each part; "num_steps" of the
        scheduler; "iteration".
    """
    from megatron.training import get_args, training

    told: dict[str, Any] = {}
    setup = training.setup_model_and_optimizer

    def setup_and_leave(*args: Any, **kwargs: Any) -> Any:
        _, chain, scheduler = setup(*args, **kwargs)
        told["parts"] = [cases.describe(part, {}) for part in chain.chained_optimizers]
        told["num_steps"] = scheduler.num_steps
        told["iteration"] = get_args().iteration
        raise _LoadedError

    training.setup_model_and_optimizer = setup_and_leave
    try:
        cases.train(argv)
    except _LoadedError:
        return told
    sys.exit("Megatron did not set the model up")


def train_saving_as(argv: str, kind: str) -> dict[str, Any]:
    """Train, and save the distributed optimizer in a format that no flag chooses any more."""
    from megatron.training import checkpointing

    build = checkpointing._build_sharded_state_dict_metadata

    def build_as(*args: Any, **kwargs: Any) -> Any:
        return {**build(*args, **kwargs), "distrib_optim_sharding_type": kind}

    checkpointing._build_sharded_state_dict_metadata = build_as
    return cases.train(argv)


class _LoadedError(Exception):
    """Everything is loaded, and has been looked at."""
