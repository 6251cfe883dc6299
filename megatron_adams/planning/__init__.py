"""What a job takes of each GPU's memory, from its launch flags: `megatron-adams plan`.

Nothing here imports Megatron: `worker.py` does, in a process of its own.
"""

from collections.abc import Sequence

from megatron_adams.planning.lines import short
from megatron_adams.planning.process import PlanError, compute

__all__ = ["PlanError", "compute", "short", "summary"]


def summary(flags: Sequence[str], *, num_ranks: int) -> str:
    """Return a few lines on the memory of a job's fullest rank, AdamW beside AdamS.

    Takes some seconds, in a process of its own: this one keeps no trace of it. Needs no GPU and no
    network.

    Args:
        flags: of the training script, as on its command line.
        num_ranks: processes of the job: nodes times processes of a node.

    Raises:
        PlanError: a ValueError: Megatron or `plan` refuses the flags, or planning failed.
    """
    return short(compute(flags, num_ranks))
