"""What a semi-supervised method needs of a model, and the teacher recipe's encoder as one.

A model answers utterances in steps that a method can get between:

    ids -> embed -> (a perturbation) -> predict -> scores of the intents, and of each word's tags
                                     -> views   -> features that have seen a part of the utterance

Tags are of words. A model may read sub-words, but what it returns for tags is gathered to words, so
that no method has to know about sub-words and their padding.

Importing this module does not import Megatron; see encoder.py of the teacher recipe.
"""

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

import joint
import tokenizers
import torch
from joint import JointModel
from labels import Encoded, LabelSet, Tagged, encode
from torch import Tensor

if TYPE_CHECKING:
    from bilstm_crf import LinearChainCrf


@dataclass(frozen=True)
class Batch:
    """Utterances of one pass.

    Attributes:
        ids: (batch, length) int64, padded with [PAD].
        mask: (batch, length) bool; True for a sub-word, False for padding.
        firsts, lasts: (batch, words) int64; the places of each word's first and last sub-word, 0
            for padding.
        word_mask: (batch, words) bool; True for a word, False for padding.
    """

    ids: Tensor
    mask: Tensor
    firsts: Tensor
    lasts: Tensor
    word_mask: Tensor

    @classmethod
    def of(cls, encoded: Sequence[Encoded], device: torch.device) -> "Batch":
        """Pad utterances to the longest one, and their words to the most."""
        padded = joint.Batch.of(encoded, device)
        # The sub-words end before [SEP], which is the last one.
        lasts = [[*(first - 1 for first in each.firsts[1:]), len(each.ids) - 2] for each in encoded]
        most = max(len(each.firsts) for each in encoded)
        to = {"dtype": torch.int64, "device": device}
        rows = [
            [[*row] + [0] * (most - len(row)) for row in table]
            for table in ([each.firsts for each in encoded], lasts)
        ]
        num_words = torch.tensor([len(each.firsts) for each in encoded], **to)
        word_mask = torch.arange(most, device=device) < num_words.unsqueeze(1)
        firsts, lasts_of = (torch.tensor(table, **to) for table in rows)
        return cls(padded.ids, padded.mask.bool(), firsts, lasts_of, word_mask)

    @property
    def num_words(self) -> Tensor:
        """How many words each utterance has, (batch,) int64."""
        return self.word_mask.sum(1)


def at(states: Tensor, places: Tensor) -> Tensor:
    """Return the states at places (batch, words), as (batch, words, size)."""
    return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def mean_over(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the states where a mask is True: (batch, n, size) -> (batch, size)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch.

    Attributes:
        intents: (batch, intents), logits.
        tags: (batch, words, tags); logits, or a CRF's scores of each word alone.
        word_mask: see Batch.
        crf: of the model; None if a word's tag does not depend on the other words' tags.
    """

    intents: Tensor
    tags: Tensor
    word_mask: Tensor
    crf: "LinearChainCrf | None" = None

    def intent_log_probs(self, temperature: float = 1.0) -> Tensor:
        """Return log p(intent)^(1/T), normalized; (batch, intents)."""
        return (self.intents / temperature).log_softmax(-1)

    def tag_log_probs(self, temperature: float = 1.0) -> Tensor:
        """Return the log-probability of each word's tags, (batch, words, tags).

        With a CRF these are the marginals of the distribution p(tags of all words)^(1/T),
        normalized. Padding has numbers without a meaning.
        """
        if self.crf is None:
            return (self.tags / temperature).log_softmax(-1)
        return self.crf.log_marginals(self.tags, self.word_mask, temperature=temperature)


@dataclass(frozen=True)
class View:
    """Features that have seen a part of the utterance.

    Attributes:
        words: (batch, words, size), for the tag of each word; None if the view has none.
        whole: (batch, size), for the intent; None if the view has none.
    """

    words: Tensor | None
    whole: Tensor | None


class NluModel(torch.nn.Module, ABC):
    """A model for intents and tags whose steps are open to a method.

    Args:
        max_length: sub-words of an utterance at most, with [CLS] and [SEP].
    """

    crf: "LinearChainCrf | None"

    def __init__(self, labels: LabelSet, tokenizer: tokenizers.Tokenizer, max_length: int) -> None:
        super().__init__()
        self.labels, self.tokenizer, self.max_length = labels, tokenizer, max_length
        self.crf = None  # no attribute of the class, which would hide a subclass's module

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """Return the embeddings that a method may perturb, (batch, length, size)."""

    @abstractmethod
    def predict(self, embedded: Tensor, batch: Batch) -> Prediction:
        """Answer a batch from its embeddings."""

    @abstractmethod
    def views(self, embedded: Tensor, batch: Batch) -> dict[str, View]:
        """Return the restricted views by their names."""

    @abstractmethod
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """Return the sizes of each view's features: of words and of the whole, 0 for none."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model's folder."""

    def forward(self, batch: Batch) -> Prediction:
        """Answer a batch."""
        return self.predict(self.embed(batch), batch)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def trained(self) -> list[torch.nn.Parameter]:
        """Return the parameters that an answer depends on."""
        return list(self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that an answer depends on, by name."""
        return {name: param.detach() for name, param in self.named_parameters()}

    def seed_dropout(self, seed: int) -> None:
        """Seed what dropout draws from, so that a run does not depend on those before it."""
        torch.manual_seed(seed)

    def num_params(self) -> int:
        """Count the parameters, with the embedding."""
        return sum(param.numel() for param in self.trained())

    def encode(self, words: Sequence[str], place: str) -> Encoded:
        """Turn words into sub-words; see `labels.encode`."""
        return encode(words, self.tokenizer, self.max_length, place)

    def batch(self, encoded: Sequence[Encoded]) -> Batch:
        """Put utterances together on the model's device."""
        return Batch.of(encoded, self.device)

    def best_tags(self, prediction: Prediction) -> Tensor:
        """Return the best tags, (batch, words) int64; of the most likely sequence with a CRF."""
        if self.crf is None:
            return prediction.tags.argmax(-1)
        return self.crf.best(prediction.tags, prediction.word_mask)[0][:, 0]

    @torch.no_grad()
    def predictions(
        self, encoded: Sequence[Encoded], batch_size: int = 64
    ) -> Iterator[tuple[list[int], Prediction]]:
        """Answer utterances without dropout, batches of similar lengths: their places, and those.

        The model is left in the mode that it was in.
        """
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            with without_dropout(self):
                answer = self(self.batch([encoded[index] for index in chosen]))
            yield chosen, answer

    def answer(
        self, utterances: Sequence[Tagged], batch_size: int = 64, *, with_tags: bool = True
    ) -> list[Tagged]:
        """Return the utterances with the intents and tags that the model says.

        Args:
            with_tags: False leaves all tags at O, for a model that was taught none.
        """
        encoded = [self.encode(each.words, each.place) for each in utterances]
        answers: dict[int, Tagged] = {}
        for chosen, prediction in self.predictions(encoded, batch_size):
            intents = prediction.intents.argmax(-1).tolist()
            tags = prediction.word_mask.long() * 0  # O, the first tag of a LabelSet
            tags = (self.best_tags(prediction) if with_tags else tags).tolist()
            for index, intent, row in zip(chosen, intents, tags, strict=True):
                each = utterances[index]
                names = tuple(self.labels.tags[number] for number in row[: len(each.words)])
                answers[index] = Tagged(each.words, names, self.labels.intents[intent], each.place)
        return [answers[index] for index in range(len(utterances))]


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Put a model's modules into evaluation mode for a while, but LSTMs.

    An LSTM has no dropout here, and cuDNN computes no gradient for one in evaluation mode.
    """
    changed = [
        module
        for module in model.modules()
        if module.training and not isinstance(module, torch.nn.RNNBase)
    ]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


# --- the encoder of the teacher recipe ----------------------------------------------------------


class EncoderModel(NluModel):
    """The teacher recipe's encoder with its two heads.

    Its restricted views are passes with a narrower attention, as a Transformer has no states that
    have seen a part alone:

        forward     each sub-word attends to itself and to what is before it
        backward    each sub-word attends to itself and to what is behind it
        window      each sub-word attends to those up to `window` places away; layer by layer that
                    adds up, so that a state has seen num_layers * window places on both sides

    The forward and the backward view see an utterance's first and last half for the intent. The
    window has no view for the intent: its states together have seen all words.

    Args:
        model: in the state that `joint.build` or `Start.model` returns.
        window: sub-words.
    """

    def __init__(self, model: JointModel, *, window: int = 1) -> None:
        super().__init__(model.labels, model.tokenizer, model.shape.max_length)
        self.joint, self.window = model, window

    def embed(self, batch: Batch) -> Tensor:
        """Return the sums of the embeddings of sub-words and of positions."""
        bert = self.joint.encoder
        embedded = bert.embedding(
            input_ids=batch.ids, position_ids=bert.bert_position_ids(batch.ids)
        )
        return embedded.transpose(0, 1)

    def _run(self, embedded: Tensor, hidden_keys: Tensor) -> Tensor:
        """Run the layers.

        Args:
            hidden_keys: (batch, length, length) bool; True hides a key from a query.

        Returns:
            (batch, length, hidden_size).
        """
        bert = self.joint.encoder
        rotary = None
        if bert.position_embedding_type == "rope":
            rotary = bert.rotary_pos_emb(embedded.shape[1])
        states = bert.encoder(
            hidden_states=embedded.transpose(0, 1).contiguous(),
            attention_mask=hidden_keys.unsqueeze(1),
            rotary_pos_emb=rotary,
        )
        return states.transpose(0, 1)

    def predict(self, embedded: Tensor, batch: Batch) -> Prediction:
        """Compute what JointModel.forward does, gathered to words."""
        model = self.joint
        length = embedded.shape[1]
        hidden = self._run(embedded, ~batch.mask[:, None, :].expand(-1, length, -1))
        pooled = mean_over(hidden, batch.mask) if model.pooling == "mean" else hidden[:, 0]
        intents = model.intent_head(model.dropout(torch.tanh(model.pooler(pooled))))
        tags = model.slot_head(model.dropout(at(hidden, batch.firsts)))
        return Prediction(intents, tags, batch.word_mask)

    def view_masks(self, batch: Batch) -> dict[str, Tensor]:
        """Return the keys that each view hides, (batch, length, length) bool."""
        place = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        away = place[None, :] - place[:, None]  # of a key from a query
        hidden = {"forward": away > 0, "backward": away < 0, "window": away.abs() > self.window}
        return {name: mask | ~batch.mask[:, None, :] for name, mask in hidden.items()}

    def views(self, embedded: Tensor, batch: Batch) -> dict[str, View]:
        """See the class."""
        masks = self.view_masks(batch)
        states = {name: self._run(embedded, mask) for name, mask in masks.items()}
        half = (batch.num_words.unsqueeze(1) + 1) // 2
        place = torch.arange(batch.word_mask.shape[1], device=embedded.device)
        first = place < half
        last = (place >= batch.num_words.unsqueeze(1) - half) & batch.word_mask
        forward = at(states["forward"], batch.lasts)
        backward = at(states["backward"], batch.firsts)
        return {
            "forward": View(forward, mean_over(forward, first)),
            "backward": View(backward, mean_over(backward, last)),
            "window": View(at(states["window"], batch.firsts), None),
        }

    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """See NluModel."""
        size = self.joint.shape.hidden_size
        return {"forward": (size, size), "backward": (size, size), "window": (size, 0)}

    def trained(self) -> list[torch.nn.Parameter]:
        """Return the parameters that an answer depends on."""
        return self.joint.trained()

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that an answer depends on, by name."""
        return {f"joint.{name}": value for name, value in self.joint.weights().items()}

    def seed_dropout(self, seed: int) -> None:
        """Seed torch's generator and Megatron's."""
        joint.seed_dropout(seed)

    def save(self, folder: Path) -> None:
        """Write a folder that the teacher recipe's commands read, too."""
        self.joint.save(folder)
