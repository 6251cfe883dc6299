"""The update RMS of Megatron's params: of whole ones, over dp and tp, and of the whole model.

`connect` tells the inner AdamS how the sums of its shards become those of whole params;
`UpdateStats.of` adds up the model. Imports megatron.core alone; training_log.py writes the log.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_adams.update import update_rms


def connect(part: Any) -> None:
    """Have the inner optimizer of a part know the updates of whole params.

    Args:
        part: one of Megatron's optimizers, with an AdamS inside.
    """
    inner_params = _params_of(part)
    if isinstance(part, DistributedOptimizer):
        pairs = _pairs(part)
        whole = [param for buffer in part.buffers for param in buffer.params]
        group = part.data_parallel_group
    else:
        pairs = {param: param for param in inner_params}
        whole, group = list(inner_params), None
    part.optimizer.whole_numels = {
        inner: param.numel() * _tp_size(part, param) for inner, param in pairs.items()
    }
    places = {param: index for index, param in enumerate(whole)}
    own = [places[pairs[param]] for param in inner_params]
    part.optimizer.reduce_update_sums = _Reduction(part, whole, own, group)


class _Reduction:
    """The sums of shards become those of whole params, in one or two all-reduces.

    All ranks of a group have the same `whole` in the same order, whatever each owns, so that a rank
    without params takes part like any other.

    Args:
        part: Megatron's optimizer.
        whole: all of the params that the ranks of `group` have parts of.
        own: where this rank's params are in `whole`.
        group: over which params are cut into shards; None: they are not.
    """

    def __init__(self, part: Any, whole: Sequence[Any], own: Sequence[int], group: Any) -> None:
        device = torch.cuda.current_device()
        self._num_whole = len(whole)
        self._own = torch.tensor(own, dtype=torch.int64, device=device)
        self._group = group
        tp_groups = dict.fromkeys(_tp_group(part, param) for param in whole)
        self._splits = []
        for tp_group in tp_groups:
            indices = [
                index
                for index, param in enumerate(whole)
                if _is_split(param) and _tp_group(part, param) is tp_group
            ]
            if indices and tp_group.size() > 1:
                rows = torch.tensor(indices, dtype=torch.int64, device=device)
                self._splits.append((tp_group, rows))

    def __call__(self, sums: Tensor) -> None:
        # A rank without params has its sums on no device.
        whole = torch.zeros(self._num_whole, 2, dtype=torch.int64, device=self._own.device)
        whole.index_add_(0, self._own, sums.to(self._own.device))
        if self._group is not None:
            torch.distributed.all_reduce(whole, group=self._group)
        for tp_group, rows in self._splits:
            parts = whole[rows]
            torch.distributed.all_reduce(parts, group=tp_group)
            whole[rows] = parts
        sums.copy_(whole[self._own])


@dataclass
class UpdateStats:
    """What a step did to the params of the whole model, each counted once.

    Attributes:
        rms: of all updates, before lr, weight decay and factors; NaN where one is not finite. None
            where the step was skipped.
        num_scaled: tensors whose update had another factor than 1.
        num_tensors: all of them; those that are cut over tp count once.
    """

    rms: float | None
    num_scaled: int
    num_tensors: int

    @classmethod
    def of(cls, chain: ChainedOptimizer) -> Self:
        """Of the last step of a chain; to be called on all ranks.

        The ranks, and the params that count, are those of Megatron's grad norm.
        """
        parts = chain.chained_optimizers
        rows = [_count(part) for part in parts]
        if not parts:
            return cls(None, 0, 0)
        if chain.grads_states_parallel_group_is_shared():
            total = torch.stack(rows).sum(dim=0)
            torch.distributed.all_reduce(total, group=chain.get_grad_stats_parallel_group())
        else:
            for part, row in zip(parts, rows, strict=True):
                torch.distributed.all_reduce(row, group=part.get_grad_stats_parallel_group())
            total = torch.stack(rows).sum(dim=0)
        *_, numel, num_scaled, num_tensors, num_counted = total.tolist()
        # In double, as its square is an integer of 63 bits.
        rms = update_rms(total[:2].cpu(), torch.tensor(numel)).item()
        return cls(rms if num_counted else None, num_scaled, num_tensors)


def _count(part: Any) -> Tensor:
    """(6,) int64: the sums of squares, elements, tensors that were scaled, tensors, parts."""
    device = torch.cuda.current_device()
    total = torch.zeros(6, dtype=torch.int64, device=device)
    if part.is_stub_optimizer or not part.optimizer.is_counted:
        return total
    params = _params_of(part)
    tp_rank = {
        group: group.rank() for group in dict.fromkeys(_tp_group(part, param) for param in params)
    }
    starts = _starts(part)
    counts = [
        param_is_not_shared(param)
        and param_is_not_tensor_parallel_duplicate(
            param, tp_group=part.tp_group, expert_tp_group=part.expert_tp_group
        )
        for param in params
    ]
    # A tensor is where its first element is.
    heads = [
        count and param in starts and tp_rank[_tp_group(part, param)] == 0
        for param, count in zip(params, counts, strict=True)
    ]
    counted = torch.tensor(counts, dtype=torch.bool, device=device)
    is_head = torch.tensor(heads, dtype=torch.bool, device=device)
    total[:2] = part.optimizer.update_sums().to(device)[counted].sum(dim=0)
    total[2] = sum(param.numel() for param, count in zip(params, counts, strict=True) if count)
    total[3] = ((part.optimizer.update_factors().to(device) != 1) & is_head).sum()
    total[4] = sum(heads)
    total[5] = 1
    return total


def _params_of(part: Any) -> list[Any]:
    params: list[Any] = part.get_parameters()
    return params


def _pairs(part: Any) -> dict[Any, Any]:
    """This rank's shards of a distributed optimizer -> the model's params."""
    groups = part.optimizer.param_groups
    return {
        groups[group]["params"][order]: model_param
        for model_param, (group, order) in part.model_param_group_index_map.items()
    }


def _starts(part: Any) -> set[Any]:
    """The params of a part that begin on this rank."""
    if not isinstance(part, DistributedOptimizer):
        return set(_params_of(part))
    return {
        shard
        for shard, model_param in _pairs(part).items()
        if part._get_model_param_range_map(model_param)["param"].start == 0
    }


def _is_split(param: Any) -> bool:
    """Whether the tp ranks have different parts of a param."""
    return bool(getattr(param, "tensor_model_parallel", False))


def _tp_group(part: Any, param: Any) -> Any:
    """As megatron.core.tensor_parallel.layers.param_is_not_tensor_parallel_duplicate (0.19)."""
    is_expert = not getattr(param, "allreduce", True)
    return part.expert_tp_group if is_expert and part.expert_tp_group else part.tp_group


def _tp_size(part: Any, param: Any) -> int:
    return int(_tp_group(part, param).size()) if _is_split(param) else 1


def inner_optimizers(chain: ChainedOptimizer) -> Iterable[Any]:
    """The AdamS of each part of a chain that has one."""
    return (part.optimizer for part in chain.chained_optimizers if not part.is_stub_optimizer)
