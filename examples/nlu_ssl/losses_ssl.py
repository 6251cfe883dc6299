"""The losses of labels, of pseudo-labels and of soft targets.

Each is returned for the intents and for the tags apart. A loss of intents is a mean over a batch's
utterances, and one of tags a mean over its words. A CRF's negative log-likelihood is of sequences;
it is divided by the number of words as well, so that it has the same size.
"""

from dataclasses import dataclass

import torch
from models import Prediction
from torch import Tensor

TASKS = ("ic", "ner", "both")


@dataclass(frozen=True)
class Losses:
    """The losses of the intents and of the tags, scalars; None for a task that is not trained."""

    intents: Tensor | None
    tags: Tensor | None

    def total(self) -> Tensor:
        """Return their sum."""
        return sum_of([each for each in (self.intents, self.tags) if each is not None])


def sum_of(losses: list[Tensor]) -> Tensor:
    """Return the sum of one or more scalars."""
    total = losses[0]
    for each in losses[1:]:
        total = total + each
    return total


def has_intents(task: str) -> bool:
    """Whether a task has intents: "ic" and "both"."""
    return task != "ner"


def has_tags(task: str) -> bool:
    """Whether a task has tags: "ner" and "both"."""
    return task != "ic"


def mean_of_words(values: Tensor, word_mask: Tensor) -> Tensor:
    """Return the mean over the words that are no padding, of (batch, words)."""
    # Padding may hold numbers that are not finite, which a product with 0 would keep.
    return torch.where(word_mask, values, 0.0).sum() / word_mask.sum()


def label_loss(prediction: Prediction, intents: Tensor, tags: Tensor, task: str) -> Losses:
    """Return the negative log-likelihood of labels, which may be a teacher's (PL).

    Args:
        intents: (batch,) int64.
        tags: (batch, words) int64; any tag for padding.
    """
    of_intents = of_tags = None
    if has_intents(task):
        of_intents = torch.nn.functional.cross_entropy(prediction.intents, intents)
    if has_tags(task) and prediction.crf is not None:
        log_probs = prediction.crf.log_prob(prediction.tags, prediction.word_mask, tags)
        of_tags = -log_probs.sum() / prediction.word_mask.sum()
    elif has_tags(task):
        chosen = prediction.tags.log_softmax(-1).gather(-1, tags.unsqueeze(-1)).squeeze(-1)
        of_tags = mean_of_words(-chosen, prediction.word_mask)
    return Losses(of_intents, of_tags)


def kl(target: Tensor, log_probs: Tensor) -> Tensor:
    """Return KL(target || model) of the last dimension, in nats; no gradient goes to the target.

    Args:
        target, log_probs: (..., classes), logarithms of probabilities; -inf in the target is a
            class without probability.
    """
    target = target.detach()
    probability = target.exp()
    return torch.where(probability > 0, probability * (target - log_probs), 0.0).sum(-1)


@dataclass(frozen=True)
class Temperatures:
    """KD's temperatures, of the intents and of the tags."""

    intents: float
    tags: float


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's log-probabilities at its temperatures: (batch, intents), (batch, words, tags)."""

    intents: Tensor
    tags: Tensor


def distillation_loss(
    prediction: Prediction, targets: SoftTargets, temperatures: Temperatures, task: str
) -> Losses:
    """Return T^2 KL(teacher || student at T), of the intents and of each word's tags (KD).

    The factor keeps the size of the gradient when T changes. With T = 1 and a teacher whose
    temperature goes to 0, the targets become the teacher's most likely labels, and the gradient
    that of `label_loss` without a CRF. If both temperatures go to 0, the gradient vanishes.

    A CRF's tags are compared by their marginals, which takes the likelihood of the sequence apart
    into its words. See Prediction.tag_log_probs for its temperature.
    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.

    Args:
        targets: at the teacher's temperatures.
        temperatures: the student's.
    """
    of_intents = of_tags = None
    if has_intents(task):
        each = kl(targets.intents, prediction.intent_log_probs(temperatures.intents))
        of_intents = temperatures.intents**2 * each.mean()
    if has_tags(task):
        each = kl(targets.tags, prediction.tag_log_probs(temperatures.tags))
        of_tags = temperatures.tags**2 * mean_of_words(each, prediction.word_mask)
    return Losses(of_intents, of_tags)
