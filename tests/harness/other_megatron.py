"""The example's script, which is written for Megatron 0.19, on an older one.

The tests of Megatron's versions train with one script. Where Megatron lacks a function that it
calls, `install` puts one there that does the same with the means of that version. A user of an
older Megatron has that version's own pretrain_gpt.py in its place.
"""

import importlib.util
import inspect
import multiprocessing
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def install() -> None:
    """Complete the installed Megatron. Nothing is done where nothing is missing."""
    import megatron.training
    from megatron.core import utils
    from megatron.training import argument_utils, training

    if hasattr(argument_utils, "gpt_config_from_args"):
        return
    argument_utils.gpt_config_from_args = lambda args: None
    if hasattr(utils, "get_batch_on_this_tp_rank"):
        utils.get_batch_on_this_tp_rank = _with_older_names(utils.get_batch_on_this_tp_rank)
        pretrain = _building_by_a_function(training.pretrain)
    else:
        _install_for_0_17()
        pretrain = _without_container(training.pretrain)
    megatron.training.pretrain = training.pretrain = pretrain


def _install_for_0_17() -> None:
    """Complete Megatron 0.17 or 0.16, where `pretrain` reads the command line itself."""
    from megatron.core import utils
    from megatron.training import argument_utils, arguments
    from megatron.training import utils as training_utils

    place = "megatron.core.tokenizers.{}utils.build_tokenizer"
    if importlib.util.find_spec(place.format("").rpartition(".")[0]) is None:
        # 0.16 has it one folder deeper.
        sys.modules[place.format("")] = importlib.import_module(place.format("text."))
        _name_results_queue()
        # 0.16 defines it with TransformerEngine alone, and asks for it in any case.
        moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        moe_utils.te_general_gemm = None
    # Not validated: `pretrain` reads them again, and validates.
    arguments.parse_and_validate_args = arguments.parse_args
    argument_utils.pretrain_cfg_container_from_args = lambda args, model: None
    utils.get_batch_on_this_tp_rank = _from_an_iterator(training_utils.get_batch_on_this_tp_rank)
    utils.get_batch_on_this_cp_rank = _of_one_kind(utils.get_batch_on_this_cp_rank)


def _name_results_queue() -> None:
    """Give the queue of a save's results the name and the argument that it has from 0.17 on."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async as module

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if module._results_queue is None:
            module._results_queue = multiprocessing.get_context(mp_mode).Manager().Queue()
        return module._results_queue

    module.get_write_results_queue = get_write_results_queue
    # By its module's name: the tests replace it there.
    module._get_write_results_queue = lambda: module.get_write_results_queue()


def _without_container(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `pretrain` of 0.17, which has no container of configurations either.

    Up to 0.17 a virtual stage frees its output while gloo still sends it (pull request 4047): the
    next stage reads NaN or other numbers, with any optimizer. So nothing is freed here.
    """

    def build(*args: Any, **kwargs: Any) -> Any:
        model = build_gpt(*args, **kwargs)
        model.config.deallocate_pipeline_outputs = False
        return model

    def pretrain(
        container: Any, datasets: Callable[..., Any], model_type: Any, forward_step: Any
    ) -> Any:
        return original(datasets, build, model_type, forward_step)

    return pretrain


def _from_an_iterator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's get_batch_on_this_tp_rank of 0.17, which takes a batch from its iterator."""

    def get_batch_on_this_tp_rank(batch: Any, **others: Any) -> Any:
        given = {key: tensor for key, tensor in batch.items() if tensor is not None}
        received = original(iter([given]))
        return {key: received[key] for key in BATCH_KEYS}

    return get_batch_on_this_tp_rank


def _of_one_kind(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's get_batch_on_this_cp_rank of 0.17, where the other kind has its own function."""

    def get_batch_on_this_cp_rank(batch: Any, is_hybrid_cp: bool = False, **others: Any) -> Any:
        assert not is_hybrid_cp, "the script refuses --hybrid-context-parallel"
        return original(batch, **others)

    return get_batch_on_this_cp_rank


def _building_by_a_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `pretrain` of 0.18, which is given a function that builds the model."""

    def pretrain(
        container: Any, datasets: Callable[..., Any], model_type: Any, forward_step: Any
    ) -> Any:
        return original(container, datasets, build_gpt, model_type, forward_step)

    return pretrain


def _with_older_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's get_batch_on_this_tp_rank of 0.18."""

    def get_batch_on_this_tp_rank(batch: Any, *, has_cu_seqlens: bool, **others: Any) -> Any:
        return original(batch, is_sft=has_cu_seqlens, **others)

    return get_batch_on_this_tp_rank


def build_gpt(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Build the model of Megatron's arguments, as the pretrain_gpt.py of 0.18 does."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(args, config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def _layer_spec(args: Namespace, config: Any, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs

    with_te = args.transformer_impl == "transformer_engine"
    if args.num_experts:
        return specs.get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=with_te,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    build = (
        specs.get_gpt_layer_with_transformer_engine_spec
        if with_te
        else specs.get_gpt_layer_local_spec
    )
    given = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
        "normalization": args.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }
    known = inspect.signature(build).parameters
    return build(**{name: value for name, value in given.items() if name in known})
