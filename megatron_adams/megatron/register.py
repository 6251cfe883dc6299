"""register(): the functions of Megatron that the plugin wraps, and their wrappers; adopt()."""

import importlib.util
import logging
import os
import sys
from typing import Any

import megatron.core

from megatron_adams.megatron.hooks import Hook, Symbol, attach, check_version, require

logger = logging.getLogger(__name__)

_OPTIMIZERS = "megatron.core.optimizer.optimizer"
_DDP = "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_OFFLOADING = "megatron.core.optimizer.cpu_offloading"
_HYBRID_OPTIMIZER = f"{_OFFLOADING}.hybrid_optimizer.HybridDeviceOptimizer"

# What AdamSDistributedOptimizer, AdamSFsdpOptimizer, AdamSChainedOptimizer and HybridAdamS override
# or call, and what this package's modules import by name.
_RELIED_ON = (
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.state_dict", ("self",)),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.load_state_dict", ("self", "state_dict")),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.sharded_state_dict",
        ("self", "model_sharded_state_dict", "is_loading"),
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}._get_main_param_and_optimizer_states", ("self", "model_param")
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states",
        ("self", "model_param", "tensors"),
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.sharded_param_state_fully_reshardable",
        ("self", "model_sharded_state_dict", "is_loading", "metadata"),
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.sharded_param_state_dp_reshardable",
        ("self", "model_sharded_state_dict", "is_loading", "metadata"),
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.get_parameter_state_dp_zero",
        ("self", "use_gloo_comm", "empty_data", "return_on_all_ranks"),
    ),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.get_parameter_state_dp_reshardable", ("self",)),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.load_parameter_state", ("self", "filename")),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}._copy_model_params_to_main_params", ("self", "state_dict")),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}._build_model_param_to_state_dict_param_map",
        ("self", "state_dict"),
    ),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.offload_to_cpu", ("self",)),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.step_with_ready_grads", ("self",)),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}._copy_main_params_to_model_params", ("self",)),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}._collect_main_grad_data_for_unscaling", ("self",)),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}._get_model_param_range_map", ("self", "param")),
    Symbol("megatron.core.fp8_utils.is_float8tensor"),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.sharded_param_state_fsdp_dtensor", ("self", "is_loading")),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}._param_name", ("self", "param")),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}._param_groups_to_param2group_meta", ("self", "param_groups")),
    Symbol(
        f"{_OPTIMIZERS}.MixedPrecisionOptimizer._unscale_main_grads_and_check_for_nan", ("self",)
    ),
    Symbol(f"{_OPTIMIZERS}.ChainedOptimizer.step", ("self",)),
    Symbol(f"{_OPTIMIZERS}.ChainedOptimizer.load_state_dict", ("self", "state_dict")),
    Symbol(f"{_OPTIMIZERS}.ChainedOptimizer.zero_grad", ("self", "set_to_none")),
    Symbol(f"{_OPTIMIZERS}.ChainedOptimizer.grads_states_parallel_group_is_shared", ("self",)),
    Symbol(f"{_OPTIMIZERS}.ChainedOptimizer._synchronize_steps", ("self",)),
    Symbol(f"{_OPTIMIZERS}.param_group_identifier_keys"),
    Symbol("megatron.core.dist_checkpointing.mapping.ShardedTensor"),
    Symbol(f"{_DDP}.start_param_sync", ("self",)),
    Symbol(
        f"{_HYBRID_OPTIMIZER}.__init__",
        (
            "self",
            "params",
            "offload_fraction",
            "cpu_optimizer_cls",
            "gpu_optimizer_cls",
            "param_update_in_fp32",
            "pin_cpu_grads",
            "pin_cpu_params",
            "overlap_cpu_optimizer_d2h_h2d",
        ),
    ),
    Symbol(f"{_HYBRID_OPTIMIZER}.dummy_step", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}._init_sub_optimizers", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}._get_sub_optimizer_param_groups", ("self", "offload_fraction")),
    Symbol(f"{_HYBRID_OPTIMIZER}._set_sub_optimizer_grads", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}._sync_hdo_param_groups_to_sub_optimizers", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}._sync_hdo_state_to_sub_optimizers", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}._register_param_copy_back_gpu_hook", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}._register_load_state_dict_hooks", ("self",)),
    Symbol(f"{_HYBRID_OPTIMIZER}.sub_optimizers"),
    Symbol(f"{_OFFLOADING}.HybridDeviceOptimizer"),
    Symbol(f"{_OPTIMIZERS}.MegatronOptimizer._filter_and_reorder_param_groups"),
    Symbol("megatron.core.optimizer.ChainedOptimizer"),
    Symbol("megatron.core.optimizer.DistributedOptimizer"),
    Symbol(
        "megatron.core.tensor_parallel.param_is_not_tensor_parallel_duplicate",
        ("param", "tp_group"),
    ),
    Symbol("megatron.core.parallel_state.get_expert_tensor_parallel_group"),
    Symbol("megatron.core.transformer.module.param_is_not_shared", ("param",)),
    Symbol(f"{_OPTIMIZERS}.MegatronOptimizer.get_grad_stats_parallel_group", ("self",)),
    Symbol("megatron.core.models.mimo.model.base.MimoModel"),
    Symbol("megatron.core.utils.log_single_rank"),
    Symbol("megatron.core.dist_checkpointing.load_common_state_dict", ("checkpoint_dir",)),
    Symbol("megatron.core.dist_checkpointing.load_content_metadata"),
    Symbol("megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"),
)

# The same for megatron.training.
_RELIED_ON_IN_TRAINING = (
    Symbol("megatron.training.checkpointing.get_args"),
    Symbol("megatron.training.training.get_args"),
    Symbol("megatron.training.async_utils.get_args"),
    Symbol("megatron.training.global_vars.get_tensorboard_writer"),
    Symbol("megatron.training.global_vars.get_wandb_writer"),
    Symbol("megatron.training.utils.print_rank_last", ("message",)),
)


def _core_hooks() -> list[Hook]:
    from megatron_adams.megatron import adoption, config, datasets, fsdp, fused_step, versions

    clip_grads = "megatron.core.optimizer.clip_grads"
    return [
        Hook(
            Symbol("megatron.core.optimizer.get_megatron_optimizer", ("config", "model_chunks")),
            adoption.wrap_get_megatron_optimizer,
        ),
        Hook(
            Symbol(versions.BUILDER_OF_OTHERS, ("config",)),
            adoption.wrap_builder_of_others,
        ),
        Hook(
            Symbol("megatron.core.optimizer.OptimizerConfig.__post_init__", ("self",)),
            config.wrap_post_init,
        ),
        Hook(
            Symbol(f"{clip_grads}.get_grad_norm_fp32", ("grads_for_norm",)),
            fused_step.wrap_get_grad_norm_fp32,
        ),
        Hook(
            Symbol(
                f"{clip_grads}.clip_grad_by_total_norm_fp32",
                ("parameters", "max_norm", "total_norm", "use_decoupled_grad"),
            ),
            fused_step.wrap_clip_grad_by_total_norm_fp32,
        ),
        Hook(
            Symbol(
                "megatron.core.transformer.fsdp_dtensor_checkpoint.handle_swiglu_in_state_dict",
                ("model", "model_state_dict", "optimizer_state_dict"),
            ),
            fsdp.wrap_handle_swiglu_in_state_dict,
        ),
        Hook(
            Symbol("megatron.core.datasets.utils.compile_helpers"),
            datasets.wrap_compile_helpers,
        ),
    ]


def _training_hooks() -> list[Hook]:
    from megatron_adams.megatron import versions
    from megatron_adams.megatron.training import arguments, async_save, checkpoint, log

    training = "megatron.training"
    return [
        Hook(
            Symbol(f"{training}.arguments.add_megatron_arguments", ("parser",)),
            arguments.wrap_add_megatron_arguments,
        ),
        Hook(
            Symbol(f"{training}.arguments.validate_args", ("args", "defaults")),
            arguments.wrap_validate_args,
        ),
        Hook(
            Symbol(f"{training}.yaml_arguments.validate_yaml", ("args", "defaults")),
            arguments.wrap_validate_yaml,
        ),
        Hook(
            Symbol(f"{training}.arguments._print_args", ("title", "args")),
            arguments.wrap_print_args,
        ),
        Hook(
            Symbol(f"{training}.training.get_megatron_optimizer_config", ("args",)),
            arguments.wrap_get_megatron_optimizer_config,
        ),
        Hook(
            Symbol(
                f"{training}.theoretical_memory_usage.compute_weight_and_optimizer_memory",
                ("args", "verbose"),
            ),
            arguments.wrap_compute_weight_and_optimizer_memory,
        ),
        Hook(
            Symbol(
                f"{training}.training.train_step",
                ("forward_step_func", "data_iterator", "model", "optimizer"),
            ),
            log.wrap_train_step,
        ),
        Hook(
            Symbol(
                f"{training}.training.training_log",
                ("loss_dict", "total_loss_dict", "learning_rate", "iteration"),
            ),
            log.wrap_training_log,
        ),
        Hook(
            Symbol(f"{training}.checkpointing.load_checkpoint", ("ddp_model", "optimizer")),
            checkpoint.wrap_load_checkpoint,
        ),
        Hook(
            Symbol(
                f"{training}.checkpointing.save_checkpoint", ("iteration", "model", "optimizer")
            ),
            checkpoint.wrap_save_checkpoint,
        ),
        Hook(
            Symbol(*versions.STARTER_OF_WORKER),
            async_save.wrap_starter_of_worker,
        ),
    ]


def register(replace: str | None = None) -> None:
    """Make `--optimizer adams` known to the Megatron of this environment.

    It is idempotent, and one log line says what it did. Call it before Megatron parses its
    arguments, as `python -m megatron_adams.launch script.py ...` does. If only megatron.core is
    installed, it prepares only that package's API (`AdamSOptimizerConfig`), and the log line says
    so.

    Args:
        replace: "adam" builds AdamS also where a configuration of megatron.core's API asks for
            Adam, for frameworks whose list of optimizers is closed; each time, a warning in the
            log says so. None: only where it asks for adams.
    Raises:
        UnsupportedMegatronError: Megatron's version is outside the supported range, or a function
            that the plugin relies on has moved or changed. Nothing has been wrapped then.
        ValueError: `replace` is another name.
    """
    _register(with_training=importlib.util.find_spec("megatron.training") is not None)
    _take_over(replace)


def register_core() -> None:
    """`register()` for a process that has not imported megatron.training: that stays so.

    Raises:
        UnsupportedMegatronError: as `register`.
    """
    _register(with_training="megatron.training" in sys.modules)


def register_by_entrance(*, with_training: bool, replace: str | None) -> None:
    """`register()` at a call that asks for adams; autoregister.py calls it.

    Args:
        with_training: megatron.training's command line is asked for.
        replace: as of `register`.
    Raises:
        UnsupportedMegatronError: as `register`.
    """
    with_training = with_training or "megatron.training" in sys.modules
    _register(with_training=with_training, remark="; by autoregister")
    _take_over(replace)


def adopt(optimizer: Any, config: Any) -> Any:
    """Put AdamS in the place of Adam in an optimizer that Megatron has just built.

    This is for code that builds its optimizer by inner functions of Megatron's:

        config = AdamSOptimizerConfig(...)
        with built_as_adam(config):
            optimizer = build(config, ...)
        optimizer = adopt(optimizer, config)

    Args:
        optimizer: a ChainedOptimizer, or one of the optimizers that it is made of. It was built for
            Adam and has no state yet: no step, and no checkpoint loaded.
        config: an AdamSOptimizerConfig, or an OptimizerConfig, of which a copy is made.
    Returns:
        The same object. If it was no chain, and not Megatron-FSDP's, a chain with it in. If AdamS
        is in it already, it is returned as it is.
    Raises:
        ValueError: what is inside is no Adam, has state, or was built with other precisions; or the
            configuration asks for what adams has not. Nothing was changed then.
        UnsupportedMegatronError: as `register`.
    """
    register_core()
    from megatron_adams.megatron.adoption import adopt_built

    return adopt_built(optimizer, config)


def _take_over(name: str | None) -> None:
    from megatron_adams.megatron.adoption import take_over

    if name is not None:
        take_over(name)


def _register(*, with_training: bool, remark: str = "") -> None:
    version = megatron.core.__version__
    check_version(version)
    # This comes before the hooks. Their modules import some of these symbols by name, and would
    # fail with a less helpful error.
    require(_RELIED_ON, version)
    hooks = _core_hooks()
    if with_training:
        require(_RELIED_ON_IN_TRAINING, version)
        hooks += _training_hooks()
    differences = _differences()
    attached = attach(hooks, version)
    if attached and os.environ.get("RANK", "0") == "0":
        where = "megatron.core and megatron.training" if with_training else "megatron.core alone"
        logger.info(
            "registered --optimizer adams with %s %s (wrapped: %s%s%s)",
            where,
            version,
            ", ".join(attached),
            f"; bridged: {', '.join(differences)}" if differences else "",
            remark,
        )


def _differences() -> list[str]:
    # It imports Megatron's optimizers, which `require` has looked at by now.
    from megatron_adams.megatron.versions import describe_differences

    return describe_differences()
