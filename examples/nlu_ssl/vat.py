"""Virtual adversarial training: answers that do not change where a small perturbation would.

    r_adv = eps |e| g / |g|,  g = gradient of D(p(e), p(e + d)) at d = xi |e| u / |u|,  u random
    loss  = D(p(e), p(e + r_adv)),  where no gradient goes to p(e)

e are the embeddings of an utterance, |e| is their norm over all its sub-words, and D is a KL
divergence. One power iteration: the first derivative of D is zero at d = 0, so that g is the
Hessian times d. As xi and epsilon are shares of |e|, the same values fit a model whose embeddings
have another size, and utterances of any length.
Sources: Miyato et al. 2017, arXiv:1704.03976; for text Miyato, Dai, Goodfellow 2017,
arXiv:1605.07725; with a CRF Chen et al. 2020, SeqVAT, ACL 2020.acl-main.777.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from losses_ssl import Losses, has_intents, has_tags, kl
from models import Batch, NluModel, Prediction, without_dropout
from torch import Tensor


@dataclass(frozen=True)
class VatSettings:
    """The perturbation.

    Attributes:
        xi: of the point at which the gradient is taken, as a share of the embeddings' norm.
        epsilon: of the perturbation, as a share of the embeddings' norm.
        k_best: sequences that a CRF's distributions are compared on; 0 compares each word's
            marginals instead.
    """

    xi: float = 0.01
    epsilon: float = 0.2
    k_best: int = 3


def unit(values: Tensor, mask: Tensor) -> Tensor:
    """Scale each utterance's (length, size) to norm 1, without its padding; zero stays zero."""
    values = torch.where(mask.unsqueeze(-1), values, 0.0)
    norm = values.flatten(1).norm(dim=1)[:, None, None]
    return values / norm.clamp(min=torch.finfo(values.dtype).tiny)


def adversarial(
    embedded: Tensor,
    mask: Tensor,
    divergence: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    xi: float,
    epsilon: float,
) -> Tensor:
    """Return r_adv, (batch, length, size), which is zero at padding.

    Args:
        embedded: (batch, length, size).
        mask: (batch, length) bool.
        divergence: of the clean answers and those to perturbed embeddings, (batch,).
        noise: u, of embedded's shape.
    """
    embedded = embedded.detach()
    size = torch.where(mask.unsqueeze(-1), embedded, 0.0).flatten(1).norm(dim=1)[:, None, None]
    with torch.enable_grad():
        moved = (xi * size * unit(noise, mask)).requires_grad_()
        (grad,) = torch.autograd.grad(divergence(embedded + moved).sum(), moved)
    return epsilon * size * unit(grad, mask)


@dataclass(frozen=True)
class KBest:
    """The sequences that a CRF finds most likely.

    Attributes:
        sequences: (batch, k, words) int64.
        log_probs: (batch, k), falling; -inf where there are fewer sequences.
    """

    sequences: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, prediction: Prediction, k: int) -> "KBest":
        """Return the k best sequences of a model with a CRF; no gradient goes to it."""
        assert prediction.crf is not None
        with torch.no_grad():
            tags, mask = prediction.tags, prediction.word_mask
            sequences, scores = prediction.crf.best(tags, mask, k)
            # Where there is no sequence, the score is -inf, and so is the difference.
            return cls(sequences, scores - prediction.crf.log_partition(tags, mask)[:, None])


def sequence_kl(clean: KBest, perturbed: Prediction) -> Tensor:
    """Return the KL divergence of two CRFs' distributions over k + 1 classes, (batch,).

    The classes are the k sequences that the clean one finds most likely, and all others together.
    It is at most the divergence over all sequences. No gradient goes to the clean one.

    If there are fewer than k sequences, the target of the missing ones is -inf, whose term `kl`
    takes as 0, and that of all others together is a rounding, whose term is as small.
    """
    assert perturbed.crf is not None
    log_probs = perturbed.crf.log_prob(perturbed.tags, perturbed.word_mask, clean.sequences)
    return kl(_with_rest(clean.log_probs), _with_rest(log_probs))


def _with_rest(log_probs: Tensor) -> Tensor:
    """Append log(1 - sum of the probabilities): (batch, k) gives (batch, k + 1).

    The sum may be rounded to 1, or to more: the rest is at least its rounding.
    """
    rest = -torch.expm1(log_probs.logsumexp(1, keepdim=True))
    return torch.cat((log_probs, rest.clamp(min=torch.finfo(rest.dtype).eps).log()), dim=1)


class CleanAnswers:
    """The answers to what is not perturbed, which others are compared with.

    Args:
        k_best: of VatSettings.
    """

    def __init__(self, prediction: Prediction, task: str, k_best: int) -> None:
        self.prediction, self.task = prediction, task
        by_sequence = has_tags(task) and prediction.crf is not None and k_best > 0
        self.k_best = KBest.of(prediction, k_best) if by_sequence else None

    def divergences(self, perturbed: Prediction) -> tuple[Tensor | None, Tensor | None]:
        """Return those of the intents and of the tags, (batch,) each; None if not trained.

        The tags' one is the mean over an utterance's words; with a CRF and k_best, it is that of
        the k-best sequences.
        """
        clean = self.prediction
        of_intents = of_tags = None
        if has_intents(self.task):
            of_intents = kl(clean.intent_log_probs(), perturbed.intent_log_probs())
        if self.k_best is not None:
            of_tags = sequence_kl(self.k_best, perturbed)
        elif has_tags(self.task):
            of_words = kl(clean.tag_log_probs(), perturbed.tag_log_probs())
            of_words = torch.where(clean.word_mask, of_words, 0.0)
            of_tags = of_words.sum(1) / clean.word_mask.sum(1)
        return of_intents, of_tags


def vat_loss(
    model: NluModel, batch: Batch, task: str, settings: VatSettings, generator: torch.Generator
) -> Losses:
    """Return VAT's losses of a batch, which needs no labels.

    All passes are without dropout, so that a perturbation is the only thing that moves an answer.

    Args:
        generator: draws u, on the CPU.
    """
    with without_dropout(model):
        embedded = model.embed(batch)
        with torch.no_grad():
            clean = CleanAnswers(model.predict(embedded, batch), task, settings.k_best)

        def divergence(moved: Tensor) -> Tensor:
            found = clean.divergences(model.predict(moved, batch))
            return torch.stack([each for each in found if each is not None]).sum(0)

        noise = torch.randn(embedded.shape, generator=generator, dtype=embedded.dtype, device="cpu")
        r_adv = adversarial(
            embedded,
            batch.mask,
            divergence,
            noise.to(embedded.device),
            xi=settings.xi,
            epsilon=settings.epsilon,
        )
        perturbed = model.predict(embedded + r_adv, batch)
        found = clean.divergences(perturbed)
    return Losses(*(None if each is None else each.mean() for each in found))
