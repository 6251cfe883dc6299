"""A small BiLSTM with a linear-chain CRF over the words' tags, and a head for the intent.

The CRF is our own: pytorch-crf is of 2019 and has no k-best sequences, and torch-struct is of 2021.
It is tested against the enumeration of all sequences, in float64.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

import tokenizers
import torch
import vocabulary
from labels import LabelSet
from models import Batch, NluModel, Prediction, View, at, mean_over
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "bilstm.json"


class LinearChainCrf(torch.nn.Module):
    """Scores of sequences of tags, with a score of each pair of neighbours.

        s(y) = start[y_1] + sum_t scores[t, y_t] + sum_t transitions[y_t, y_t+1] + end[y_n]
        p(y) = exp(s(y)) / sum_y' exp(s(y'))

    In all methods, scores are (batch, words, tags), and mask is (batch, words) bool; each
    utterance's words come first and are one or more.
    Source: Lafferty, McCallum, Pereira 2001, Conditional random fields.
    """

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.start = torch.nn.Parameter(torch.zeros(num_tags))
        self.end = torch.nn.Parameter(torch.zeros(num_tags))
        self.transitions = torch.nn.Parameter(torch.zeros(num_tags, num_tags))

    def score(self, scores: Tensor, mask: Tensor, tags: Tensor) -> Tensor:
        """Return s(y) of sequences.

        Args:
            tags: (batch, ..., words) int64; several sequences of an utterance are allowed.

        Returns:
            (batch, ...).
        """
        extra = tags.dim() - 2
        shape = (mask.shape[0], *[1] * extra, mask.shape[1])
        weights = mask.view(shape).to(scores.dtype)
        of_words = scores.view(*shape, -1).expand(*tags.shape, -1)
        total = (of_words.gather(-1, tags.unsqueeze(-1)).squeeze(-1) * weights).sum(-1)
        pairs = self.transitions[tags[..., :-1], tags[..., 1:]]
        total = total + (pairs * weights[..., 1:]).sum(-1)
        place = (mask.sum(1) - 1).view(*shape[:-1], 1).expand(*tags.shape[:-1], 1)
        return total + self.start[tags[..., 0]] + self.end[tags.gather(-1, place).squeeze(-1)]

    def _forward(self, scores: Tensor, mask: Tensor, temperature: float) -> list[Tensor]:
        """Return the logarithms of the sums over all beginnings, of each word (batch, tags)."""
        add = _sums_over(self.transitions / temperature)
        alphas = [(self.start + scores[:, 0]) / temperature]
        for word in range(1, scores.shape[1]):
            following = add(alphas[-1]) + scores[:, word] / temperature
            alphas.append(torch.where(mask[:, word, None], following, alphas[-1]))
        return alphas

    def log_partition(self, scores: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Return log sum_y exp(s(y) / T), (batch,), by the forward algorithm."""
        last = self._forward(scores, mask, temperature)[-1]
        return (last + self.end / temperature).logsumexp(1)

    def log_marginals(self, scores: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Return log p(y_t), (batch, words, tags), of p(y) ~ exp(s(y) / T).

        By the forward-backward algorithm. Padding has numbers without a meaning.
        """
        alphas = self._forward(scores, mask, temperature)
        add = _sums_over((self.transitions / temperature).T)
        end = (self.end / temperature).expand_as(alphas[0])
        betas = [end]
        for word in range(scores.shape[1] - 1, 0, -1):
            before = add(betas[-1] + scores[:, word] / temperature)
            betas.append(torch.where(mask[:, word, None], before, end))
        betas.reverse()
        whole = (alphas[-1] + end).logsumexp(1)
        joint = torch.stack(alphas, 1) + torch.stack(betas, 1)
        return joint - whole[:, None, None]

    def log_prob(self, scores: Tensor, mask: Tensor, tags: Tensor) -> Tensor:
        """Return log p(y); see `score`."""
        whole = self.log_partition(scores, mask)
        of_tags = self.score(scores, mask, tags)
        return of_tags - whole.view(-1, *[1] * (of_tags.dim() - 1))

    @torch.no_grad()
    def best(self, scores: Tensor, mask: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return the k sequences with the highest scores.

        By Viterbi's algorithm with k paths a tag.

        Returns:
            (batch, k, words) int64, tag 0 for padding; and s(y), (batch, k), falling. Where there
            are fewer than k sequences, the score of the others is -inf.
        """
        batch, words, tags = scores.shape
        lowest = float("-inf")
        # (batch, tags, k): the scores of the k best paths that end in a tag.
        paths = scores.new_full((batch, tags, k), lowest)
        paths[:, :, 0] = self.start + scores[:, 0]
        # A path's predecessor is tag * k + rank; padding points to the path itself.
        itself = torch.arange(tags * k, device=scores.device).view(1, tags, k)
        # A tag's k best paths come from the k tags whose best one leads there best.
        num_from = min(k, tags)
        before = []
        for word in range(1, words):
            firsts = paths[:, :, 0, None] + self.transitions  # (batch, from, to)
            origins = _highest(firsts, num_from)  # (batch, few, to)
            steps = self.transitions.gather(0, origins.flatten(0, 1)).view_as(origins)
            ways = origins.flatten(1)[..., None].expand(-1, -1, k)
            steps = paths.gather(1, ways).view(batch, num_from, tags, k) + steps[..., None]
            pointers = origins[..., None] * k + torch.arange(k, device=scores.device)
            values, chosen = steps.transpose(1, 2).flatten(2).topk(k, dim=2)  # (batch, to, k)
            pointers = pointers.transpose(1, 2).flatten(2).gather(2, chosen)
            is_word = mask[:, word, None, None]
            paths = torch.where(is_word, values + scores[:, word, :, None], paths)
            before.append(torch.where(is_word, pointers, itself))
        final = (paths + self.end[:, None]).flatten(1).topk(k, dim=1)
        place = final.indices
        found = [place // k]
        for pointers in reversed(before):
            place = pointers.flatten(1).gather(1, place)
            found.append(place // k)
        sequences = torch.stack(found[::-1], 2)
        return sequences.masked_fill(~mask.unsqueeze(1), 0), final.values


# exp(-60) is far above the least number of fp32.
_MOST_APART = 60.0


def _sums_over(transitions: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function of values, (batch, from), to log sum_i exp(values_i + transitions_ij).

    It is a product of matrices, which takes an eighth of the time of `logsumexp` over all pairs,
    and is as exact while no transition is lost beside the largest. At a temperature near 0 they lie
    too far apart, and `logsumexp` it is.

    Args:
        transitions: (from, to).
    """
    with torch.no_grad():
        most, least = transitions.max(), transitions.min()
    if most - least > _MOST_APART:
        return lambda values: (values.unsqueeze(2) + transitions).logsumexp(1)
    weights = (transitions - most).exp()

    def add(values: Tensor) -> Tensor:
        largest = values.detach().amax(1, keepdim=True)
        return ((values - largest).exp() @ weights).log() + (largest + most)

    return add


def _highest(values: Tensor, k: int) -> Tensor:
    """Return the places of the k highest values of dimension 1, in k passes.

    For few of many, that takes half of the time of `topk` on a CPU. `argmax` would take four times
    that of `max`.
    """
    places = [values.max(1, keepdim=True).indices]
    for _ in range(k - 1):
        values = values.scatter(1, places[-1], float("-inf"))
        places.append(values.max(1, keepdim=True).indices)
    return torch.cat(places, 1)


class BiLstmLayer(torch.nn.Module):
    """An LSTM over each utterance from its begin, and one from its end.

    The second one reads reversed utterances, whose padding stays behind them. Neither has then to
    know where an utterance ends, and both run without torch's packed sequences, which take three
    times as long on a CPU.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.forwards = torch.nn.LSTM(size, hidden, batch_first=True)
        self.backwards = torch.nn.LSTM(size, hidden, batch_first=True)

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of both, (batch, length, hidden) each; zero at padding.

        Args:
            inputs: (batch, length, size).
            mask: (batch, length) bool; an utterance's sub-words come first.
        """
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        reverse = torch.where(mask, mask.sum(1, keepdim=True) - 1 - places, places)
        forwards = self.forwards(inputs)[0]
        backwards = at(self.backwards(at(inputs, reverse))[0], reverse)
        shown = mask.unsqueeze(-1)
        return torch.where(shown, forwards, 0.0), torch.where(shown, backwards, 0.0)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a BiLSTM.

    Attributes:
        hidden: of each direction.
        max_length: sub-words of an utterance at most, with [CLS] and [SEP].
    """

    embedding: int = 64
    hidden: int = 64
    max_length: int = 64


class BiLstmCrf(NluModel):
    """Two BiLSTM layers over sub-words, a CRF over words, and a head for the intent.

    The embeddings are normalized to mean 0 and variance 1 in each sub-word, so that no training
    can escape a perturbation by growing them. The first layer's directions give the restricted
    views; the second layer reads both and is the full view:

        forward     the forward state at a word's last sub-word
        backward    the backward state at a word's first sub-word
        future      the forward state before a word's first sub-word: the word lies in its future
        past        the backward state behind a word's last sub-word

    For the intent, forward sees an utterance's first half, and backward its last half.
    Sources: Huang, Xu, Yu 2015, arXiv:1508.01991; Clark et al. 2018, arXiv:1809.08370.

    Args:
        dropout: on the embeddings and before the heads, in training.
    """

    def __init__(
        self,
        sizes: Sizes,
        labels: LabelSet,
        tokenizer: tokenizers.Tokenizer,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(labels, tokenizer, sizes.max_length)
        self.sizes = sizes
        self.embedding = torch.nn.Embedding(tokenizer.get_vocab_size(), sizes.embedding)
        self.norm = torch.nn.LayerNorm(sizes.embedding, elementwise_affine=False)
        self.dropout = torch.nn.Dropout(dropout)
        both = 2 * sizes.hidden
        self.first = BiLstmLayer(sizes.embedding, sizes.hidden)
        self.second = BiLstmLayer(both, sizes.hidden)
        self.pooler = torch.nn.Linear(both, both)
        self.intent_head = torch.nn.Linear(both, len(labels.intents))
        self.slot_head = torch.nn.Linear(both, len(labels.tags))
        self.crf = LinearChainCrf(len(labels.tags))

    def embed(self, batch: Batch) -> Tensor:
        """Return the normalized embeddings of the sub-words."""
        return self.norm(self.embedding(batch.ids))

    def predict(self, embedded: Tensor, batch: Batch) -> Prediction:
        """See NluModel."""
        lower = torch.cat(self.first(self.dropout(embedded), batch.mask), dim=2)
        forward, backward = self.second(lower, batch.mask)
        words = torch.cat((at(forward, batch.lasts), at(backward, batch.firsts)), dim=2)
        pooled = torch.tanh(self.pooler(mean_over(words, batch.word_mask)))
        intents = self.intent_head(self.dropout(pooled))
        return Prediction(intents, self.slot_head(self.dropout(words)), batch.word_mask, self.crf)

    def views(self, embedded: Tensor, batch: Batch) -> dict[str, View]:
        """See the class."""
        forward, backward = self.first(self.dropout(embedded), batch.mask)
        # [CLS] is before the first word, and [SEP] behind the last one. Padding stays in range.
        before, behind = (batch.firsts - 1).clamp(min=0), batch.lasts + 1
        of_words = at(forward, batch.lasts), at(backward, batch.firsts)
        num_words = batch.num_words.unsqueeze(1)
        half = (num_words + 1) // 2
        wholes = (
            at(of_words[0], half - 1).squeeze(1),
            at(of_words[1], num_words - half).squeeze(1),
        )
        return {
            "forward": View(of_words[0], wholes[0]),
            "backward": View(of_words[1], wholes[1]),
            "future": View(at(forward, before), None),
            "past": View(at(backward, behind), None),
        }

    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """See NluModel."""
        size = self.sizes.hidden
        both, words = (size, size), (size, 0)
        return {"forward": both, "backward": both, "future": words, "past": words}

    def save(self, folder: Path) -> None:
        """Write bilstm.json, labels.json, tokenizer.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self.sizes), indent=2) + "\n")
        self.labels.write(folder / "labels.json")
        self.tokenizer.save(str(folder / vocabulary.FILE))
        weights = {name: value.contiguous() for name, value in self.weights().items()}
        save_file(weights, folder / "model.safetensors")


def load(folder: Path) -> BiLstmCrf:
    """Load a model's folder, in evaluation mode.

    Raises:
        ValueError: it is not the folder of a BiLstmCrf.
    """
    try:
        sizes = Sizes(**json.loads((folder / FILE).read_text()))
        labels = LabelSet.read(folder / "labels.json")
        model = BiLstmCrf(sizes, labels, vocabulary.load(folder))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        what = "must be a folder that train_ssl.py wrote with --model bilstm-crf"
        raise ValueError(f"{folder}: {what} ({type(exc).__name__}: {exc})") from exc
    return model.eval()
