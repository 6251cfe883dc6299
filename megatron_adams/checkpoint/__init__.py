"""From Adam to AdamS: optimizer state, and whole checkpoints of Megatron, without Megatron.

from_adam.py turns an Adam's groups and state into AdamS's, files.py knows the formats on disk,
conversion.py writes a checkpoint of Adam's as one of AdamS, and moments.py takes the size of both
optimizers' updates from one. Called by megatron/ while a checkpoint is loaded, and by the commands
`megatron-adams convert` and `megatron-adams tune`.
"""

from megatron_adams.checkpoint.conversion import Conversion, convert
from megatron_adams.checkpoint.files import (
    METADATA_WRITTEN_LAST,
    TRACKER,
    DamagedCheckpointError,
    damage,
    is_fsdp_dtensor,
    is_legacy,
    saved_arguments,
)
from megatron_adams.checkpoint.from_adam import (
    continued_from_adam,
    contradict,
    group_from_adam,
    is_adam_group,
    shifted_message,
    state_dict_from_adam,
    unfit_for_adams,
)
from megatron_adams.checkpoint.moments import AdamMoments, read_moments

__all__ = [
    "METADATA_WRITTEN_LAST",
    "TRACKER",
    "AdamMoments",
    "Conversion",
    "DamagedCheckpointError",
    "continued_from_adam",
    "contradict",
    "convert",
    "damage",
    "group_from_adam",
    "is_adam_group",
    "is_fsdp_dtensor",
    "is_legacy",
    "read_moments",
    "saved_arguments",
    "shifted_message",
    "state_dict_from_adam",
    "unfit_for_adams",
]
