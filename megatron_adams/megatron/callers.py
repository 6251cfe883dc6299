"""What a hook knows of the call that it is given.

Megatron's functions are called by others than its `pretrain`, too: by tools that convert
checkpoints, by training loops of their own, by tests. Those have set none of Megatron's global
arguments, or only some. So a hook decides by the objects that it is given, and passes on untouched
what it cannot know to be adams's.
"""

import inspect
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from megatron_adams.megatron.fsdp import AdamSFsdpOptimizer
from megatron_adams.megatron.fused_step import FusedStepChain
from megatron_adams.megatron.names import ADAMS


def bound(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What a call gives to each parameter; empty where it does not fit the function."""
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    call.apply_defaults()
    return dict(call.arguments)


def is_adams(optimizer: Any) -> TypeGuard[FusedStepChain | AdamSFsdpOptimizer]:
    """Whether it is what `get_megatron_optimizer` returns for adams."""
    return isinstance(optimizer, (FusedStepChain, AdamSFsdpOptimizer))


def saves_as_adams(optimizer: Any) -> bool:
    """Whether its checkpoints are adams's: also of a MIMO model's, which has one for each module.

    Every rank has the configuration, and not every rank has a module.
    """
    return is_adams(optimizer) or asks_for_adams(getattr(optimizer, "config", None))


def asks_for_adams(config: Any) -> bool:
    """Whether an argument namespace or a configuration says so."""
    return getattr(config, "optimizer", None) == ADAMS


def global_arguments(get_args: Callable[[], Any]) -> Any:
    """Megatron's global arguments; a namespace without any where they are not set.

    Args:
        get_args: the function as the hooked module has it, which others put their own in place of.
    """
    try:
        args = get_args()
    except AssertionError:
        return Namespace()
    return Namespace() if args is None else args
