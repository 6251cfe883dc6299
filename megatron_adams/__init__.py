"""AdamS, an optimizer with one moment instead of Adam's two, for PyTorch and Megatron-Core.

`AdamS` is an ordinary torch optimizer; `register` makes Megatron accept `--optimizer adams`.
Importing this package needs only torch, neither Megatron nor CUDA.
"""

from megatron_adams.optimizer import AdamS

__all__ = ["AdamS", "__version__", "register"]

__version__ = "0.1.0"


def register() -> None:
    """Make `--optimizer adams` known to Megatron; call it before importing `pretrain`.

    Raises:
        ImportError: Megatron is not installed.
    """
    # Imported here, because this is the only name of the package that needs Megatron.
    from megatron_adams.megatron import register as register_with_megatron

    register_with_megatron()
