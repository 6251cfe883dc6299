"""What the ranks of test_from_adam.py run, see cases.py."""

import sys
from typing import Any

from tests.distributed import cases


def state_after_load(argv: str) -> dict[str, Any]:
    """Load a checkpoint, and leave; return what `_told` says."""
    from megatron.training import training

    setup = training.setup_model_and_optimizer
    told: dict[str, Any] = {}

    def setup_and_leave(*args: Any, **kwargs: Any) -> Any:
        told.update(_told(setup(*args, **kwargs)))
        raise _LoadedError

    training.setup_model_and_optimizer = setup_and_leave
    try:
        cases.train(argv)
    except _LoadedError:
        return told
    sys.exit("Megatron did not set the model up")


def train_from_load(argv: str) -> dict[str, Any]:
    """Load a checkpoint, and train; return what `cases.train` does, and what `_told` says before.

    Returns:
        Beside what `cases.train` returns, "loaded".
    """
    from megatron.training import training

    setup = training.setup_model_and_optimizer
    told: dict[str, Any] = {}

    def setup_and_tell(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        told.update(_told(built))
        return built

    training.setup_model_and_optimizer = setup_and_tell
    return {**cases.train(argv), "loaded": told}


def _told(built: Any) -> dict[str, Any]:
    """What Megatron's setup has loaded.

    Returns:
        "parts": see `cases.describe`; "num_steps" of the scheduler; "iteration".
    """
    from megatron.training import get_args

    _, chain, scheduler = built
    return {
        "parts": [cases.describe(part, {}) for part in chain.chained_optimizers],
        "num_steps": scheduler.num_steps,
        "iteration": get_args().iteration,
    }


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
