"""The losses of pretraining and of distillation, on logits whose vocabulary may be divided.

Each is tested against plain PyTorch in float64. Logits are (n, vocabulary / tensor-parallel size):
this rank's columns. Every loss is the same on all tensor-parallel ranks."""

import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor


def masked_lm_loss(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the cross-entropy at each position, (n,) fp32, in nats.

    Args:
        labels: (n,) int64.
        group: of tensor parallelism.
    """
    # Megatron's function changes fp32 logits in place.
    loss: Tensor = vocab_parallel_cross_entropy(
        logits.float().clone().unsqueeze(1), labels.unsqueeze(1), tp_group=group
    )
    return loss.squeeze(1)


def _sum_over_vocabulary(values: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    # The reduction is in place: the sum is a tensor of its own that nobody else reads.
    total: Tensor = reduce_from_tensor_model_parallel_region(values.sum(dim=1), group=group)
    return total


def _shifted(logits: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return logits and their log-partition, less the largest logit of the whole vocabulary.

    Args:
        logits: (n, columns) fp32.

    Returns:
        (n, columns) and (n,). Their difference is the log-softmax.
    """
    largest = logits.detach().max(dim=1).values
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    shifted = logits - largest.unsqueeze(1)
    return shifted, _sum_over_vocabulary(shifted.exp(), group).log()


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Return T^2 KL(teacher || student) of the distributions at temperature T, (n,) fp32, in nats.

    The factor T^2 keeps the size of the gradient when T changes.
    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.

    Args:
        student, teacher: (n, columns) logits; no gradient goes to the teacher's. -inf is a token
            that it gives no probability.
    """
    with torch.no_grad():
        shifted, partition = _shifted(teacher.float() / temperature, group)
        teacher_log = shifted - partition.unsqueeze(1)
        probability = teacher_log.exp()
    shifted, partition = _shifted(student.float() / temperature, group)
    # Where the teacher's probability is 0, so is the term, and its logarithm may be -inf.
    difference = torch.where(probability > 0, teacher_log - shifted, 0.0)
    # The teacher's probabilities add up to 1. Multiplied with each of this rank's alone, the
    # partition would get this rank's part of its gradient alone.
    kl = _sum_over_vocabulary(probability * difference, group) + partition
    return temperature**2 * kl


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of hidden states at each position, (length, batch) fp32.

    Args:
        student, teacher: (length, batch, size); the student's are projected to the teacher's size.
    """
    difference = student.float() - teacher.detach().float()
    return difference.square().mean(dim=2)
