"""AdamS for Megatron-Core: the only package here that imports Megatron.

`register()` makes `--optimizer adams` known; `AdamSOptimizerConfig` is for code that builds its
optimizer through megatron.core's API, and `adopt` for code that does so by inner functions.
"""

from megatron_adams.megatron.config import AdamSOptimizerConfig, built_as_adam
from megatron_adams.megatron.hooks import UnsupportedMegatronError
from megatron_adams.megatron.register import adopt, register

__all__ = [
    "AdamSOptimizerConfig",
    "UnsupportedMegatronError",
    "adopt",
    "built_as_adam",
    "register",
]
