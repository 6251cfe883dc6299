"""The bytes of every rank of a job."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import megatron.core

from megatron_adams.megatron.names import ADAMS
from megatron_adams.megatron.refusals import guards_given
from megatron_adams.megatron.training.job_flags import validated
from megatron_adams.megatron.training.memory.modes import (
    StateMode,
    dtypes_of,
    flags_of_mode,
    modes_of,
)
from megatron_adams.megatron.training.memory.stage import Stage


def _dp_sizes(dp_size: int) -> list[int]:
    """Powers of two around a dp size, and itself."""
    sizes = {dp_size}
    size = 1
    while size <= max(4 * dp_size, 64):
        sizes.add(size)
        size *= 2
    return sorted(sizes)


def _as_ranges(ranks: Sequence[int]) -> list[list[int]]:
    """[0, 1, 2, 8, 9] as [[0, 3], [8, 10]]."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][1] == rank:
            ranges[-1][1] += 1
        else:
            ranges.append([rank, rank + 1])
    return ranges


def _activation_bytes(args: argparse.Namespace) -> tuple[float, str]:
    """Megatron's estimate for the first pipeline stage, and which of its two formulas it is."""
    from megatron.training import theoretical_memory_usage as usage

    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    # The formulas know no context parallelism, which cuts the sequence.
    args = argparse.Namespace(**vars(args))
    args.seq_length = args.seq_length / args.context_parallel_size
    # As report_theoretical_memory chooses (theoretical_memory_usage.py, 0.19).
    is_precise = args.sequence_parallel and args.recompute_granularity == "selective"
    name = f"compute_activation_memory{'' if is_precise else '_without_sp'}"
    estimate = getattr(usage, name)(args, num_microbatches)
    return estimate, name


def _notes(args: argparse.Namespace) -> list[str]:
    """What the numbers of this job leave out or round."""
    notes = []
    if args.fp8_param_gather or args.fp4_param_gather:
        notes.append(
            "Weights that are kept in fp8 or fp4 are counted in bf16, as TransformerEngine alone "
            "can build them."
        )
    if args.recompute_granularity == "full":
        notes.append(
            "Activations: Megatron's estimate does not know --recompute-granularity full, with "
            "which they take far less."
        )
    if not args.use_distributed_optimizer:
        notes.append(
            "Without --use-distributed-optimizer every dp rank keeps the whole state, and there "
            "are no precision-aware modes."
        )
    return notes


def _kinds_of_ranks(stage: Stage, pp_rank: int) -> list[dict[str, Any]]:
    """Return the bytes of a pipeline stage's ranks, one entry for all ranks that have the same."""
    counted: dict[tuple[int, ...], dict[str, Any]] = {}
    kinds: dict[str, dict[str, Any]] = {}
    for rank in stage.ranks_of(pp_rank):
        places = stage.places(rank)
        if places not in counted:
            counted[places] = stage.count(rank)
        key = json.dumps(counted[places], sort_keys=True)
        kinds.setdefault(key, {"pipeline_stage": pp_rank, "ranks": [], **counted[places]})
        kinds[key]["ranks"].append(rank)
    for kind in kinds.values():
        kind["num_ranks"] = len(kind["ranks"])
        kind["ranks"] = _as_ranges(kind["ranks"])
    return list(kinds.values())


def _optimizer_bytes_by_dp_size(
    stages: Sequence[Stage], modes: Sequence[StateMode], dp_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the optimizer's bytes on the fullest stage for each dp size that all stages can have.

    They are by the name of the mode.
    """
    by_dp_size = []
    for dp_size in dp_sizes:
        at_size = [(stage, stage.shards_at[dp_size]) for stage in stages]
        if any(shards is None for _, shards in at_size):
            continue
        optimizer = {
            mode.name: max(
                sum(stage.optimizer_bytes(mode.name, shards or {}).values())
                for stage, shards in at_size
            )
            for mode in modes
        }
        by_dp_size.append({"dp_size": dp_size, "optimizer": optimizer})
    return by_dp_size


def count(
    flags: Sequence[str], num_ranks: int, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Count the bytes of every rank of a job.

    Args:
        flags: of the training script.
        num_ranks: processes of the job.
        report: is called with a line of progress.

    Returns:
        For JSON; planning/results.py has its fields.

    Raises:
        RefusedError: the flags make no job that can be planned.
    """
    args = validated(flags, num_ranks)
    modes, given = modes_of(args)
    pp_size = args.pipeline_model_parallel_size
    dp_sizes = _dp_sizes(args.data_parallel_size) if args.use_distributed_optimizer else []
    stages: list[Stage] = []
    kinds: list[dict[str, Any]] = []
    first: Stage | None = None
    for pp_rank in range(pp_size):
        report(f"pipeline stage {pp_rank + 1} of {pp_size}")
        rank = 0 if first is None else first.ranks_of(pp_rank)[0]
        stage = Stage(args, modes, rank, dp_sizes)
        first = first or stage
        stages.append(stage)
        kinds += _kinds_of_ranks(stage, pp_rank)
    activations, formula = _activation_bytes(args)
    return {
        "megatron": megatron.core.__version__,
        "num_ranks": num_ranks,
        "layout": {
            "tp": args.tensor_model_parallel_size,
            "pp": pp_size,
            "vpp": args.virtual_pipeline_model_parallel_size or 1,
            "cp": args.context_parallel_size,
            "ep": args.expert_model_parallel_size,
            "dp": args.data_parallel_size,
        },
        "model": {
            "num_layers": args.num_layers,
            "hidden_size": args.hidden_size,
            "seq_length": args.seq_length,
            "padded_vocab_size": args.padded_vocab_size,
            "num_experts": args.num_experts or 0,
            "num_params": sum(stage.num_params() for stage in stages),
        },
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.global_batch_size,
        "is_sharded": args.use_distributed_optimizer,
        "clips_gradients": args.clip_grad > 0,
        "given": given,
        "modes": [
            {
                "name": mode.name,
                "optimizer": mode.optimizer,
                "is_precision_aware": mode.settings["use_precision_aware_optimizer"],
                "bytes_per_param": stages[0].bytes_per_param(mode.name),
                "dtypes": dtypes_of(args, mode),
                "is_guarded": mode.optimizer == ADAMS and bool(guards_given(args)),
                "flags": flags_of_mode(args, mode),
            }
            for mode in modes
        ],
        "kinds": kinds,
        "activations": {
            "bytes": round(activations),
            "formula": formula,
            "recompute_granularity": args.recompute_granularity,
        },
        "by_dp_size": _optimizer_bytes_by_dp_size(stages, modes, dp_sizes),
        "notes": _notes(args),
    }
