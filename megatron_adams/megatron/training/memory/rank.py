"""Be one rank of a job, and build Megatron's model and optimizers there without memory."""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_adams.megatron.training import shapes


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
