"""Pretrain an encoder by masked language modeling with `megatron.training.pretrain`.

    torchrun --nproc-per-node 8 -m megatron_adams.launch pretrain_encoder.py --optimizer adams \\
        --encoder-tokenizer DATA --train-data-path DATA/train --valid-data-path DATA/held_out ...

It takes Megatron's flags; train_encoder.py gives them by the name of a size. Stage 2 goes on from
Stage 1 with --pretrained-checkpoint STAGE1, on a blend of both texts:

    --train-data-path 0.8 POOL/train 0.2 PUBLIC/train"""

from collections.abc import Callable, Iterator
from functools import partial

import encoder_training
from encoder_training import Batch, Report
from losses import masked_lm_loss
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch import Tensor


def loss_func(batch: Batch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Report]:
    """Sum the loss of a micro-batch.

    Returns:
        The summed cross-entropy, the number of chosen tokens (Megatron divides by it after its
        data-parallel reduction), and both for the log.
    """
    _, logits = output
    group = mpu.get_tensor_model_parallel_group()
    loss = masked_lm_loss(logits, batch.labels, group).sum()
    encoder_training.check_loss(loss)
    count = batch.positions.new_tensor(len(batch.positions)).int()
    return loss, count, {"lm loss": encoder_training.report(loss, count)}


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: Callable[..., object]
) -> tuple[object, Callable[..., object]]:
    """Run one micro-batch through this rank's stage."""
    batch, output = encoder_training.run_stage(data_iterator, model)
    return output, partial(loss_func, batch)


if __name__ == "__main__":
    args = encoder_training.parse_args(lambda parser: parser)
    encoder_training.prepare_folders(args)
    pretrain(
        pretrain_cfg_container_from_args(args),
        encoder_training.build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        encoder_training.build_model,
    )
