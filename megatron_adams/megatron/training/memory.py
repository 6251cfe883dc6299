"""The bytes of each rank of a job, from Megatron's own buffers and optimizers, without memory.

`megatron-adams plan` runs this in a process of its own (planning/worker.py): it validates a job's
flags, enters the job as one of its ranks over torch's fake process groups, and builds Megatron's
model, DDP buffers and optimizers of fake tensors, which have shapes, dtypes and storages, and no
memory. torch.cuda's stand-in has to be installed, the plugin be registered, and TransformerEngine
and Apex be hidden, so that the same is built everywhere.
"""

import argparse
import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import Range
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.module import param_is_not_shared
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_adams.megatron.config import NO_PRECISION
from megatron_adams.megatron.names import ADAMS, DEFAULT_BETA2, dtype_name, flag_of
from megatron_adams.megatron.refusals import guards_given
from megatron_adams.megatron.training import shapes
from megatron_adams.megatron.training.job_flags import refusals, validated
from megatron_adams.optimizer import AdamS

MAIN_PARAMS, REMAINDERS, SCALES = "main_params", "remainders", "scales"
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"

# --- modes --------------------------------------------------------------------------------------


class StateMode(NamedTuple):
    """One way to keep the optimizer's state.

    Attributes:
        name: for JSON.
        optimizer: "adam" or "adams".
        settings: Megatron's arguments that make it.
    """

    name: str
    optimizer: str
    settings: dict[str, Any]


def _aware(**dtypes: torch.dtype) -> dict[str, Any]:
    return {**NO_PRECISION, "use_precision_aware_optimizer": True, **dtypes}


MODES = (
    StateMode("adamw", "adam", NO_PRECISION),
    StateMode("adams", ADAMS, NO_PRECISION),
    StateMode("adamw_precision_aware", "adam", _aware()),
    StateMode("adams_precision_aware", ADAMS, _aware()),
    StateMode(
        "adamw_precision_aware_bf16",
        "adam",
        _aware(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16),
    ),
    StateMode("adams_precision_aware_bf16", ADAMS, _aware(exp_avg_dtype=torch.bfloat16)),
    StateMode(
        "adamw_precision_aware_fp8",
        "adam",
        _aware(exp_avg_dtype=torch.uint8, exp_avg_sq_dtype=torch.uint8),
    ),
    StateMode("adams_precision_aware_fp8", ADAMS, _aware(exp_avg_dtype=torch.uint8)),
)
_OWN = ("adams_no_param_remainders",)


def modes_of(args: argparse.Namespace) -> tuple[list[StateMode], str]:
    """The modes to compare for a job, and the name of the one that its flags ask for.

    The precision-aware modes need the distributed optimizer. A mode that the flags ask for and
    that is none of MODES comes last, as "as_given".
    """
    modes = [
        mode
        for mode in MODES
        if args.use_distributed_optimizer or not mode.settings["use_precision_aware_optimizer"]
    ]
    settings = {name: getattr(args, name) for name in NO_PRECISION}
    is_adam = args.optimizer == "adam"
    settings["exp_avg_sq_dtype"] = args.exp_avg_sq_dtype if is_adam else torch.float32
    settings |= {name: getattr(args, name, False) for name in _OWN}
    given = StateMode("as_given", args.optimizer, settings)
    for mode in modes:
        full = {**dict.fromkeys(_OWN, False), "exp_avg_sq_dtype": torch.float32, **mode.settings}
        # The gradients of the precision-aware modes are those of the job.
        if mode.settings["use_precision_aware_optimizer"]:
            full["main_grads_dtype"] = settings["main_grads_dtype"]
        if mode.optimizer == given.optimizer and full == given.settings:
            return modes, mode.name
    return [*modes, given], given.name


def _with(args: argparse.Namespace, mode: StateMode) -> argparse.Namespace:
    """The arguments of the same job in another mode, as validation would leave them."""
    other = copy.copy(args)
    vars(other).update(exp_avg_sq_dtype=torch.float32, **dict.fromkeys(_OWN, False))
    vars(other).update(mode.settings)
    other.optimizer = mode.optimizer
    if mode.settings["use_precision_aware_optimizer"]:
        other.main_grads_dtype = args.main_grads_dtype
    elif args.bf16 and args.main_grads_dtype == torch.bfloat16 and not args.grad_reduce_in_bf16:
        # validate_args (megatron/training/arguments.py, 0.19): gradients in bf16 are the
        # precision-aware optimizer's.
        other.accumulate_allreduce_grads_in_fp32 = True
    other.adam_beta2 = DEFAULT_BETA2 if mode.optimizer == ADAMS else args.adam_beta2
    return other


# --- ranks --------------------------------------------------------------------------------------


class Groups:
    """Which ranks make the groups of a job, as Megatron creates them."""

    def __init__(self) -> None:
        self._ranks: dict[tuple[str, int], dict[int, int]] = {}

    def add(self, name: str, ranks: Sequence[int]) -> None:
        places = self._ranks.setdefault((name, len(ranks)), {})
        places.update({rank: place for place, rank in enumerate(ranks)})

    def place(self, name: str, size: int, rank: int) -> int:
        """The rank's place in its group of this name and size."""
        return self._ranks[name, size][rank]


@contextmanager
def entered(args: argparse.Namespace, rank: int) -> Iterator[Groups]:
    """Be a rank of the job, in fake process groups that Megatron itself creates.

    Groups without this rank are recorded, and not created.
    """
    from megatron.training import global_vars, initialize

    groups = Groups()
    create_group = parallel_state.create_group

    def own_group(ranks: Sequence[int], *rest: Any, group_desc: str = "", **kwargs: Any) -> Any:
        groups.add(group_desc, ranks)
        if rank not in ranks:
            return torch.distributed.GroupMember.NON_GROUP_MEMBER
        return create_group(ranks, *rest, group_desc=group_desc, **kwargs)

    args = copy.copy(args)
    vars(args).update(rank=rank, local_rank=0, fake_process_group=True)
    args.use_gloo_process_groups = False
    global_vars.set_args(args)
    try:
        with patch.object(parallel_state, "create_group", own_group):
            initialize._initialize_distributed(None, None, FakeStore())
        # Layers ask for generators, which are not used: no param is initialized.
        model_parallel_cuda_manual_seed(args.seed)
        yield groups
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        global_vars.unset_global_variables()


def _apply(module: Any, function: Callable[[Any], Any], recurse: bool = True) -> Any:
    """torch.nn.Module._apply, which swaps fake params: Megatron's have weak references."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for param in module._parameters.values():
        if param is not None:
            with torch.no_grad():
                applied = function(param)
            if applied is not param:
                param.data = applied
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _gather_own(objects: list[Any], own: Any, group: Any = None) -> None:
    """torch.distributed.all_gather_object; the other ranks are not there to be asked."""
    objects[:] = [own] * len(objects)


@contextmanager
def without_memory() -> Iterator[None]:
    """Have tensors be fake: with a shape, a dtype and a storage, and no memory."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(torch.distributed, "all_gather_object", _gather_own))
        stack.enter_context(shapes.built_of_shapes())
        stack.enter_context(FakeTensorMode())
        yield


# Arguments that choose kernels and schedules and change no param, at values with which a model can
# be built without TransformerEngine and a GPU.
_BUILDABLE = {
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "perform_initialization": False,
    "use_cpu_initialization": False,
    "init_model_with_meta_device": False,
    "tp_comm_overlap": False,
    "cuda_graph_impl": "none",
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "reuse_grad_buf_for_mxfp8_param_ag": False,
    "fused_residual_rmsnorm": False,
    "use_transformer_engine_op_fuser": False,
    "use_te_activation_func": False,
    "delay_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "nccl_ub": False,
    "optimizer_cuda_graph": False,
    "use_kitchen": False,
    "adams_kernel": "foreach",
    "adams_from_adam": False,
}


def buildable(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the same params, buffers and state, which can be built anywhere."""
    from megatron.core.transformer.enums import AttnBackend

    args = copy.copy(args)
    vars(args).update({name: value for name, value in _BUILDABLE.items() if hasattr(args, name)})
    args.attention_backend = AttnBackend.auto
    if args.lr is None:
        # A script may compute it; it changes no byte.
        args.lr = 1e-4
    if args.moe_token_dispatcher_type == "flex":
        args.moe_token_dispatcher_type = "alltoall"
    return args


def build_model(args: argparse.Namespace) -> list[Any]:
    """Build this rank's part of the model, wrapped in Megatron's DDP.

    Args:
        args: `buildable` ones of a rank that has been entered, `without_memory`.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.training import get_megatron_ddp_config

    config = gpt_config_from_args(args)
    return config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=get_megatron_ddp_config(args),
        overlap_param_gather_with_optimizer_step=args.overlap_param_gather_with_optimizer_step,
        data_parallel_random_init=False,
    )


def build_optimizer(args: argparse.Namespace, model: Sequence[Any]) -> Any:
    """Build the optimizers of a model as Megatron does, and allocate their state."""
    from megatron.training.training import get_megatron_optimizer_config

    config, overrides = get_megatron_optimizer_config(args)
    chain = get_megatron_optimizer(config, list(model), overrides, use_gloo_process_groups=False)
    for part in chain.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)
    return chain


# --- bytes --------------------------------------------------------------------------------------


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements."""
    return tensor.numel() * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _model_tensors(model: Sequence[Any]) -> list[torch.Tensor]:
    """What holds the model's weights: DDP's param buffers, and the params outside of them."""
    buffers = [
        buffer.param_data
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        if buffer.param_data is not None
    ]
    held = {_storage(buffer) for buffer in buffers}
    others = {}
    for chunk in model:
        for param in chunk.parameters():
            if _storage(param) not in held:
                others[_storage(param)] = param
    return [*buffers, *others.values()]


def weight_bytes(model: Sequence[Any]) -> int:
    """Bytes of the model params of this rank, with the padding of the buckets."""
    return sum(num_bytes(tensor) for tensor in _model_tensors(model))


def gradient_bytes(model: Sequence[Any]) -> int:
    """Bytes of main_grad of this rank: DDP's gradient buffers, with the padding of the buckets."""
    total = 0
    for chunk in model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            total += num_bytes(buffer.grad_data)
            total += sum(num_bytes(grad) for grad in buffer.extra_main_grads)
    return total


@dataclasses.dataclass
class Tally:
    """What a rank's optimizers hold of model params of one width.

    Attributes:
        numel: elements of the inner optimizers' params.
        num_tensors: how many there are.
        kinds: bytes by kind of state.
    """

    numel: int = 0
    num_tensors: int = 0
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)


def optimizer_tallies(chain: Any, model: Sequence[Any], params_itemsize: int) -> dict[int, Tally]:
    """Count the tensors that the optimizers of this rank hold, by the width of the model params.

    A param that lies in the model's memory, or in a checkpoint's, is not counted as main param.
    torch's Adam has a `step` tensor a param, which lies on the CPU: it is not counted.

    Args:
        chain: what `get_megatron_optimizer` returned, with state.
        params_itemsize: bytes of a model param that has an fp32 main param.
    """
    models = {_storage(tensor) for tensor in _model_tensors(model)}
    tallies: dict[int, Tally] = {}
    for part in chain.chained_optimizers:
        inner = part.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            for param in group["params"]:
                is_own = _storage(param) not in models
                width = params_itemsize if is_own else param.element_size()
                tally = tallies.setdefault(width, Tally())
                tally.numel += param.numel()
                tally.num_tensors += 1
                if is_own:
                    tally.kinds[MAIN_PARAMS] += num_bytes(param)
                for name, tensor in inner.state.get(param, {}).items():
                    if name == "master_param":
                        is_remainder = tensor.dtype == torch.int16
                        tally.kinds[REMAINDERS if is_remainder else MAIN_PARAMS] += num_bytes(
                            tensor
                        )
                    elif name != "step":
                        tally.kinds[name] += num_bytes(tensor)
                if isinstance(inner, AdamS):
                    scales = inner._scales.get(param, {}).values()
                    if scales:
                        tally.kinds[SCALES] += sum(map(num_bytes, scales))
    return tallies


def _as_adam(tallies: dict[int, Tally], settings: dict[str, Any]) -> dict[int, Tally]:
    """What TransformerEngine's FusedAdam holds where AdamS holds `tallies`, precision-aware.

    FusedAdam (TransformerEngine 2.20, pytorch/optimizers/fused_adam.py, _initialize_state) has an
    fp32 scale for each state tensor whose dtype is not fp32. A Float8Tensor has a scale of its own,
    its inverse, and an amax.
    """
    states = [settings["exp_avg_dtype"], settings.get("exp_avg_sq_dtype", torch.float32)]
    per_state = sum(4 * (d != torch.float32) + 12 * (d == torch.uint8) for d in states)
    counted = {}
    for width, tally in tallies.items():
        kinds = Counter(tally.kinds)
        kinds[EXP_AVG_SQ] = tally.numel * states[1].itemsize
        # fp16 main params are the inner optimizer's, whatever the recipe of fp8 is.
        has_scaled_main = width < 4 and settings["main_params_dtype"] != torch.float32
        kinds[SCALES] = tally.num_tensors * (per_state + 4 * has_scaled_main)
        counted[width] = Tally(tally.numel, tally.num_tensors, +kinds)
    return counted


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes of the optimizer an element and a tensor of model params of one width, by kind."""

    per_element: dict[str, int]
    per_tensor: dict[str, int]

    @classmethod
    def of(cls, tally: Tally) -> "Rates":
        """The rates of a tally. They are whole numbers, as a kind has one dtype."""
        per_element: dict[str, int] = {}
        per_tensor: dict[str, int] = {}
        for kind, size in tally.kinds.items():
            is_scale = kind == SCALES
            rate, rest = divmod(size, tally.num_tensors if is_scale else tally.numel)
            assert rest == 0, (kind, size, tally)
            (per_tensor if is_scale else per_element)[kind] = rate
        return cls(per_element, per_tensor)

    def bytes_of(self, shard: "Shard") -> Counter[str]:
        """Bytes by kind."""
        counted = Counter({kind: rate * shard.numel for kind, rate in self.per_element.items()})
        counted.update({kind: rate * shard.num_tensors for kind, rate in self.per_tensor.items()})
        return counted


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
            args = buildable(_with(self._args, mode))
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
            key = (args.optimizer, *(getattr(args, name) for name in (*NO_PRECISION, *_OWN)))
            if key not in counted:
                chain = build_optimizer(args, self.model)
                counted[key] = optimizer_tallies(chain, self.model, args.params_dtype.itemsize)
            tallies = counted[key]
            self._built = {
                width: Shard(tally.numel, tally.num_tensors) for width, tally in tallies.items()
            }
            if is_fused_adam:
                tallies = _as_adam(tallies, mode.settings)
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
            kinds.update(self.rates[mode][width].bytes_of(shard))
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


# --- a job --------------------------------------------------------------------------------------


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


def _dtypes(args: argparse.Namespace, mode: StateMode) -> dict[str, str]:
    """What the kernel of a step of most params reads and writes, as Megatron names dtypes."""
    args = _with(args, mode)
    is_wide = args.params_dtype == torch.float32
    is_aware = args.use_precision_aware_optimizer
    main_param = "none" if is_wide else "fp32"
    if is_aware and not is_wide and getattr(args, "fp8_recipe", None) in (None, "delayed"):
        main_param = dtype_name(args.main_params_dtype)
        if main_param == "fp32" and args.bf16 and not args.adams_no_param_remainders:
            main_param = "remainder"
    in_fp32 = is_wide or args.accumulate_allreduce_grads_in_fp32
    return {
        "grad": "fp32" if in_fp32 else dtype_name(args.params_dtype),
        "param": dtype_name(args.params_dtype),
        "exp_avg": dtype_name(args.exp_avg_dtype),
        "main_param": main_param,
    }


def _flags(args: argparse.Namespace, mode: StateMode) -> str:
    """What a command line has to have for a mode, beside the rest of the job's flags."""
    is_aware = mode.settings["use_precision_aware_optimizer"]
    words = [f"--optimizer {mode.optimizer}"]
    if is_aware:
        words.append("--use-precision-aware-optimizer")
    dtypes = {**mode.settings, "main_grads_dtype": args.main_grads_dtype if is_aware else None}
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = dtypes.get(name) or torch.float32
        if dtype != torch.float32:
            words.append(f"{flag_of(name)} {dtype_name(dtype)}")
    if mode.settings.get("adams_no_param_remainders"):
        words.append("--adams-no-param-remainders")
    return " ".join(words)


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
    kinds: dict[Any, dict[str, Any]] = {}
    first: Stage | None = None
    for pp_rank in range(pp_size):
        report(f"pipeline stage {pp_rank + 1} of {pp_size}")
        rank = 0 if first is None else first.ranks_of(pp_rank)[0]
        stage = Stage(args, modes, rank, dp_sizes)
        first = first or stage
        stages.append(stage)
        counted: dict[tuple[int, ...], dict[str, Any]] = {}
        for rank in stage.ranks_of(pp_rank):
            places = stage.places(rank)
            if places not in counted:
                counted[places] = stage.count(rank)
            kind = counted[places]
            key = (pp_rank, json.dumps(kind, sort_keys=True))
            kinds.setdefault(key, {"pipeline_stage": pp_rank, "ranks": [], **kind})
            kinds[key]["ranks"].append(rank)
    for kind in kinds.values():
        kind["num_ranks"] = len(kind["ranks"])
        kind["ranks"] = _as_ranges(kind["ranks"])
    by_dp_size = []
    for dp_size in dp_sizes:
        at_size = [(stage, stage.shards_at[dp_size]) for stage in stages]
        if all(shards is not None for _, shards in at_size):
            optimizer = {}
            for mode in modes:
                sums = [
                    sum(stage.optimizer_bytes(mode.name, shards or {}).values())
                    for stage, shards in at_size
                ]
                optimizer[mode.name] = max(sums)
            by_dp_size.append({"dp_size": dp_size, "optimizer": optimizer})
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
                "dtypes": _dtypes(args, mode),
                "is_guarded": mode.optimizer == ADAMS and bool(guards_given(args)),
                "flags": _flags(args, mode),
            }
            for mode in modes
        ],
        "kinds": list(kinds.values()),
        "activations": {
            "bytes": round(activations),
            "formula": formula,
            "recompute_granularity": args.recompute_granularity,
        },
        "by_dp_size": by_dp_size,
        "notes": _notes(args),
    }
