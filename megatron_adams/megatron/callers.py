"""How a hook finds out whether a call concerns adams.

Not only Megatron's `pretrain` calls Megatron's functions. Tools that convert checkpoints, other
training loops and tests do, too, and they set none or only some of Megatron's global arguments. So
a hook decides by the objects that it is given. If it cannot tell that a call concerns adams, it
passes the call on unchanged.
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
    """Return what a call gives to each parameter; empty if the call does not fit the function."""
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    call.apply_defaults()
    return dict(call.arguments)


def is_adams(optimizer: Any) -> TypeGuard[FusedStepChain | AdamSFsdpOptimizer]:
    """Whether this is what `get_megatron_optimizer` returns for adams."""
    return isinstance(optimizer, (FusedStepChain, AdamSFsdpOptimizer))


def saves_as_adams(optimizer: Any) -> bool:
    """Whether an optimizer writes adams's checkpoints, as also a MIMO model's optimizer can.

    A MIMO model has one optimizer for each module. Not every rank has a module, but every rank has
    the configuration.
    """
    return is_adams(optimizer) or asks_for_adams(getattr(optimizer, "config", None))


def asks_for_adams(config: Any) -> bool:
    """Whether an argument namespace or a configuration asks for adams."""
    return getattr(config, "optimizer", None) == ADAMS


def global_arguments(get_args: Callable[[], Any]) -> Any:
    """Return Megatron's global arguments, or an empty namespace if they are not set.

    Args:
        get_args: the function of the hooked module. Some callers replace it by their own.
    """
    try:
        args = get_args()
    except AssertionError:
        return Namespace()
    return Namespace() if args is None else args
