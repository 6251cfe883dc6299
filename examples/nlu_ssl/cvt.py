"""Cross-view training: heads on restricted views learn the full view's answers.

An auxiliary head reads features that have seen a part of the utterance, and imitates what the model
says having seen all of it. That needs no labels, and teaches the layers that both share. Batches
alternate: a labelled one trains the model's own heads, an unlabelled one the auxiliary heads.
Source: Clark et al. 2018, arXiv:1809.08370.
"""

import torch
from losses_ssl import Losses, has_intents, has_tags, kl, mean_of_words, sum_of
from models import Batch, NluModel, without_dropout
from torch import Tensor


def _head(size: int, num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, num_classes)
    )


class AuxiliaryHeads(torch.nn.Module):
    """Heads for each restricted view of a model; they are not a part of it, and are not saved."""

    def __init__(self, model: NluModel, task: str) -> None:
        super().__init__()
        sizes = model.view_sizes().items()
        self.tags, self.intents = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for name, (of_words, of_whole) in sizes:
            if of_words and has_tags(task):
                self.tags[f"{name}_view"] = _head(of_words, len(model.labels.tags))
            if of_whole and has_intents(task):
                self.intents[f"{name}_view"] = _head(of_whole, len(model.labels.intents))
        self.to(model.device)

    def forward(self, model: NluModel, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the log-probabilities of each view: of the intents, and of each word's tags."""
        views = model.views(model.embed(batch), batch)
        intents, tags = {}, {}
        for name, view in views.items():
            key = f"{name}_view"
            if key in self.intents:
                assert view.whole is not None
                intents[name] = self.intents[key](view.whole).log_softmax(-1)
            if key in self.tags:
                assert view.words is not None
                tags[name] = self.tags[key](view.words).log_softmax(-1)
        return intents, tags


def cvt_losses(model: NluModel, heads: AuxiliaryHeads, batch: Batch) -> dict[str, Losses]:
    """Return KL(full view || restricted view) of each view; no gradient goes to the full view.

    The full view answers without dropout. With a CRF its targets are the marginals of the tags.
    """
    with torch.no_grad(), without_dropout(model):
        full = model(batch)
        intent_targets = full.intent_log_probs()
        tag_targets = full.tag_log_probs() if heads.tags else None
    intents, tags = heads(model, batch)
    found = {}
    for name in intents.keys() | tags.keys():
        of_intents = of_tags = None
        if name in intents:
            of_intents = kl(intent_targets, intents[name]).mean()
        if name in tags:
            assert tag_targets is not None
            of_tags = mean_of_words(kl(tag_targets, tags[name]), batch.word_mask)
        found[name] = Losses(of_intents, of_tags)
    return dict(sorted(found.items()))


def total(losses: dict[str, Losses]) -> Losses:
    """Return the sums over the views."""

    def over(found: list[Tensor | None]) -> Tensor | None:
        present = [each for each in found if each is not None]
        return sum_of(present) if present else None

    views = losses.values()
    return Losses(over([each.intents for each in views]), over([each.tags for each in views]))
