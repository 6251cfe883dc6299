"""A recipe at the size of a CPU rehearsal: the job's own parallel layout, everything else small."""

import math

from shared.command import Flags
from shared.recipe import model_parallel_size, number

MAX_RANKS_WITH_TWO_REPLICAS = 8
"""Up to here a rehearsal has two data-parallel ranks, so that the distributed optimizer shards."""

_HEAD_SIZE = 16
_SEQUENCE = 64


def num_ranks(flags: Flags) -> int:
    """Return how many processes a rehearsal starts where nobody says it."""
    size = model_parallel_size(flags)
    return 2 * size if 2 * size <= MAX_RANKS_WITH_TWO_REPLICAS else size


def shrink(flags: Flags, ranks: int) -> Flags:
    """Return the flags that a rehearsal replaces, with their small values.

    Parallel sizes stay, and so do the flags of the optimizer and of the checkpoints. Every pipeline
    stage gets a layer, and every tensor-parallel rank attention heads and a group of them.

    Args:
        flags: the job's own.
        ranks: processes of the rehearsal, a multiple of the model-parallel size.
    """
    tensor = number(flags, "tensor-model-parallel-size", 1)
    pipeline = number(flags, "pipeline-model-parallel-size", 1)
    stages = pipeline * number(flags, "num-virtual-stages-per-pipeline-rank", 1)
    groups = max(tensor, 2)
    # Twice as many heads as groups where the job groups its queries.
    heads = 2 * groups if "group-query-attention" in flags else groups
    hidden = heads * _HEAD_SIZE
    small: Flags = {
        "num-layers": max(stages, 2),
        "hidden-size": hidden,
        "num-attention-heads": heads,
        "seq-length": _SEQUENCE,
        "max-position-embeddings": _SEQUENCE,
        "micro-batch-size": 1,
        # At least two micro-batches a rank: gradients are added up, and the pipeline fills.
        "global-batch-size": ranks // model_parallel_size(flags) * max(pipeline, 2),
        "train-iters": 8,
        "lr-warmup-iters": 2,
        "eval-interval": 3,  # no divisor of train-iters: the last evaluation would run twice
        "eval-iters": 1,
        "log-interval": 1,
        "save-interval": 4,
        "num-workers": 0,
        "distributed-timeout-minutes": 5,
    }
    if "group-query-attention" in flags:
        small["num-query-groups"] = groups
    if "ffn-hidden-size" in flags:
        ratio = number(flags, "ffn-hidden-size") / number(flags, "hidden-size")
        small["ffn-hidden-size"] = math.ceil(hidden * ratio / (8 * tensor)) * 8 * tensor
    return small


def describe(job: Flags, small: Flags, dropped: list[str]) -> list[str]:
    """Return what a rehearsal changes, a line for each kind of change."""
    changed = ", ".join(
        f"{name} {job[name]} -> {value}" if name in job else f"{name} {value}"
        for name, value in small.items()
        if job.get(name) != value
    )
    lines = [f"CPU rehearsal: smaller than the job: {changed}"]
    if dropped:
        lines.append(
            "CPU rehearsal: left out, because Megatron's own layers, which run on CPUs, have none "
            f"of it: {', '.join(f'--{name}' for name in dropped)}"
        )
    return lines
