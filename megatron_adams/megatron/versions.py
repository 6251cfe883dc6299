"""What differs between the versions of Megatron-Core, and how each difference is bridged.

This is the one place for it. What a version has is found by looking at it, or by trying it, and
not from its number: fixes are backported, and a checkout has the number of a version to come.
`describe_differences` says which adapters are in use; docs/versions.md lists them by version.
Imports megatron.core alone.
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import megatron.core.optimizer
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig, clip_grads
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_adams.megatron.hooks import UnsupportedMegatronError

# Adam's tensors of a param, which Megatron 0.18 names in each of these methods. From 0.19 on, they
# read `optimizer_state_keys`.
_ADAM_KEYS = ("param", "exp_avg", "exp_avg_sq")
_METHODS_WITH_ADAM_KEYS = (
    "get_parameter_state_dp_zero",
    "load_parameter_state_from_dp_zero",
    "load_parameter_state_from_dp_zero_legacy",
    "split_state_dict_if_needed",
)
# What makes two param groups different to the scheduler. Megatron 0.18 compares other keys alone.
_SCHEDULER_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd")

# Where Megatron builds what it does not know, "adams" too: from 0.18 on one of the emerging
# optimizers, before any optimizer.
_BUILDERS = ("_get_megatron_emerging_optimizer", "_get_megatron_optimizer_based_on_param_groups")

_HAS_STATE_KEYS = hasattr(DistributedOptimizer, "optimizer_state_keys")
_HAS_DISPATCH_RESET = hasattr(DistributedDataParallel, "reset_param_sync_dispatch_state")
_TAKES_EXPERT_GROUP = (
    "expert_tp_group"
    in inspect.signature(tensor_parallel.param_is_not_tensor_parallel_duplicate).parameters
)
_HAS_EMERGING = hasattr(megatron.core.optimizer, _BUILDERS[0])
_GROUPS_QUANTIZED = hasattr(DistributedOptimizer, "_is_distopt_quantized_param")
_COMPARES_RATES = set(_SCHEDULER_KEYS) <= set(param_group_identifier_keys)

BUILDER_OF_OTHERS = f"megatron.core.optimizer.{_BUILDERS[0 if _HAS_EMERGING else 1]}"
"""The function that gets a configuration for adams which the plugin has not seen before it."""

TAKES_FSDP = "megatron_fsdp_use_decoupled_grad" in {
    field.name for field in dataclasses.fields(DistributedDataParallelConfig)
}
"""Whether Megatron-FSDP can be told how to keep gradients. adams was run with such a one alone."""

CAPTURES_STEPS = "optimizer_cuda_graph" in {f.name for f in dataclasses.fields(OptimizerConfig)}
"""Whether this Megatron can capture an optimizer's step in a CUDA graph. It came with 0.17."""

STARTS_WORKER_FIRST = hasattr(PersistentAsyncCaller, "_persistent_process")
"""Whether the persistent checkpoint worker is started before the first save, and once a process."""

STARTER_OF_WORKER: tuple[str, tuple[str, ...]] = (
    ("megatron.training.async_utils.init_persistent_async_worker", ("rank", "mp_mode"))
    if STARTS_WORKER_FIRST
    else (
        "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
        ".schedule_async_call",
        ("self", "async_req"),
    )
)
"""What starts that worker, up to 0.16 the first save, and its parameters."""

IDENTIFIER_KEYS: tuple[str, ...] = (
    *param_group_identifier_keys,
    *(key for key in _SCHEDULER_KEYS if key not in param_group_identifier_keys),
)
"""The keys of a param group that identify it in a checkpoint."""


def describe_differences() -> list[str]:
    """Return the names of the differences to Megatron 0.19 that are bridged here."""
    found = {
        "state keys": not _HAS_STATE_KEYS,
        "dispatch reset": not _HAS_DISPATCH_RESET,
        "expert groups": not _TAKES_EXPERT_GROUP,
        "group identity": not _COMPARES_RATES,
        "emerging optimizers": not _HAS_EMERGING,
        "quantized groups": not _GROUPS_QUANTIZED,
        "captured steps": not CAPTURES_STEPS,
        "checkpoint worker": not STARTS_WORKER_FIRST,
        "bucket padding": not counts_bucket_padding(),
    }
    return [name for name, is_different in found.items() if is_different]


def naming_exp_avg_alone(name: str) -> Callable[..., Any]:
    """Return a copy of one of Megatron's methods that handles exp_avg and no exp_avg_sq.

    The method's code is the same but for a constant, the tuple of Adam's tensors.

    Raises:
        UnsupportedMegatronError: it has no such constant.
    """
    method: FunctionType = inspect.getattr_static(DistributedOptimizer, name)
    code = method.__code__
    if _ADAM_KEYS not in code.co_consts:
        raise UnsupportedMegatronError(
            f"megatron.core.optimizer.DistributedOptimizer.{name}: has no "
            f"`optimizer_state_keys` to read, and does not name {_ADAM_KEYS} either, so that "
            f"megatron-adams cannot leave exp_avg_sq out of it; install another version of "
            f"megatron-core"
        )
    constants = tuple(_ADAM_KEYS[:2] if const == _ADAM_KEYS else const for const in code.co_consts)
    copy = FunctionType(
        code.replace(co_consts=constants),
        method.__globals__,
        name,
        method.__defaults__,
        method.__closure__,
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return copy


class ExpAvgOptimizer(DistributedOptimizer):
    """Megatron's DistributedOptimizer with exp_avg as the only state of a param."""

    optimizer_state_keys = ("exp_avg",)

    if not _HAS_STATE_KEYS:
        for _name in _METHODS_WITH_ADAM_KEYS:
            locals()[_name] = naming_exp_avg_alone(_name)
        del _name


def reset_param_sync_dispatch_state(model_chunk: DistributedDataParallel) -> None:
    """Mark the all-gathers of a model's params as not dispatched, after a forced one."""
    if _HAS_DISPATCH_RESET:
        model_chunk.reset_param_sync_dispatch_state()
        return
    for bucket_group in model_chunk.bucket_groups + model_chunk.expert_parallel_bucket_groups:
        assert bucket_group.param_gather_handle is None, "an all-gather of params is under way"
        bucket_group.param_gather_dispatched = False


def is_quantized(part: DistributedOptimizer, param: Tensor) -> bool:
    """Whether a model's param is kept in fp8, alone or, which came with 0.18, as one of a group."""
    if _GROUPS_QUANTIZED:
        return bool(part._is_distopt_quantized_param(param))
    return bool(is_float8tensor(param))


def tp_group_of(part: Any, param: Tensor) -> Any:
    """Return the group that a param's tensor parallel parts are split over, or repeated in.

    Args:
        part: the optimizer of Megatron's that has the param.
        param: experts' have `allreduce` False.
    """
    if getattr(param, "allreduce", True):
        return part.tp_group
    if _TAKES_EXPERT_GROUP:
        return part.expert_tp_group or part.tp_group
    # Megatron 0.18 gives no part the experts' group, and takes the other in its own grad norm.
    return parallel_state.get_expert_tensor_parallel_group(check_initialized=False) or part.tp_group


def mark_experts(part: Any, pairs: Mapping[Any, Any]) -> None:
    """Mark the inner params that belong to experts as the model's are, which 0.18 does not do.

    Args:
        part: the optimizer of Megatron's that has them.
        pairs: inner param -> the model's param, or itself.
    """
    models, mains = (
        itertools.chain.from_iterable(getattr(part, name, ()))
        for name in ("float16_groups", "fp32_from_float16_groups")
    )
    for inner, param in {**pairs, **dict(zip(mains, models, strict=True))}.items():
        if hasattr(param, "allreduce"):
            inner.allreduce = param.allreduce


def is_counted_here(part: Any, param: Tensor) -> bool:
    """Whether this rank counts a param, or a shard of one, in a sum over the tp ranks."""
    group = {"tp_group": tp_group_of(part, param)}
    if _TAKES_EXPERT_GROUP:
        group = {"tp_group": part.tp_group, "expert_tp_group": part.expert_tp_group}
    if not tensor_parallel.param_is_not_tensor_parallel_duplicate(param, **group):
        return False
    # Weights in more shards than tensor parallel ones came with 0.19.
    is_whole = getattr(layers, "param_is_not_gtp_duplicate", None)
    return is_whole is None or bool(is_whole(param))


def set_groups(inner: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Load param groups that have been paired with the inner optimizer's own.

    Megatron's distributed optimizer has paired and loaded them, too. Where it compares no learning
    rates, the groups that differ in these alone have all got the last one's.
    """
    if _COMPARES_RATES:
        return
    with inner.state_left_out():
        state_dict = inner.state_dict()
        state_dict["param_groups"] = [
            {**group, "params": own["params"]}
            for group, own in zip(groups, state_dict["param_groups"], strict=True)
        ]
        inner.load_state_dict(state_dict)


@contextmanager
def groups_as_given(parts: Iterable[Any]) -> Iterator[None]:
    """Have optimizers that are no distributed ones load groups in the order that they are in.

    Megatron pairs them with its own. Where it compares no learning rates, two groups that differ in
    these alone become one, with the params of the last.

    Args:
        parts: those whose saved groups are in the order of the current ones.
    """
    changed = [] if _COMPARES_RATES else list(parts)
    for part in changed:
        part._filter_and_reorder_param_groups = lambda current, saved: saved
    try:
        yield
    finally:
        for part in changed:
            del part._filter_and_reorder_param_groups


class _NoThreshold:
    """An infinite threshold that a norm on the device can be compared with, without a wait."""

    def __float__(self) -> float:
        return math.inf

    def __lt__(self, norm: object) -> bool:
        # `norm > threshold`: torch leaves the comparison with what is no number to the other side.
        return False


def norm_is_read() -> bool:
    """Whether Megatron's grad norm is a number of the host's, for which a step waits."""
    return getattr(clip_grads, "multi_tensor_scale_tensor_impl", None) is None


def worker_of(caller: Any = None) -> Any:
    """Return the persistent checkpoint worker, None if there is none.

    Args:
        caller: the PersistentAsyncCaller; needed where each has a worker of its own (up to 0.16).
    """
    if STARTS_WORKER_FIRST:
        return PersistentAsyncCaller._persistent_process
    return caller.process


@contextmanager
def norm_skips_no_step(parts: Iterable[Any]) -> Iterator[None]:
    """Keep Megatron from reading the norm for `grad_norm_skip_threshold`, which is infinite.

    0.18 compares the two in every step. A CUDA graph cannot wait for that.

    Args:
        parts: the optimizers of a chain.
    """
    unique = {id(part.config): part.config for part in parts}.values()
    configs = [config for config in unique if hasattr(config, "grad_norm_skip_threshold")]
    given = [config.grad_norm_skip_threshold for config in configs]
    for config in configs:
        config.grad_norm_skip_threshold = _NoThreshold()
    try:
        yield
    finally:
        for config, threshold in zip(configs, given, strict=True):
            config.grad_norm_skip_threshold = threshold


@functools.cache
def counts_bucket_padding() -> bool:
    """Whether Megatron's fully_reshardable save needs the buckets' padding in gathered state.

    It slices gathered tensors, which have no padding, by the places of params in the buffer, which
    count it. Later versions (pull request 5077) subtract it first. So Megatron's method is given
    two buckets of two elements, the first padded by two more, and the answer is which elements it
    takes for the second.

    Raises:
        UnsupportedMegatronError: it takes others still, or cannot be asked.
    """
    params = [torch.empty(2, dtype=torch.float32, device="cpu") for _ in range(2)]
    padded = SimpleNamespace(numel=lambda: 4)
    buckets = [SimpleNamespace(grad_data=padded, numel_unpadded=2, offset=4 * i) for i in (0, 1)]
    places = {param: (4 * i, 4 * i + 2, i) for i, param in enumerate(params)}
    gathered = torch.arange(6, dtype=torch.float32, device="cpu")
    optimizer = SimpleNamespace(
        gbuf_ranges=[{torch.float32: None}],
        buffers=[
            SimpleNamespace(buckets=buckets, param_index_map=places, numel=8, numel_unpadded=4)
        ],
        get_parameter_state_dp_zero=lambda **_: {0: {torch.float32: {"param": gathered}}},
    )
    model = {
        str(i): ShardedTensor.from_rank_offsets(str(i), param) for i, param in enumerate(params)
    }
    try:
        saved = DistributedOptimizer.sharded_param_state_fully_reshardable(
            optimizer, model, is_loading=False, metadata={}
        )
        found = saved[1]["param"].data.tolist()
    except Exception as exc:  # Whatever it is: it would come at the first save.
        raise _cannot_tell(repr(exc)) from exc
    if found not in ([4.0, 5.0], [2.0, 3.0]):
        raise _cannot_tell(f"it takes {found} of [0, 1, padding, 2, 3]")
    return found == [4.0, 5.0]


def _cannot_tell(what: str) -> UnsupportedMegatronError:
    return UnsupportedMegatronError(
        f"megatron.core.optimizer.DistributedOptimizer.sharded_param_state_fully_reshardable: "
        f"megatron-adams cannot tell whether it counts the padding of buckets ({what}), and would "
        f"save shifted tensors; install another version of megatron-core"
    )


def with_bucket_padding(world_tensors: dict[str, Tensor], keys: Iterable[str], buffer: Any) -> None:
    """Put the padding between buckets back into gathered tensors, if Megatron's save counts it.

    Args:
        world_tensors: key -> (buffer.numel_unpadded,); replaced by (buffer.numel,).
        keys: those of them that are tensors of params.
        buffer: the param and grad buffer that they were gathered from.
    """
    if not counts_bucket_padding():
        return
    for key in keys:
        unpadded = world_tensors[key]
        padded = unpadded.new_zeros(buffer.numel)
        start = 0
        for bucket in buffer.buckets:
            end = start + bucket.numel_unpadded
            padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = unpadded[start:end]
            start = end
        world_tensors[key] = padded
