"""What the ranks of test_versions.py run."""

import argparse
import importlib
import inspect
from typing import Any

from tests.distributed import checkpoint_cases


def differences() -> dict[str, Any]:
    """Return the number of this Megatron, and what the plugin bridges of it."""
    import megatron.core

    from megatron_adams.megatron.versions import describe_differences

    return {"version": megatron.core.__version__, "differences": describe_differences()}


def has(flag: str | None = None, attribute: str | None = None) -> bool:
    """Whether this Megatron has a flag, or its optimizer reads an attribute of params."""
    from megatron.core.optimizer import optimizer
    from megatron.training.arguments import add_megatron_arguments

    if flag is not None:
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        return flag in parser._option_string_actions
    return str(attribute) in inspect.getsource(optimizer)


def is_megatron_fsdp_stepped() -> bool:
    """Whether adams takes this Megatron's FSDP. Up to 0.17 it is refused."""
    from megatron_adams.megatron.versions import TAKES_FSDP

    return TAKES_FSDP


def save_with_the_padding_of_another_version(argv: str) -> list[dict[str, Any]]:
    """`train_and_place`, with buckets' padding handled as this Megatron does not want it."""
    from megatron_adams.megatron import versions

    is_counted = versions.counts_bucket_padding()
    versions.counts_bucket_padding = lambda: not is_counted  # type: ignore[assignment]
    return checkpoint_cases.train_and_place(argv)


def padding_of(change: str) -> str:
    """Ask `counts_bucket_padding` of a Megatron whose save has changed; return what it raises.

    Args:
        change: "other elements" or "another layout".
    """
    from megatron.core.optimizer import DistributedOptimizer

    from megatron_adams.megatron import versions

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        saved = original(self, *args, **kwargs)
        if change == "another layout":
            return {"state": saved}
        for tensors in saved.values():
            tensors["param"].data = tensors["param"].data + 1
        return saved

    DistributedOptimizer.sharded_param_state_fully_reshardable = changed
    versions.counts_bucket_padding.cache_clear()
    try:
        versions.counts_bucket_padding()
    except RuntimeError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "nothing"


def captured_step_of_a_megatron_without() -> str:
    """Ask a Megatron that captures no step (0.16) for it; return what the configuration raises."""
    from megatron_adams.megatron import versions
    from megatron_adams.megatron.config import AdamSOptimizerConfig

    versions.CAPTURES_STEPS = False
    try:
        AdamSOptimizerConfig(lr=1e-3, optimizer_cuda_graph=True).finalize()
    except ValueError as exc:
        return str(exc)
    return "nothing"


def state_keys_without_a_constant() -> str:
    """Ask for Adam's tensors to be left out of a method that names none; return what it raises."""
    from megatron_adams.megatron import versions

    try:
        versions.naming_exp_avg_alone("state_dict")
    except RuntimeError as exc:
        return f"{type(exc).__name__}: {exc}"
    return "nothing"


def overridden_without_being_relied_on() -> list[str]:
    """Return what the plugin's classes override of Megatron's that `register()` does not look at.

    A private method that a version adds under a name of the plugin's would be replaced by it.
    """
    from megatron_adams.megatron import distributed, fsdp, fused_step, offload

    relied_on = {symbol.path.rpartition(".")[2] for symbol in register_module()._RELIED_ON}
    relied_on |= {"optimizer_state_keys", "_abc_impl"}  # bridged in versions.py; Python's own
    classes = (
        distributed.AdamSDistributedOptimizer,
        distributed.AdamSChainedOptimizer,
        fused_step.FusedStepOptimizer,
        fused_step.FusedStepChain,
        fsdp.AdamSFsdpOptimizer,
        offload.HybridAdamS,
    )
    return sorted(
        {
            f"{base.__name__}.{name}"
            for own in classes
            for name in vars(own)
            for base in own.__mro__
            if base.__module__.startswith("megatron.") and name in vars(base)
            if not name.startswith("__") and name not in relied_on
        }
    )


def register_module() -> Any:
    """The module, whose name in the package is that of its function."""
    return importlib.import_module("megatron_adams.megatron.register")
