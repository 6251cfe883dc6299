"""The update RMS of whole params, over dp and tp ranks, and of the whole model.

`connect_update_sums` gives the inner AdamS a function that turns the sums of its shards into those
of whole params. `UpdateStats.of` adds up the whole model. training/log.py writes the log. Of
Megatron, this module imports only megatron.core.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from typing_extensions import Self

from megatron_adams.megatron.adamw_shadow import shadow_of
from megatron_adams.megatron.fsdp import AdamSFsdpOptimizer
from megatron_adams.megatron.inner import InnerAdamS
from megatron_adams.megatron.versions import is_counted_here, mark_experts, tp_group_of
from megatron_adams.update import update_rms


def connect_update_sums(part: Any) -> None:
    """Give a part's inner optimizer access to the updates of whole params.

    Args:
        part: one of Megatron's optimizers, with an AdamS inside.
    """
    inner_params = _params_of(part)
    if isinstance(part, AdamSFsdpOptimizer):
        # A rank has every param, with some of its rows or none.
        everything = range(len(inner_params))
        part.optimizer.reduce_update_sums = _Reduction(everything, everything, _meshes(part))
        return
    if isinstance(part, DistributedOptimizer):
        pairs = _pairs(part)
        whole = [param for buffer in part.buffers for param in buffer.params]
        shards = [(part.data_parallel_group, range(len(whole)))]
    else:
        pairs = {param: param for param in inner_params}
        whole, shards = list(inner_params), []
    mark_experts(part, pairs)
    part.optimizer.whole_numels = {
        inner: param.numel() * _tp_size(part, param) for inner, param in pairs.items()
    }
    places = {param: index for index, param in enumerate(whole)}
    own = [places[pairs[param]] for param in inner_params]
    part.optimizer.reduce_update_sums = _Reduction(whole, own, [*shards, *_splits(part, whole)])


def _splits(part: Any, whole: Sequence[Any]) -> list[tuple[Any, Sequence[int]]]:
    """Return the tp groups that params are split over, and where these are in `whole`."""
    rows: dict[Any, list[int]] = {}
    for index, param in enumerate(whole):
        if _is_split(param) and _tp_size(part, param) > 1:
            rows.setdefault(tp_group_of(part, param), []).append(index)
    return list(rows.items())


def _meshes(part: AdamSFsdpOptimizer) -> list[tuple[Any, Sequence[int]]]:
    """Return the groups that Megatron-FSDP's params are sharded over, and the params' indices."""
    rows: dict[Any, list[int]] = {}
    for index, param in enumerate(_params_of(part)):
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate() and param.device_mesh.size(dim) > 1:
                rows.setdefault(param.device_mesh.get_group(dim), []).append(index)
    return list(rows.items())


class _Reduction:
    """Turns the sums of shards into those of whole params, by one all-reduce per group.

    All ranks of a group have the same `whole` in the same order, whatever they own. A rank without
    params takes part like any other.

    Args:
        whole: all params that the ranks have parts of.
        own: the indices of this rank's params in `whole`.
        groups: each group that params are split over, and the indices of these params in `whole`.
    """

    def __init__(
        self,
        whole: Sequence[Any],
        own: Sequence[int],
        groups: Iterable[tuple[Any, Sequence[int]]],
    ) -> None:
        device = torch.cuda.current_device()
        self._num_whole = len(whole)
        self._own = torch.tensor(own, dtype=torch.int64, device=device)
        self._groups = [
            (group, torch.tensor(rows, dtype=torch.int64, device=device)) for group, rows in groups
        ]

    def __call__(self, sums: Tensor) -> None:
        # A rank without params has its sums on the CPU.
        whole = torch.zeros(self._num_whole, 2, dtype=torch.int64, device=self._own.device)
        whole.index_add_(0, self._own, sums.to(self._own.device))
        for group, rows in self._groups:
            parts = whole[rows]
            torch.distributed.all_reduce(parts, group=group)
            whole[rows] = parts
        sums.copy_(whole[self._own])


@dataclass
class UpdateStats:
    """What a step did to the params of the whole model, each counted once.

    Attributes:
        rms: the RMS of all updates, before lr, weight decay and factors; NaN if one is not finite.
            None if the step was skipped.
        num_scaled: how many tensors' updates had a factor other than 1.
        num_tensors: the number of tensors. A tensor that is split over tp counts once.
        adamw_rms: as `rms`, of the updates that AdamW would have made; None without its shadow.
    """

    rms: float | None
    num_scaled: int
    num_tensors: int
    adamw_rms: float | None = None

    @classmethod
    def of(cls, optimizer: ChainedOptimizer | AdamSFsdpOptimizer) -> Self:
        """Return the stats of the last step. All ranks must call it.

        The ranks and the params that count are those of Megatron's grad norm.
        """
        if isinstance(optimizer, AdamSFsdpOptimizer):
            total = _count_whole(optimizer)
            torch.distributed.all_reduce(total)
            return cls._from(total)
        chain, parts = optimizer, optimizer.chained_optimizers
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
        return cls._from(total)

    @classmethod
    def _from(cls, total: Tensor) -> Self:
        counts = _Counts(*total.cpu())
        adams = torch.stack([counts.squares, counts.num_not_finite])
        adamw = torch.stack([counts.adamw_squares, counts.adamw_num_not_finite])
        return cls(
            rms=update_rms(adams, counts.numel).item() if counts.num_parts else None,
            num_scaled=int(counts.num_scaled),
            num_tensors=int(counts.num_tensors),
            adamw_rms=update_rms(adamw, counts.numel).item() if counts.num_shadows else None,
        )


class _Counts(NamedTuple):
    """What is added up over the parts of a chain and over ranks.

    Attributes:
        squares: sum of the squares of all updates, in the units of `count_squares` (update.py).
        num_not_finite: elements that are infinite or NaN.
        numel: all elements.
        num_scaled: tensors whose update had another factor than 1.
        num_tensors: all tensors.
        num_parts: parts whose last step has counted.
        adamw_squares, adamw_num_not_finite: as the first two, of AdamW's shadow.
        num_shadows: parts whose shadow has counted.
    """

    squares: Any = 0
    num_not_finite: Any = 0
    numel: Any = 0
    num_scaled: Any = 0
    num_tensors: Any = 0
    num_parts: Any = 0
    adamw_squares: Any = 0
    adamw_num_not_finite: Any = 0
    num_shadows: Any = 0

    def stacked(self) -> Tensor:
        """Return them as one tensor, (9,) int64 on the current device."""
        device = torch.cuda.current_device()
        return torch.stack(
            [torch.as_tensor(each, dtype=torch.int64, device=device) for each in self]
        )


def _count(part: Any) -> Tensor:
    """What a part adds to `_Counts`, see `_Counts.stacked`."""
    device = torch.cuda.current_device()
    if part.is_stub_optimizer or not part.optimizer.is_counted:
        return _Counts().stacked()
    params = _params_of(part)
    tp_rank = {
        group: group.rank() for group in dict.fromkeys(tp_group_of(part, param) for param in params)
    }
    starts = _starts(part)
    counts = [param_is_not_shared(param) and is_counted_here(part, param) for param in params]
    # A tensor counts on the rank that has its first element.
    heads = [
        count and param in starts and tp_rank[tp_group_of(part, param)] == 0
        for param, count in zip(params, counts, strict=True)
    ]
    counted = torch.tensor(counts, dtype=torch.bool, device=device)
    is_head = torch.tensor(heads, dtype=torch.bool, device=device)
    squares, num_not_finite = part.optimizer.update_sums().to(device)[counted].sum(dim=0)
    shadow = shadow_of(part.optimizer)
    shadow_sums = None if shadow is None else shadow.sums(part.optimizer, device)
    return _Counts(
        squares=squares,
        num_not_finite=num_not_finite,
        numel=sum(param.numel() for param, count in zip(params, counts, strict=True) if count),
        num_scaled=((part.optimizer.update_factors().to(device) != 1) & is_head).sum(),
        num_tensors=sum(heads),
        num_parts=1,
        **_of_shadow(shadow_sums, counted),
    ).stacked()


def _of_shadow(sums: Tensor | None, counted: Tensor) -> dict[str, Any]:
    """What AdamW's shadow adds to `_Counts`, from the sums of all params: (num_params, 2)."""
    if sums is None:
        return {}
    squares, num_not_finite = sums[counted].sum(dim=0)
    return {
        "adamw_squares": squares,
        "adamw_num_not_finite": num_not_finite,
        "num_shadows": 1,
    }


def _count_whole(part: AdamSFsdpOptimizer) -> Tensor:
    """Return what `_count` returns. A whole param counts on the first rank of its mesh.

    The mesh of a dense param has all ranks. The mesh of an expert's has the ranks that have this
    expert. If a mesh has no tp dimension, all tp ranks have the same param.
    """
    if part.is_stub_optimizer or not part.optimizer.is_counted:
        return _Counts().stacked()
    params = _params_of(part)
    sums = part.optimizer.update_sums()
    assert part.optimizer.reduce_update_sums is not None
    part.optimizer.reduce_update_sums(sums)
    shadow = shadow_of(part.optimizer)
    shadow_sums = None if shadow is None else shadow.sums(part.optimizer, sums.device)
    if shadow_sums is not None:
        part.optimizer.reduce_update_sums(shadow_sums)
    counts = [
        not any(param.device_mesh.get_coordinate())
        and (param.device_mesh.ndim > 1 or tp_group_of(part, param).rank() == 0)
        for param in params
    ]
    counted = torch.tensor(counts, dtype=torch.bool, device=sums.device)
    squares, num_not_finite = sums[counted].sum(dim=0)
    return _Counts(
        squares=squares,
        num_not_finite=num_not_finite,
        numel=sum(param.numel() for param, count in zip(params, counts, strict=True) if count),
        num_scaled=((part.optimizer.update_factors() != 1) & counted).sum(),
        num_tensors=sum(counts),
        num_parts=1,
        **_of_shadow(shadow_sums, counted),
    ).stacked()


def _params_of(part: Any) -> list[Any]:
    params: list[Any] = part.get_parameters()
    return params


def _pairs(part: Any) -> dict[Any, Any]:
    """Return a dict from this rank's shards of a distributed optimizer to the model's params."""
    groups = part.optimizer.param_groups
    return {
        groups[group]["params"][order]: model_param
        for model_param, (group, order) in part.model_param_group_index_map.items()
    }


def _starts(part: Any) -> set[Any]:
    """Return the params of a part whose first element this rank has."""
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


def _tp_size(part: Any, param: Any) -> int:
    return int(tp_group_of(part, param).size()) if _is_split(param) else 1


def inner_optimizers(optimizer: ChainedOptimizer | AdamSFsdpOptimizer) -> list[InnerAdamS]:
    """The AdamS of each of Megatron's optimizers that has one."""
    is_fsdp = isinstance(optimizer, AdamSFsdpOptimizer)
    parts = [optimizer] if is_fsdp else optimizer.chained_optimizers
    return [part.optimizer for part in parts if not part.is_stub_optimizer]
