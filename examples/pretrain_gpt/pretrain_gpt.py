"""Pretrain a GPT with `megatron.training.pretrain`: an ordinary Megatron 0.19 script.

It knows nothing of AdamS. The launcher adds that:

    torchrun --nproc-per-node 8 -m megatron_adams.launch pretrain_gpt.py --optimizer adams ...

and `torchrun --nproc-per-node 8 pretrain_gpt.py --optimizer adam ...` runs the same script without
it. It takes every flag of Megatron's own pretraining; UNSUPPORTED_FLAGS names the few that need a
batch or a loss of another shape."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")

UNSUPPORTED_FLAGS = (
    "sft",
    "fim_data",
    "mtp_num_layers",
    "logits_load_dir",
    "hybrid_context_parallel",
    "dataloader_inter_document_masking",
    "overlap_moe_expert_parallel_comm",
)

# A loss this many times the largest one seen so far is "spiky" (--check-for-spiky-loss).
SPIKY_LOSS_FACTOR = 10

straggler_timer = StragglerDetector()


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None
) -> dict[str, torch.Tensor | None]:
    """Return this rank's part of the next micro-batch, on its device.

    Each tensor is (micro_batch_size, seq_length / context_parallel_size). A pipeline stage gets
    None for what it does not need. Middle stages need nothing, the first stage no labels, and the
    last stage no tokens.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, torch.Tensor | None] = {}
    if tp_rank == 0:  # the only tp rank that has a data loader
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {
            key: sample[key].cuda(non_blocking=True) if key in sample else None
            for key in BATCH_KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return batch


def loss_func(
    loss_mask: torch.Tensor | None, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the token losses of a micro-batch.

    Args:
        loss_mask: (micro_batch_size, seq_length / cp_size); 1 where the token counts.
        output_tensor: the same shape; cross entropy of each token in nats.

    Returns:
        The summed loss, the number of tokens in it (Megatron divides after its data-parallel
        reduction), and the two together under the name that the log shows.
    """
    args = get_args()
    assert loss_mask is not None  # this runs only on the last pipeline stage
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)

    rerun_state_machine = get_rerun_state_machine()
    checks: list[tuple[Callable[[torch.Tensor], object], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "the loss is NaN", True), (torch.isinf, "the loss is Inf", True)]
    if args.check_for_spiky_loss:
        is_spiky = partial(
            rerun_state_machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
        )
        checks.append((is_spiky, "the loss is spiky", False))
    for rejection_func, message, fatal in checks:
        rerun_state_machine.validate_result(
            result=loss, rejection_func=rejection_func, message=message, tolerance=0.0, fatal=fatal
        )

    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: GPTModel
) -> tuple[torch.Tensor, Callable[..., object]]:
    """Run one micro-batch through this rank's part of the model."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_timer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with straggler_timer:
        output_tensor = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output_tensor, partial(loss_func, batch["loss_mask"])


def is_dataset_built_on_rank(vp_stage: int | None = None) -> bool:
    """Say whether this rank reads data: tp rank 0 of the first and the last pipeline stage."""
    return bool(
        mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)
    )


def train_valid_test_datasets_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]:
    """Build the training, validation and test sets from --data-path or
    --{train,valid,test}-data-path.

    Args:
        num_samples: how many sequences each of the three has to provide over the whole run.
        vp_stage: the virtual pipeline stage that asks.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    print_rank_0("> building the training, validation and test sets ...")
    train_set, valid_set, test_set = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        partial(is_dataset_built_on_rank, vp_stage=vp_stage),
        config,
    ).build()
    return train_set, valid_set, test_set


def refuse_unsupported_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that need another kind of batch or loss."""
    # Not every version of Megatron has all of them.
    names = [name for name in UNSUPPORTED_FLAGS if getattr(args, name, False)]
    given = [f"--{name.replace('_', '-')}" for name in names]
    if given:
        raise ValueError(
            f"{', '.join(given)}: this example trains on plain token sequences only; use "
            "pretrain_gpt.py of the Megatron-LM repository, the launcher runs it in the same way"
        )


if __name__ == "__main__":
    # With this, every rank builds its own data sets, not only tp rank 0
    # (megatron.training.training, build_train_valid_test_data_loaders, 0.19).
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]

    args = parse_and_validate_args()
    refuse_unsupported_flags(args)
    # The model is described by a GPTModelConfig, as in Megatron 0.19's own pretrain_gpt.py, and
    # `pretrain` builds it. Megatron warns that GPTModel is deprecated and recommends HybridModel,
    # and a new project would follow that on GPUs. This example stays with GPT while 0.19 is the
    # version in use, for three reasons: HybridModel's only stack specs are made of
    # TransformerEngine layers, so that it runs neither without that package nor in a CPU rehearsal;
    # its builder refuses virtual pipeline stages; and GPT is what most existing jobs and
    # checkpoints are. With TransformerEngine, changing to it is one line:
    # `hybrid_config_from_args(args)` in place of the call below.
    model_config = gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
