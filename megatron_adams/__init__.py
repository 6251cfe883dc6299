"""AdamS, an optimizer with one moment instead of Adam's two, for PyTorch and Megatron-Core.

`AdamS` is an ordinary torch optimizer; `register` makes Megatron accept `--optimizer adams`.
Importing this package imports nothing, and using `AdamS` only torch: neither Megatron nor CUDA.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_adams.optimizer import AdamS

__all__ = ["AdamS", "__version__", "register"]

__version__ = "0.1.0"


def register(replace: str | None = None) -> None:
    """Make `--optimizer adams` known to Megatron; call it before importing `pretrain`.

    Args:
        replace: "adam" has AdamS built also where megatron.core's API is asked for Adam, with a
            warning in the log: for frameworks whose list of optimizers is closed.
    Raises:
        ImportError: Megatron is not installed.
        UnsupportedMegatronError: it is, and the plugin does not support its version.
        ValueError: `replace` is another name than "adam".
    """
    # Imported here, because this is the only name of the package that needs Megatron.
    from megatron_adams.megatron import register as register_with_megatron

    register_with_megatron(replace)


def __getattr__(name: str) -> Any:
    # torch is imported with AdamS alone: `autoregister` is part of every start of Python.
    if name == "AdamS":
        from megatron_adams.optimizer import AdamS

        return AdamS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
