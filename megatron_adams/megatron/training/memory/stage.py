"""The ranks of one pipeline stage, and what each of them holds."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.distrib_optimizer import Range
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.module import param_is_not_shared

from megatron_adams.megatron.config import NO_PRECISION
from megatron_adams.megatron.names import ADAMS
from megatron_adams.megatron.training import shapes
from megatron_adams.megatron.training.job_flags import refusals
from megatron_adams.megatron.training.memory.modes import OWN, StateMode, in_mode
from megatron_adams.megatron.training.memory.rank import (
    build_model,
    build_optimizer,
    buildable,
    entered,
    without_memory,
)
from megatron_adams.megatron.training.memory.tallies import (
    Rates,
    Tally,
    as_adam,
    gradient_bytes,
    optimizer_tallies,
    weight_bytes,
)


class Shard(NamedTuple):
    """Elements and tensors of model params that are one rank's to update."""

    numel: int
    num_tensors: int


class _Buffer(NamedTuple):
    """Where the params of one of DDP's buffers lie, and over how many ranks it is sharded.

    Attributes:
        width: bytes of a model param.
        is_expert: whether it is sharded over the expert dp ranks.
        dp_size: of the group that it is sharded over.
        param_index_map: param -> its start and end in the buffer, and its bucket.
        buckets: start and end of each; each is a multiple of dp_size long.
    """

    width: int
    is_expert: bool
    dp_size: int
    param_index_map: dict[Any, tuple[int, int, int]]
    buckets: list[tuple[int, int]]

    def shard(self, dp_rank: int) -> Shard:
        """What belongs to a dp rank, by Megatron's own map of ranges."""
        of_buckets: list[dict[Any, tuple[int, int, int]]] = [{} for _ in self.buckets]
        for param, place in self.param_index_map.items():
            of_buckets[place[2]][param] = place
        numel = num_tensors = 0
        for params, (start, end) in zip(of_buckets, self.buckets, strict=True):
            # As DistributedOptimizer._build_model_gbuf_range (0.19), for any dp rank.
            size = (end - start) // self.dp_size
            own = Range(start + dp_rank * size, start + (dp_rank + 1) * size)
            ranges = DistributedOptimizer._build_model_gbuf_param_range_map(params, own, start)
            numel += sum(each["param"].size for each in ranges.values())
            num_tensors += len(ranges)
        return Shard(numel, num_tensors)


def _buffers(model: Sequence[Any]) -> list[_Buffer]:
    return [
        _Buffer(
            buffer.param_dtype.itemsize,
            is_expert,
            buffer.data_parallel_group.size(),
            buffer.param_index_map,
            list(buffer.bucket_indices),
        )
        for chunk in model
        for is_expert, buffers in ((False, chunk.buffers), (True, chunk.expert_parallel_buffers))
        for buffer in buffers
    ]


def _sum_by_width(shards: Iterator[tuple[int, Shard]]) -> dict[int, Shard]:
    """Shards with something in them, added up by the width of the model params."""
    sums: dict[int, Shard] = {}
    for width, shard in shards:
        before = sums.get(width, Shard(0, 0))
        sums[width] = Shard(before.numel + shard.numel, before.num_tensors + shard.num_tensors)
    return {width: shard for width, shard in sums.items() if shard.numel}


class Stage:
    """The ranks of one pipeline stage: what one of them holds, and which shards the others have.

    Ranks that differ by their tp, cp or ep place have params of the same shapes. Ranks that differ
    by their dp place have other shards of the same buffers.

    Args:
        args: `validated` ones of the job.
        modes: to count.
        rank: the one that is built.

    Attributes:
        weights: bytes of the model params.
        gradients: bytes by mode.
        rates: of the optimizer, by mode and width of the model params.
        model: the one that was built last, of fake tensors.
        groups: of all ranks of the job.
        shards_at: dp size -> the shards of the first rank of this stage in a job of that size.
    """

    weights: int
    model: list[Any]

    def __init__(
        self,
        args: argparse.Namespace,
        modes: Sequence[StateMode],
        rank: int,
        dp_sizes: Sequence[int] = (),
    ) -> None:
        self.rates: dict[str, dict[int, Rates]] = {}
        self.gradients: dict[str, int] = {}
        self._args = args
        with entered(args, rank) as self.groups, without_memory(), refusals():
            self._build(modes)
            self._buffers = _buffers(self.model)
            self.shards_at = {size: self._shards_at(size) for size in dp_sizes}
        if args.use_distributed_optimizer:
            shards = self.shards(rank)
            assert shards == self._built, (shards, self._built)

    def _build(self, modes: Sequence[StateMode]) -> None:
        models: dict[bool, list[Any]] = {}
        counted: dict[tuple[Any, ...], dict[int, Tally]] = {}
        for mode in modes:
            args = buildable(in_mode(self._args, mode))
            in_fp32 = args.accumulate_allreduce_grads_in_fp32
            if in_fp32 not in models:
                models[in_fp32] = build_model(args)
            self.model = models[in_fp32]
            self.weights = weight_bytes(self.model)
            self.gradients[mode.name] = gradient_bytes(self.model)
            # TransformerEngine's FusedAdam, which is not here, has AdamS's shards and formats.
            is_fused_adam = mode.optimizer == "adam" and args.use_precision_aware_optimizer
            if is_fused_adam:
                args.optimizer, args.exp_avg_sq_dtype = ADAMS, torch.float32
            key = (
                args.optimizer,
                *(getattr(args, name) for name in (*NO_PRECISION, *OWN)),
            )
            if key not in counted:
                chain = build_optimizer(args, self.model)
                counted[key] = optimizer_tallies(chain, self.model, args.params_dtype.itemsize)
            tallies = counted[key]
            self._built = {
                width: Shard(tally.numel, tally.num_tensors) for width, tally in tallies.items()
            }
            if is_fused_adam:
                tallies = as_adam(tallies, mode.settings)
            self.rates[mode.name] = {width: Rates.of(tally) for width, tally in tallies.items()}

    def shards(self, rank: int) -> dict[int, Shard]:
        """What is a rank's of this stage to update, by the width of the model params."""
        if not self._args.use_distributed_optimizer:
            return self._built
        return _sum_by_width(
            (buffer.width, buffer.shard(self._place(buffer, rank))) for buffer in self._buffers
        )

    def _place(self, buffer: _Buffer, rank: int) -> int:
        """The rank's place among those that a buffer is sharded over."""
        name = "EXPERT_DATA_PARALLEL_GROUP" if buffer.is_expert else "DATA_PARALLEL_GROUP_WITH_CP"
        if self._args.num_distributed_optimizer_instances > 1:
            name = name if buffer.is_expert else f"INTRA_PARTIAL_{name}"
        return self.groups.place(name, buffer.dp_size, rank)

    def places(self, rank: int) -> tuple[int, ...]:
        """What tells a rank's shards from those of others of this stage."""
        if not self._args.use_distributed_optimizer:
            return ()
        return tuple(self._place(buffer, rank) for buffer in self._buffers)

    def _shards_at(self, dp_size: int) -> dict[int, Shard] | None:
        """The shards of the first rank of this stage with another dp size.

        None: the expert dp ranks would be no whole number, or no multiple of the instances.
        """
        from megatron.training.training import get_megatron_ddp_config, resolve_ddp_bucket_size

        args = self._args
        num_instances = args.num_distributed_optimizer_instances
        dp_cp_size = dp_size * args.context_parallel_size
        expert_tp_size = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
        expert_size, rest = divmod(
            dp_cp_size * args.tensor_model_parallel_size,
            expert_tp_size * args.expert_model_parallel_size,
        )
        if rest or dp_cp_size % num_instances or expert_size % num_instances:
            return None
        config = get_megatron_ddp_config(args)
        num_params = sum(p.numel() for chunk in self.model for p in chunk.parameters())
        bucket_size = resolve_ddp_bucket_size(
            config, _Size(dp_cp_size), config.overlap_grad_reduce, num_params
        )
        buffers = []
        for chunk in self.model:
            layouts = DistributedOptimizer.compute_full_param_layout(
                [param for param in chunk.parameters() if param.requires_grad],
                None if chunk.bucket_size is None else bucket_size,
                dp_cp_size // num_instances,
                config,
                expert_data_parallel_world_size=expert_size // num_instances,
            ).layouts
            buffers += [
                _Buffer(
                    key.param_dtype.itemsize,
                    key.is_expert_parallel,
                    layout.num_optimizer_shards,
                    layout.param_index_map,
                    layout.bucket_indices,
                )
                for key, layout in layouts.items()
            ]
        return _sum_by_width((buffer.width, buffer.shard(0)) for buffer in buffers)

    def ranks_of(self, pp_rank: int) -> list[int]:
        """All ranks of a pipeline stage."""
        args = self._args
        size = args.pipeline_model_parallel_size
        return [
            rank
            for rank in range(args.world_size)
            if self.groups.place("PIPELINE_MODEL_PARALLEL_GROUP", size, rank) == pp_rank
        ]

    def optimizer_bytes(self, mode: str, shards: dict[int, Shard]) -> dict[str, int]:
        """Bytes of the optimizer's tensors for these shards, by kind."""
        kinds: Counter[str] = Counter()
        for width, shard in shards.items():
            kinds.update(self.rates[mode][width].bytes_of(*shard))
        return dict(sorted(kinds.items()))

    def count(self, rank: int) -> dict[str, Any]:
        """What a rank of this stage holds."""
        shards = self.shards(rank)
        return {
            "numel": sum(shard.numel for shard in shards.values()),
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": {mode: self.optimizer_bytes(mode, shards) for mode in self.rates},
        }

    def bytes_per_param(self, mode: str) -> int:
        """Bytes of the optimizer for an element of most params, without scales."""
        rates = self.rates[mode]
        return sum(rates[min(rates)].per_element.values())

    def num_params(self) -> int:
        """Elements of the params of this stage in one replica of the model.

        Params that are copies of another stage's are left out.
        """
        return sum(
            param.numel() * _num_parts(module, name, param, self._args)
            for chunk in self.model
            for module in chunk.modules()
            for name, param in module.named_parameters(recurse=False)
            if param_is_not_shared(param)
        )


def _num_parts(module: Any, name: str, param: Any, args: argparse.Namespace) -> int:
    """Of how many ranks' parts a whole param is made."""
    is_expert = not getattr(param, "allreduce", True)
    tp_size = args.tensor_model_parallel_size
    num_parts = 1
    if is_expert:
        num_parts = args.expert_model_parallel_size
        tp_size = args.expert_tensor_parallel_size or tp_size
    is_row = isinstance(module, (RowParallelLinear, shapes.GroupedRowParallelLinear))
    is_column = isinstance(
        module, (ColumnParallelLinear, VocabParallelEmbedding, shapes.GroupedColumnParallelLinear)
    )
    is_norm = name.startswith("layer_norm_")
    is_split = (is_row and name.startswith("weight")) or (is_column and not is_norm)
    return num_parts * (tp_size if is_split else 1)


class _Size(NamedTuple):
    """A process group of which Megatron asks nothing but the size."""

    num_ranks: int

    def size(self) -> int:
        return self.num_ranks
