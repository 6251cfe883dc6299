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


def sequence_kl(clean: Prediction, perturbed: Prediction, k: int) -> Tensor:
    """Return the KL divergence of two CRFs' distributions over k + 1 classes, (batch,).

    The classes are the k sequences that the clean one finds most likely, and all others together.
    It is at most the divergence over all sequences. No gradient goes to the clean one.
    """
    assert clean.crf is not None and perturbed.crf is not None
    mask = clean.word_mask
    sequences, scores = clean.crf.best(clean.tags.detach(), mask, k)
    exists = scores.isfinite()
    with torch.no_grad():
        target = clean.crf.log_prob(clean.tags, mask, sequences)
    log_probs = perturbed.crf.log_prob(perturbed.tags, mask, sequences)
    target, log_probs = (torch.where(exists, each, -torch.inf) for each in (target, log_probs))
    # Where a sequence does not exist, its target is -inf: `kl` takes the term as 0.
    pairs = [(target, torch.where(exists, log_probs, 0.0))]
    pairs.append((_log_rest(target), _log_rest(log_probs)))
    return kl(*(torch.cat(each, dim=1) for each in zip(*pairs, strict=True)))


def _log_rest(log_probs: Tensor) -> Tensor:
    """Return log(1 - sum of the probabilities), (batch, 1); its rounding is the least of it."""
    rest = -torch.expm1(log_probs.logsumexp(1, keepdim=True).clamp(max=0.0))
    return rest.clamp(min=torch.finfo(rest.dtype).eps).log()


def divergences(
    clean: Prediction, perturbed: Prediction, task: str, k_best: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return the divergences of the intents and of the tags, (batch,) each; None if not trained.

    The tags' one is the mean over an utterance's words; with a CRF and k_best, it is that of the
    k-best sequences.
    """
    of_intents = of_tags = None
    if has_intents(task):
        of_intents = kl(clean.intent_log_probs(), perturbed.intent_log_probs())
    if has_tags(task) and clean.crf is not None and k_best:
        of_tags = sequence_kl(clean, perturbed, k_best)
    elif has_tags(task):
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
            clean = model.predict(embedded, batch)

        def divergence(moved: Tensor) -> Tensor:
            found = divergences(clean, model.predict(moved, batch), task, settings.k_best)
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
        found = divergences(clean, perturbed, task, settings.k_best)
    return Losses(*(None if each is None else each.mean() for each in found))
