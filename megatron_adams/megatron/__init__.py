"""AdamS for Megatron-Core: the only package here that imports Megatron.

`register()` makes `--optimizer adams` known; `AdamSOptimizerConfig` is for code that builds its
optimizer through megatron.core's API.
"""

from megatron_adams.megatron.config import AdamSOptimizerConfig
from megatron_adams.megatron.hooks import UnsupportedMegatronError
from megatron_adams.megatron.register import register

__all__ = ["AdamSOptimizerConfig", "UnsupportedMegatronError", "register"]
