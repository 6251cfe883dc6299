"""Distil a frozen teacher into a student with `megatron.training.pretrain`.

    torchrun --nproc-per-node 8 -m megatron_adams.launch distil_encoder.py --optimizer adams \\
        --teacher TEACHER --kl-weight 0.5 --mlm-weight 0.5 --temperature 2 \\
        --encoder-tokenizer DATA --train-data-path DATA/train ... --save STUDENT

The flags of the model are the student's. A chain is one such job for each student, whose teacher is
the folder that the job before has saved to. Validation measures the masked-LM loss alone."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import encoder_training
from encoder_model import Encoder
from encoder_training import Batch, Report
from losses import distillation_loss, hidden_loss, masked_lm_loss
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from teacher import Targets, Teacher, check_teacher
from teacher_logits import StoredLogits
from torch import Tensor

_WEIGHTS = ("mlm_weight", "kl_weight", "hidden_weight")

# Set where the model is built, as Megatron's groups are there by then.
targets: Targets | None = None


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of distillation."""
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", type=Path, help="a model's folder")
    add("--teacher-logits", type=Path, help="what teacher_logits.py has written, in its place")
    add("--mlm-weight", type=float, default=0.5, help="of the cross-entropy (%(default)s)")
    add("--kl-weight", type=float, default=0.5, help="of the KL to the teacher (%(default)s)")
    add("--hidden-weight", type=float, default=0.0, help="of the hidden states (%(default)s)")
    add("--temperature", type=float, default=2.0, help="of the KL (%(default)s)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be distilled."""
    if (args.teacher is None) == (args.teacher_logits is None):
        raise ValueError("give one of --teacher and --teacher-logits")
    for name in _WEIGHTS:
        if not getattr(args, name) >= 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)}: must be 0 or more")
    if not any(getattr(args, name) for name in _WEIGHTS):
        raise ValueError("--mlm-weight, --kl-weight and --hidden-weight: one must be above 0")
    if not args.temperature > 0:
        raise ValueError(f"--temperature {args.temperature}: must be above 0")
    if args.teacher is not None:
        check_teacher(args.teacher, args)
    elif args.hidden_weight:
        raise ValueError(
            f"--hidden-weight {args.hidden_weight}: stored logits hold no hidden states; give "
            "--teacher in place of --teacher-logits, or --hidden-weight 0"
        )


def build_student(pre_process: bool = True, post_process: bool = True, **options: Any) -> Encoder:
    """Build this rank's stage of the student, and make its teacher ready: the model provider."""
    global targets
    args = get_args()
    if targets is None:
        targets = (
            StoredLogits(args.teacher_logits, args)
            if args.teacher is None
            else Teacher(args.teacher, keep=mpu.is_pipeline_last_stage(ignore_virtual=True))
        )
    projection_size = None
    if args.hidden_weight:
        assert isinstance(targets, Teacher)
        projection_size = targets.hidden_size
    return encoder_training.build_model(
        pre_process, post_process, projection_size=projection_size, **options
    )


def _validation(batch: Batch, loss: Tensor) -> tuple[Tensor, Tensor, Report]:
    count = batch.positions.new_tensor(len(batch.positions)).int()
    return loss, count, {"lm loss": encoder_training.report(loss, count)}


def loss_func(
    batch: Batch, is_training: bool, output: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Report]:
    """Sum the weighted losses of a micro-batch.

    Cross-entropy and KL are means over the positions with a label. The hidden states' loss is a
    mean over all tokens of the micro-batch, whose weight among micro-batches is their number of
    positions.

    Returns:
        The sum, the number of positions (Megatron divides by it after its data-parallel
        reduction), and every loss for the log.
    """
    args, group = get_args(), mpu.get_tensor_model_parallel_group()
    mlm = masked_lm_loss(output[1], batch.labels, group).sum()
    if not is_training:
        return _validation(batch, mlm)
    assert targets is not None
    hidden, logits = targets(batch)
    kl = distillation_loss(output[1], logits, args.temperature, group).sum()
    count = batch.positions.new_tensor(len(batch.positions)).int()
    total = args.mlm_weight * mlm + args.kl_weight * kl
    reports = {"lm loss": (mlm, count), "kl loss": (kl, count)}
    if args.hidden_weight:
        assert hidden is not None
        is_token = batch.padding_mask.transpose(0, 1)
        tokens = is_token.sum()
        distance = (hidden_loss(output[2], hidden) * is_token).sum()
        total = total + args.hidden_weight * distance * (count / tokens)
        reports["hidden loss"] = (distance, tokens)
    encoder_training.check_loss(total)
    reports["distillation loss"] = (total, count)
    named = {name: encoder_training.report(*values) for name, values in reports.items()}
    return total, count, named


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: Any
) -> tuple[object, Callable[..., object]]:
    """Run one micro-batch through this rank's stage of the student."""
    batch, output = encoder_training.run_stage(data_iterator, model)
    return output, partial(loss_func, batch, model.training)


if __name__ == "__main__":
    args = encoder_training.parse_args(add_arguments)
    check(args)
    encoder_training.prepare_folders(args)
    pretrain(
        pretrain_cfg_container_from_args(args),
        encoder_training.build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        build_student,
    )
